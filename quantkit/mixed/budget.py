"""Budgets: how large, how slow or how far from the float model a quantized model may be.

| written | means |
|---|---|
| ``4.25 bpw`` | bits per weight of the layers that are searched, as files count: codes, scales, zero points, padding |
| ``300 MB``, ``280 MiB``, ``1.5 GB``, ``40000000 bytes`` | everything in the checkpoint's directory |
| ``20 ms``, ``0.02 s`` | time to decode one token |
| ``50 tok/s`` | the same, the other way round |
| ``0.05 kl`` | mean KL divergence from the float model, in nats per token |
"""

import math
import re
from dataclasses import dataclass
from typing import Literal

from quantkit.errors import SpecError, nearest

Kind = Literal["bits", "bytes", "ms", "kl"]

UNITS: dict[str, tuple[Kind, float]] = {
    "bpw": ("bits", 1.0),
    "bytes": ("bytes", 1.0),
    "kB": ("bytes", 1e3),
    "KiB": ("bytes", 2.0**10),
    "MB": ("bytes", 1e6),
    "MiB": ("bytes", 2.0**20),
    "GB": ("bytes", 1e9),
    "GiB": ("bytes", 2.0**30),
    "ms": ("ms", 1.0),
    "s": ("ms", 1e3),
    "tok/s": ("ms", 0.0),
    "kl": ("kl", 1.0),
}
"""Unit to what it limits, and how much of that one is."""

_WRITTEN = re.compile(r"\s*(?P<number>\d+(?:\.\d+)?(?:[eE][+-]?\d{1,3})?)\s*(?P<unit>[A-Za-z/]+)\s*")


@dataclass(frozen=True, slots=True)
class Budget:
    """An upper bound.

    Attributes:
        kind: what it limits: ``"bits"`` per weight, ``"bytes"`` of the checkpoint, ``"ms"`` per token, ``"kl"`` in nats.
        limit: the bound, in that unit.

    Raises:
        SpecError: a bound that is no positive number.
    """

    kind: Kind
    limit: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.limit) and self.limit > 0):
            raise SpecError(f"budget of {self.limit} {self.kind}: want a positive number")

    @classmethod
    def parse(cls, text: "str | Budget") -> "Budget":
        """Return the budget that a text such as ``"4.25 bpw"`` means; see the module.

        Raises:
            SpecError: no number, or an unknown unit.
        """
        if isinstance(text, Budget):
            return text
        match = _WRITTEN.fullmatch(text) if isinstance(text, str) and len(text) < 64 else None
        if match is None:
            raise SpecError(
                f"budget {text!r}: want a number and a unit, such as '4.25 bpw', '300 MB', '20 ms', '50 tok/s', '0.05 kl'"
            )
        number, unit = float(match["number"]), match["unit"]
        if unit not in UNITS:
            folded = {known.lower(): known for known in UNITS}
            known = folded.get(unit.lower())
            way_out = f"did you mean {known!r}?" if known else nearest(unit, UNITS)
            way_out = "did you mean 'bpw'?" if "bit" in unit.lower() else way_out
            raise SpecError(f"budget {text!r}: unknown unit {unit!r}; {way_out}")
        kind, size = UNITS[unit]
        if not number:
            raise SpecError(f"budget {text!r}: want a positive number")
        return cls(kind, 1e3 / number if unit == "tok/s" else number * size)

    def __str__(self) -> str:
        if self.kind == "bytes":
            return f"{self.limit / 1e6:.12g} MB"
        return f"{self.limit:.6g} {({'bits': 'bpw'}).get(self.kind, self.kind)}"
