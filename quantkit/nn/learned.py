r"""Quantized weights that are being learned: stand-ins for ``QuantLinear`` and ``QuantWeight`` while a model is tuned.

Zero points stay; every block of weights has one unknown, the relative change :math:`\theta` of its scale,

.. math:: W = (q - z)\, s\, (1 + \theta), \qquad
    \frac{\partial L}{\partial \theta} = s \sum_{\text{block}} (q - z) \odot \frac{\partial L}{\partial W},
    \qquad \frac{\partial L}{\partial W} = \Big(\frac{\partial L}{\partial y}\Big)^T x

The gradient of W is reduced to the gradient of :math:`\theta` layer by layer in the backward pass and never kept. The weight is
computed from scales rounded to their stored dtype, so what is learned is what will be stored (the rounding itself counts as
the identity in the gradient). A relative unknown makes one learning rate fit all layers.

Codes may be learned too: each has a drift, how far it wants to be from where it is, in steps of the grid. Every backward pass
moves the drift by ``code_rate`` against the sign of its weight's gradient (signed gradient descent as in SignRound, Cheng et
al. 2023, arXiv 2309.05516), and a code follows once the drift exceeds one half. A gradient without a clear sign makes the drift
wander around zero, so that only codes that many windows agree on change. Given the float weight, the drift begins with half of
what rounding took from it: weights half-way between two codes change first, and codes whose gradients agree do not all jump at
once. (Over the steps of one block that is better; over few noisy steps of a whole model it was worse.)
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from quantkit.errors import SpecError
from quantkit.kernels.functions.learning import drift_levels, expand_groups, reduce_groups, settle_levels
from quantkit.nn.sites import Site
from quantkit.numerics import grid
from quantkit.numerics.inputs import InputQuantizer
from quantkit.qtensor import GridTensor
from quantkit.spec import ActivationSpec

_SHARE, _LARGEST_DRIFT = 0.5, 0.49
"""Which part of what rounding took a drift begins with, and where it may begin: short of one half, where a code follows."""


class TunedWeight(nn.Module):
    """The weight of one site with learnable scales.

    Args:
        qtensor: where learning starts, (out, in) or (experts, out, in).
        dtype: dtype that products run in.
        code_rate: how far one backward pass may move the drift of a code, in steps of the grid; 0 leaves the codes alone.
        activation: what inputs are rounded to, dynamically; None leaves them alone.
        origin: the float weight, to begin the codes' drift with; None begins with none.

    Attributes:
        change: theta, float32 of the scale's shape; the only parameter.
        weight: the weight for the present ``change``; :meth:`refresh` computes it anew.
    """

    def __init__(
        self,
        qtensor: GridTensor,
        dtype: torch.dtype,
        *,
        code_rate: float = 0.0,
        activation: ActivationSpec | None = None,
        origin: Tensor | None = None,
    ) -> None:
        super().__init__()
        if qtensor.spec.offset:
            raise SpecError(f"weights {qtensor.spec.describe()} are only read, and cannot be trained; start from a float model")
        self.spec, self.shape, self.inputs = qtensor.spec, qtensor.shape, InputQuantizer(activation)
        rows, cols = grid.block_size(qtensor.spec, qtensor.shape)
        *lead, out, features = qtensor.shape
        self.split = (*lead, out // rows, rows, features // cols, cols)
        integer = torch.int8 if qtensor.spec.bits < 8 else torch.int16
        self.zero_point, self.start = qtensor.zero_point, qtensor.scale.float()
        middle = torch.full_like(qtensor.scale, grid.zero_code(qtensor.spec)) if self.zero_point is None else self.zero_point
        self.low = -middle.to(torch.int16).contiguous()  # level of code 0
        levels = qtensor.codes().to(integer).view(self.split)
        levels += self.low[..., :, None, :, None].to(integer)
        self.low = self.low.to(integer)
        self.levels = levels
        self.drift = torch.zeros_like(levels, dtype=torch.float16) if code_rate > 0 else None
        if self.drift is not None and origin is not None:
            exact = origin.float().view(self.split) / self.start[..., :, None, :, None]
            self.drift.copy_(((exact - levels) * _SHARE).clamp_(-_LARGEST_DRIFT, _LARGEST_DRIFT))
        self.code_rate = self.highest_code_rate = code_rate
        self.change = nn.Parameter(torch.zeros_like(self.start))
        self.weight = torch.empty(qtensor.shape, dtype=dtype, device=levels.device)
        self.refresh()

    def scale(self) -> Tensor:
        """Return the present scales in the dtype they are stored in."""
        return grid.round_scale(self.start * (1 + self.change.detach()), self.spec.scale_dtype)

    def result(self) -> GridTensor:
        """Return what has been learned."""
        codes = (self.levels - self.low[..., :, None, :, None]).to(torch.uint8).view(self.shape)
        return GridTensor.from_codes(codes, self.scale(), self.zero_point, self.spec)

    def begin(self, factor: float) -> None:
        """Let the backward passes to come move drifts by ``factor`` times the highest ``code_rate``."""
        self.code_rate = self.highest_code_rate * factor

    def refresh(self) -> None:
        """Let codes follow their drift and compute :attr:`weight` anew; call it after every step."""
        if self.drift is not None:
            settle_levels(self.levels, self.drift, self.low, 2**self.spec.bits - 1)
        expand_groups(self.levels, self.scale().float(), self.weight.view(self.split))

    def matmul(self, x: Tensor, expert: int | None = None) -> Tensor:
        """Return ``x @ w.T`` (``x @ w[expert].T``) for x (..., in); the gradient reaches x and :attr:`change`."""
        change = self.change if expert is None else self.change[expert]
        return _Product.apply(self.inputs(x), change, self, expert)  # type: ignore[no-any-return, no-untyped-call]


class TunedLinear(nn.Module):
    """A linear layer around a :class:`TunedWeight`: ``y = x @ w.T + bias``."""

    def __init__(self, weight: TunedWeight, bias: Tensor | None) -> None:
        super().__init__()
        self.tuned, self.bias = weight, bias

    def forward(self, x: Tensor) -> Tensor:
        """Return (..., out) for x (..., in)."""
        y = self.tuned.matmul(x)
        return y if self.bias is None else y + self.bias.to(y.dtype)


@contextlib.contextmanager
def substituted(model: nn.Module, weights: Mapping[Site, TunedWeight]) -> Iterator[None]:
    """Put learnable weights where the float or quantized ones of these sites are; put those back afterwards."""
    undo: list[Callable[[], None]] = []
    try:
        for site, weight in weights.items():
            owner = model.get_submodule(site.module)
            if len(site.shape) == 3:
                undo.append(_replace_parameter(owner, site.parameter, weight))
                continue
            parent, _, name = site.module.rpartition(".")
            undo.append(functools.partial(setattr, model.get_submodule(parent), name, owner))
            setattr(model.get_submodule(parent), name, TunedLinear(weight, getattr(owner, "bias", None)))
        yield
    finally:
        for put_back in reversed(undo):
            put_back()


def _replace_parameter(owner: nn.Module, name: str, weight: TunedWeight) -> Callable[[], None]:
    """Put ``weight`` where a stack of experts, a parameter or a module, is; returns what undoes it."""
    stacks: dict[str, Any] = owner._parameters if name in owner._parameters else owner._modules
    before, places = stacks[name], list(stacks)
    if stacks is owner._modules:
        stacks[name] = weight
        return functools.partial(stacks.__setitem__, name, before)
    del stacks[name]
    owner.add_module(name, weight)

    def undo() -> None:
        del owner._modules[name]
        after = places[places.index(name) + 1 :]
        stacks[name] = before
        for later in after:  # parameters keep their order
            stacks[later] = stacks.pop(later)

    return undo


class _Product(torch.autograd.Function):
    """``x @ w.T`` whose backward reduces the gradient of the weight to that of its scales."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, change: Tensor, owner: TunedWeight, expert: int | None) -> Tensor:
        weight = owner.weight if expert is None else owner.weight[expert]
        rounded = x.to(weight.dtype)
        ctx.save_for_backward(rounded)
        ctx.owner, ctx.expert, ctx.dtype = owner, expert, x.dtype
        return rounded @ weight.T

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, Tensor, None, None]:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        owner, expert = ctx.owner, ctx.expert
        weight, levels, start = owner.weight, owner.levels, owner.start
        if expert is not None:
            weight, levels, start = weight[expert], levels[expert], start[expert]
        by_weight = slope.flatten(0, -2).T @ x.flatten(0, -2)
        if owner.drift is not None:
            drift = owner.drift if expert is None else owner.drift[expert]
            drift_levels(drift, by_weight.view(drift.shape), owner.code_rate)
        by_scale = reduce_groups(levels, by_weight.view(levels.shape))
        by_input = (slope @ weight).to(ctx.dtype) if ctx.needs_input_grad[0] else None
        return by_input, by_scale * start, None, None
