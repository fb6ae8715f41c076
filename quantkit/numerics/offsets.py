"""Zero points and offsets: two ways to say where a grid's zero lies, ``(code - z) * s`` and ``code * s + o``, ``o = -z * s``.

Zero points are codes; offsets are floats, which some writers choose freely (MLX, the minimums of ggml's blocks). The two mean
the same numbers only where the product is exact.
"""

import torch
from torch import Tensor


def offsets(scale: Tensor, zero_point: Tensor | int) -> Tensor | None:
    """Return ``-zero_point * scale`` in the dtype of ``scale``; None if that is not exact."""
    points = zero_point.double() if isinstance(zero_point, Tensor) else zero_point
    exact = -(points * scale.double())
    return rounded if torch.equal((rounded := exact.to(scale.dtype)).double(), exact) else None


def zero_points(scale: Tensor, offset: Tensor, bits: int) -> Tensor | None:
    """Return the uint8 zero points of which ``offset`` are exactly the products with ``scale``; None if there are none."""
    wide = scale.double()
    if not bool((wide != 0).all()) or not bool(torch.isfinite(wide).all()):
        return None
    points = (-offset.double() / wide).round()
    fits = bool(((points >= 0) & (points < 2**bits)).all()) and torch.equal(-(points * wide), offset.double())
    return points.to(torch.uint8) if fits else None
