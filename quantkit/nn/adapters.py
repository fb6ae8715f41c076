r"""Low-rank changes of a weight behind its rounding: what is learned is small, and folded in when codes are made.

With the weight w frozen where it was when its scales were :math:`s_0`, what is rounded is

.. math:: w' = \frac{s}{s_0}\, w + s\, (B A), \qquad A\ (r \times in),\ B\ (out \times r)

(Hu, Shen, Wallis, Allen-Zhu, Li, Wang, Wang, Chen 2021, LoRA, arXiv 2106.09685, with the sum taken before rounding, so that
nothing is left beside the codes). The change is counted in steps of the grid, and both parts move along with a scale that is
learned: its gradient is that of weights that keep their place in the grid, :math:`\sum v\, \partial L / \partial \hat w`. B
begins at zero, so that the first forward sees w itself, bit for bit.

Memory: the optimizer keeps moments of A, B and s alone; w' is computed anew in the backward pass and never kept.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quantkit.numerics import grid
from quantkit.numerics.fake import whole_scale_gradient
from quantkit.spec import QuantSpec

Adapter = tuple[Tensor, Tensor, Tensor]
"""First scales (..., out_blocks, in_blocks), A (..., rank, in) and B (..., out, rank), all float32."""


def new_adapter(shape: tuple[int, ...], rank: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return A (..., rank, in), whose numbers have a variance of 1 / rank, and B (..., out, rank), which is zero."""
    *experts, out, features = shape
    generator = torch.Generator().manual_seed(seed)
    first = torch.randn(*experts, rank, features, generator=generator) * rank**-0.5
    return first, torch.zeros(*experts, out, rank)


def adapted(weight: Tensor, adapter: Adapter, scale: Tensor, global_scale: Tensor | None, spec: QuantSpec) -> Tensor:
    """Return the weight (..., out, in) that is rounded, float32; every expert by itself, so that its bits do not vary."""
    first, inner, outer = adapter
    if weight.dim() > 2:
        parts = zip(weight, first, inner, outer, scale, strict=True)
        wide = [None] * len(weight) if global_scale is None else list(global_scale)
        return torch.stack([adapted(w, (f, a, b), s, g, spec) for (w, f, a, b, s), g in zip(parts, wide, strict=True)])
    shape = tuple(weight.shape)
    with torch.autocast(weight.device.type, enabled=False):
        change = outer.float() @ inner.float()
    kept = weight * grid.expand(scale / first, spec, shape)
    return change.mul_(grid.expand(_step(scale, global_scale), spec, shape)).add_(kept)


@dataclass(frozen=True, slots=True, eq=False)
class Frozen:
    """What an adapted weight is made of beside what is learned.

    Attributes:
        weight: (..., out, in), float32.
        first: its scales at the beginning (..., out_blocks, in_blocks), float32.
        global_scale: (..., 1), or None.
        spec: the grid.
        key: its name for the operators.
    """

    weight: Tensor
    first: Tensor
    global_scale: Tensor | None
    spec: QuantSpec
    key: str

    def whole(self, inner: Tensor, outer: Tensor, scale: Tensor) -> Tensor:
        """Return the weight (..., out, in) that is rounded."""
        return adapted(self.weight, (self.first, inner, outer), scale, self.global_scale, self.spec)


class AdaptedWeight(torch.autograd.Function):
    """What the codes of an adapted weight stand for, in a dtype; see the module."""

    @staticmethod
    def forward(
        ctx: Any, inner: Tensor, outer: Tensor, scale: Tensor, zero: Tensor | None, frozen: Frozen, dtype: torch.dtype
    ) -> Tensor:
        """Round the weight that ``inner`` (..., rank, in), ``outer`` (..., out, rank) and ``scale`` make of the frozen one."""
        ctx.save_for_backward(inner, outer, scale, zero)
        ctx.frozen = frozen
        whole = frozen.whole(inner, outer, scale)
        return torch.ops.quantkit.fake_weight(whole, scale, zero, frozen.global_scale, frozen.key, dtype)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """Compute the weight anew, and bring the gradient through rounding, scale and product."""
        inner, outer, scale, zero = ctx.saved_tensors
        frozen: Frozen = ctx.frozen
        whole = frozen.whole(inner, outer, scale)
        found = torch.ops.quantkit.fake_weight_gradient(slope, whole, scale, zero, frozen.global_scale, frozen.key)
        by_whole, by_scale, by_zero = found
        total = None
        if ctx.needs_input_grad[2]:
            total = whole_scale_gradient(by_scale, by_whole, whole, scale, frozen.spec)
        by_change = by_whole * grid.expand(_step(scale, frozen.global_scale), frozen.spec, tuple(whole.shape))
        with torch.autocast(whole.device.type, enabled=False):
            by_inner, by_outer = outer.transpose(-1, -2) @ by_change, by_change @ inner.transpose(-1, -2)
        return by_inner, by_outer, total, by_zero if ctx.needs_input_grad[3] else None, None, None


def _step(scale: Tensor, global_scale: Tensor | None) -> Tensor:
    return scale if global_scale is None else scale / global_scale.unsqueeze(-1)
