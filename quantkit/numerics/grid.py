r"""Uniform grids: choose scales and zero points, round to codes, and come back.

One convention everywhere, with unsigned codes :math:`q \in [0, 2^b - 1]`:

.. math:: w \approx (q - z) \cdot s

Symmetric grids have :math:`z = 2^{b-1}` (not stored) and :math:`s = \max|w| / ((2^b - 1) / 2)`; asymmetric ones cover
:math:`[\min(w, 0), \max(w, 0)]`, so 0.0 is always a code. A block of a weight (out, in) shares one scale; scales have the
shape (..., out / block rows, in / block columns). Scales are rounded to the dtype they are stored in *before* codes are
chosen, so what is measured is what is written.

Table dtypes (:mod:`quantkit.dtypes`) are symmetric, :math:`w \approx v_q s` with the value :math:`v_q` of the code and
:math:`s = \max|w| / \max v`; ties go to the even mantissa where the table is a float's, as in hardware. Scales that are powers
of two (MXFP4) follow the OCP rule, :math:`s = 2^{\lfloor\log_2 \max|w|\rfloor - \lfloor\log_2 \max v\rfloor}`.
"""

import functools
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from quantkit.dtypes import DTYPES, SCALE_DTYPES, table
from quantkit.errors import SpecError
from quantkit.spec import QuantSpec

FP8_LARGEST = 448.0
"""Largest number of FP8 e4m3."""

_SLICE = 1 << 16
"""Numbers in a part of a weight that fits the second-level cache several times."""

_LEAST_EXPONENT = 120
"""Blocks smaller than 2 to the minus this count as zero where scales are powers of two; E8M0 ends at -127."""


def block_size(spec: QuantSpec, shape: tuple[int, ...]) -> tuple[int, int]:
    """Return the block of ``spec`` with -1 resolved for a weight of ``shape`` (..., out, in).

    Raises:
        SpecError: if the block does not divide the shape.
    """
    if reason := spec.rejects(shape):
        raise SpecError(reason)
    rows, cols = spec.block
    return (shape[-2] if rows == -1 else rows, shape[-1] if cols == -1 else cols)


