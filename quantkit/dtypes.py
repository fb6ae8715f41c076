"""The table of code dtypes.

Integer codes are unsigned, 0 .. 2^bits - 1; the zero point says which code means 0.0. The others stand for a table of values,
one per code, and have no zero point:

- ``fp8_e4m3`` and ``fp4_e2m1``: the code is the number's own bits, sign first (OCP 8-bit Floating Point Specification 1.0,
  2023; OCP Microscaling Formats 1.0, 2023). e4m3 has no infinity; its codes 0x7f and 0xff are NaN and never chosen.
- ``nf4``: 16 quantiles of a normal distribution, scaled to [-1, 1], with an exact zero (Dettmers, Pagnoni, Holtzman,
  Zettlemoyer 2023, arXiv 2305.14314, appendix E).
- ``iq4_nl``: the 16 integers of ggml's IQ4_NL and IQ4_XS blocks, closer together near zero (``ggml-common.h``).
"""

import functools
import math
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from quantkit.errors import SpecError, nearest


@dataclass(frozen=True, slots=True)
class CodeDtype:
    """One storable number format: ``bits`` per code, and for other than integers the value of every code."""

    name: str
    bits: int
    values: tuple[float, ...] | None = None

    @property
    def levels(self) -> int:
        """Number of distinct codes."""
        return 1 << self.bits

    @property
    def largest(self) -> float:
        """Largest value of a table."""
        assert self.values is not None
        return max(value for value in self.values if not math.isnan(value))


def _float_values(exponent_bits: int, mantissa_bits: int, *, nan: bool) -> tuple[float, ...]:
    """Return the value of every code of a small float without infinities; with ``nan`` all ones mean NaN."""
    bias, size = (1 << exponent_bits - 1) - 1, 1 << mantissa_bits
    positive = []
    for exponent in range(1 << exponent_bits):
        for mantissa in range(size):
            fraction, power = (1 + mantissa / size, exponent) if exponent else (mantissa / size, 1)
            positive.append(fraction * 2.0 ** (power - bias))
    if nan:
        positive[-1] = math.nan
    return (*positive, *(-value for value in positive))


def _normal_float_values() -> tuple[float, ...]:
    """Return NF4: 8 positive and 8 negative quantiles between 1/2 and the offset 1 - (1/32 + 1/30) / 2, sharing zero."""
    offset = 1 - (1 / 32 + 1 / 30) / 2

    def half(count: int) -> list[float]:
        steps = torch.linspace(offset, 0.5, count, dtype=torch.float64)[:-1]
        quantiles: list[float] = torch.special.ndtri(steps).tolist()
        return [quantile / quantiles[0] for quantile in quantiles]

    return tuple(sorted([-value for value in half(8)] + [0.0] + half(9)))


DTYPES: Final[dict[str, CodeDtype]] = {
    **{f"int{bits}": CodeDtype(f"int{bits}", bits) for bits in range(2, 9)},
    "fp8_e4m3": CodeDtype("fp8_e4m3", 8, _float_values(4, 3, nan=True)),
    "fp4_e2m1": CodeDtype("fp4_e2m1", 4, _float_values(2, 1, nan=False)),
    "nf4": CodeDtype("nf4", 4, _normal_float_values()),
    "iq4_nl": CodeDtype("iq4_nl", 4, (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)),
}
"""Every dtype a :class:`quantkit.spec.QuantSpec` may name."""

SCALE_DTYPES: Final[dict[str, torch.dtype]] = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float8_e8m0fnu": torch.float8_e8m0fnu,
    "float8_e4m3fn": torch.float8_e4m3fn,
}
"""Every dtype a scale may be stored in. The last two go with table dtypes: powers of two (MXFP4), and FP8 under one global
scale of the whole tensor (NVFP4)."""

FLOAT_DTYPES: Final[dict[str, torch.dtype]] = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float64,
}
"""Dtypes of unquantized weights by name."""


def float_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """Return the dtype of weights that a caller names: ``"bfloat16"``, ``"torch.bfloat16"``, a torch dtype, None or ``"auto"``.

    Raises:
        SpecError: another name, or a dtype that is no float.
    """
    name = str(dtype).removeprefix("torch.")
    if dtype is None or name == "auto":
        return None
    if name not in FLOAT_DTYPES:
        raise SpecError(f"dtype={dtype!r}: want a float dtype of torch or its name; {nearest(name, FLOAT_DTYPES)}")
    return FLOAT_DTYPES[name]


@functools.cache
def table(name: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return what rounding to a table dtype needs, float32 on the CPU.

    Returns:
        The value of every code (levels,); the codes in rising order of their values, without NaN and negative zero, uint8
        (n,); and the bounds between neighbours (n - 1,): values above ``bounds[i]`` round to a later code than ``i``.
    """
    dtype = DTYPES[name]
    assert dtype.values is not None
    codes = sorted(
        (code for code, v in enumerate(dtype.values) if not math.isnan(v) and not (v == 0 and math.copysign(1, v) < 0)),
        key=lambda code: dtype.values[code],  # type: ignore[index]
    )
    values = torch.tensor(dtype.values, dtype=torch.float32)
    rising = values[codes]
    return values, torch.tensor(codes, dtype=torch.uint8), (rising[1:] + rising[:-1]) / 2
