"""The table of code dtypes. Integer codes are unsigned, 0 .. 2^bits - 1; the zero point says which code means 0.0."""

from dataclasses import dataclass
from typing import Final

import torch


@dataclass(frozen=True, slots=True)
class CodeDtype:
    """One storable number format: ``bits`` per code and the number of distinct ``levels``."""

    name: str
    bits: int

    @property
    def levels(self) -> int:
        """Number of distinct codes."""
        return 1 << self.bits


DTYPES: Final[dict[str, CodeDtype]] = {f"int{bits}": CodeDtype(f"int{bits}", bits) for bits in range(2, 9)}
"""Every dtype a :class:`quantkit.spec.QuantSpec` may name."""

SCALE_DTYPES: Final[dict[str, torch.dtype]] = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
}
"""Every dtype a scale may be stored in."""