def row_slices(weight: Tensor, spec: QuantSpec) -> Iterator[slice]:
    """Yield the rows of a weight (out, in) in parts that fit the cache with all that is made of them, whole blocks each."""
    block, _ = block_size(spec, tuple(weight.shape))
    step = max(_SLICE // weight.shape[-1] // block, 1) * block
    for start in range(0, len(weight), step):
        yield slice(start, min(start + step, len(weight)))


def to_blocks(weight: Tensor, spec: QuantSpec) -> Tensor:
    """Reshape (..., out, in) to (..., out_blocks, in_blocks, rows * cols): one row per scale. May copy."""
    rows, cols = block_size(spec, tuple(weight.shape))
    split: Tensor = weight.unflatten(-1, (-1, cols)).unflatten(-3, (-1, rows))  # (..., out_blocks, rows, in_blocks, cols)
    return split.transpose(-3, -2).flatten(-2)


def round_scale(scale: Tensor, scale_dtype: str) -> Tensor:
    """Round float32 scales to ``scale_dtype``; zero becomes one, underflow becomes the smallest positive number.

    Raises:
        SpecError: if a scale is not finite or overflows ``scale_dtype``.
    """
    dtype = SCALE_DTYPES[scale_dtype]
    stored = torch.where(scale == 0, torch.ones_like(scale), scale).to(dtype)
    if dtype == torch.float8_e8m0fnu:  # has no zero, nor the operations below
        return stored
    if dtype == torch.float8_e4m3fn:  # saturates, as in hardware, and is never zero
        return scale.clamp(2.0**-9, FP8_LARGEST).to(dtype)
    smallest = torch.finfo(dtype).smallest_normal
    stored = torch.where(stored == 0, torch.full_like(stored, smallest), stored)
    if not torch.isfinite(stored).all():
        raise SpecError(
            f"a scale is not finite in {scale_dtype} (largest {scale.abs().max().item():.4g}); use scale_dtype float32"
        )
    return stored


def wanted_scales(weight: Tensor, spec: QuantSpec) -> Tensor:
    """Return the scale (..., out_blocks, in_blocks) that covers each block, in float32 and not rounded to any dtype."""
    blocks: Tensor = to_blocks(weight.float(), spec)
    largest: Tensor = blocks.abs().amax(-1)
    if not spec.is_integer:
        return largest.div(DTYPES[spec.dtype].largest)
    if spec.symmetric:
        return largest.div((2**spec.bits - 1) / 2)
    covered: Tensor = blocks.amax(-1).clamp(min=0) - blocks.amin(-1).clamp(max=0)
    return covered.div(2**spec.bits - 1)


def scale_bounds(scale_dtype: str) -> tuple[float, float]:
    """Return the smallest and the largest scale that a dtype holds well enough to choose codes by.

    Near its lower end a float has few digits left; down to eight of its smallest steps a scale is off by at most a sixteenth.
    The upper end leaves room for searches, which try ranges a little wider than the weights'.
    """
    dtype = SCALE_DTYPES[scale_dtype]
    if dtype == torch.float8_e8m0fnu:
        return 2.0**-_LEAST_EXPONENT, 2.0**_LEAST_EXPONENT
    if dtype == torch.float8_e4m3fn:
        return 2.0**-9, 1.01 * FP8_LARGEST  # saturates; the global scale brings the largest to the end, but for rounding
    info = torch.finfo(dtype)
    return max(8 * info.tiny * info.eps, 2.0**-126), info.max / 1.25


def largest_magnitude(values: Tensor) -> Tensor:
    """Return the largest magnitude of some numbers, (); NaN if one is. Nothing of their size is allocated."""
    ends = values.aminmax()
    return torch.maximum(ends.min.abs(), ends.max.abs())


def exponent_shift(values: Tensor) -> int:
    """Return k so that ``values * 2^k`` can be squared and summed in float32 without loss; 0 for numbers of usual size."""
    largest = float(largest_magnitude(values)) if values.numel() else 0.0
    if largest == 0 or not math.isfinite(largest) or 2.0**-40 <= largest <= 2.0**40:
        return 0
    return -math.frexp(largest)[1]


def shifted(values: Tensor, exponent: int) -> Tensor:
    """Return ``values * 2^exponent``, exactly as long as the result is a normal number, in the dtype of ``values``."""
    return values if exponent == 0 else (values.double() * 2.0**exponent).to(values.dtype)


def choose_qparams(weight: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor | None]:
    """Choose scale and zero point of every block from its absolute maximum (symmetric) or its range (asymmetric).

    Args:
        weight: floating (..., out, in).
        spec: grid.

    Returns:
        scale (..., out_blocks, in_blocks) in ``spec.scale_dtype``; zero point uint8 of the same shape, or None if symmetric.
    """
    _refuse_offset(spec)
    blocks = to_blocks(weight.float(), spec)
    if not spec.is_integer:
        largest, most = DTYPES[spec.dtype].largest, blocks.abs().amax(-1)
        if spec.scale_dtype == "float8_e8m0fnu":
            exponent = most.clamp(min=2.0**-_LEAST_EXPONENT).log2().floor() - math.floor(math.log2(largest))
            return round_scale(torch.where(most > 0, torch.exp2(exponent), most), spec.scale_dtype), None
        return round_scale(most / largest, spec.scale_dtype), None
    if spec.symmetric:
        return round_scale(blocks.abs().amax(-1) / ((2**spec.bits - 1) / 2), spec.scale_dtype), None
    return range_qparams(blocks.amin(-1), blocks.amax(-1), spec)


def choose_global_scale(largest: Tensor, spec: QuantSpec) -> Tensor:
    """Return what a weight whose largest magnitude is ``largest`` (...) is multiplied by so that its scales use all of FP8.

    That is 448 * max v / largest (NVIDIA's NVFP4 recipe), float32 in ``largest``'s shape; 1 for a weight of zeros.
    """
    wanted = FP8_LARGEST * DTYPES[spec.dtype].largest / largest.float()
    return torch.where(largest > 0, wanted, torch.ones_like(wanted))


def range_qparams(low: Tensor, high: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Return the asymmetric scale and uint8 zero point that cover ``[min(low, 0), max(high, 0)]``."""
    top = 2**spec.bits - 1
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = round_scale((high - low) / top, spec.scale_dtype)
    return scale, (-low / scale.float()).round_().clamp_(0, top).to(torch.uint8)


def expand(values: Tensor, spec: QuantSpec, shape: tuple[int, ...]) -> Tensor:
    """Broadcast one value per block (..., out_blocks, in_blocks) to a tensor that broadcasts against ``shape``.

    Per-row, per-column repetition is only materialised where a block is neither 1 nor the whole axis.
    """
    rows, cols = block_size(spec, shape)
    if cols not in (1, shape[-1]):
        values = values.repeat_interleave(cols, -1)
    if rows not in (1, shape[-2]):
        values = values.repeat_interleave(rows, -2)
    return values


def zero_code(spec: QuantSpec) -> int:
    """Return the implicit zero point of a symmetric grid."""
    return 1 << (spec.bits - 1)


def quantize(weight: Tensor, scale: Tensor, zero_point: Tensor | None, spec: QuantSpec) -> Tensor:
    """Round ``weight`` (..., out, in) to the nearest codes, clamped to the grid; returns uint8 of the same shape."""
    _refuse_offset(spec)
    shape = tuple(weight.shape)
    step = expand(scale.float(), spec, shape)
    if not spec.is_integer:
        return nearest_in_table(weight.float() / step, spec.dtype)
    zero: Tensor | int = zero_code(spec) if zero_point is None else expand(zero_point, spec, shape).float()
    return (weight.float() / step).round_().add_(zero).clamp_(0, 2**spec.bits - 1).to(torch.uint8)


def zero_dtype(spec: QuantSpec) -> torch.dtype:
    """Return the dtype of zero points: codes, or an offset in the dtype of the scales."""
    return SCALE_DTYPES[spec.scale_dtype] if spec.offset else torch.uint8


AT_ONCE = 1 << 26
"""Weights of a stack of experts that are decoded in one go: a float copy of all may be gigabytes, and it takes three."""


def one_by_one(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, of: Callable[[int], Tensor]) -> Tensor:
    """Return a stack (experts, out, in) whose matrices are made in turn."""
    found = torch.empty(shape, dtype=dtype, device=device)
    for expert, part in enumerate(found):
        part.copy_(of(expert))
    return found


def dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor | None, spec: QuantSpec) -> Tensor:
    """Return ``(codes - zero_point) * scale`` in float32, same shape as ``codes`` (..., out, in).

    Where the grid has an offset, ``zero_point`` is that: ``codes * scale + zero_point``.
    """
    shape = tuple(codes.shape)
    if spec.offset and zero_point is not None:
        return codes.float().mul_(expand(scale, spec, shape).float()).add_(expand(zero_point, spec, shape).float())
    if not spec.is_integer:
        return table(spec.dtype)[0].to(codes.device)[codes.int()].mul_(expand(scale.float(), spec, shape))
    zero: Tensor | int = zero_code(spec) if zero_point is None else expand(zero_point, spec, shape).float()
    return (codes.float() - zero).mul_(expand(scale, spec, shape).float())


def _refuse_offset(spec: QuantSpec) -> None:
    if spec.offset:
        raise SpecError(f"{spec.describe()}: weights with an offset are only read; quantize with zero points (-asym)")


def nearest_in_table(values: Tensor, dtype: str) -> Tensor:
    """Return the uint8 codes of the nearest values of a table; what lies outside gets the outermost."""
    if dtype == "iq4_nl":  # all bounds are halves of integers, so the half below a value says which code is nearest
        return _iq4_codes().to(values.device)[(values * 2).floor_().clamp_(-256, 226).int() + 256]
    if dtype == "fp8_e4m3":
        largest = DTYPES[dtype].largest
        codes = values.clamp(-largest, largest).to(torch.float8_e4m3fn).view(torch.uint8)
        return torch.where(codes == 0x80, torch.zeros_like(codes), codes)  # one zero is enough
    _, codes, bounds = (part.to(values.device) for part in table(dtype))
    above, below = (torch.bucketize(values, bounds, right=right) for right in (False, True))
    even = (codes & 1) == 0  # bounds belong to the neighbour with the even code
    return torch.where(even[above], codes[above], codes[below])


@functools.cache
def _iq4_codes() -> Tensor:
    """Return the code nearest to i / 2 - 127.75, uint8 for i from 0 to 482."""
    _, codes, bounds = table("iq4_nl")
    return codes[torch.bucketize(torch.arange(-256, 227) / 2 + 0.25, bounds)]


_LARGEST = 12
"""Largest exponent: 2^12 either way is far beyond any outlier, and far from float16's limits for weights."""


def powers_of_two(factors: Tensor) -> Tensor:
    """Return the nearest powers of two (in the logarithm), of magnitude 2^-12 to 2^12; ``factors`` are positive."""
    return torch.exp2(factors.log2().round().clamp(-_LARGEST, _LARGEST))
