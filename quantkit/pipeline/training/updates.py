"""AdamW on what trainable layers learn: rates in steps of their grids, and scales that take their weights along."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from quantkit.nn.fake import FakeModule
from quantkit.numerics import grid
from quantkit.numerics.fake import whole_scale_gradient
from quantkit.pipeline.training.settings import Training

_BETAS, _EPS = (0.9, 0.95), 1e-12


class Updates:
    """Updates of some layers, whose gradients somebody else computes.

    Args:
        layers: the stand-ins; what they learn requires gradients from then on.
        training: the rates.
    """

    def __init__(self, layers: Iterable[FakeModule], training: Training) -> None:
        self.layers, self.training = list(layers), training
        groups = [group for layer in self.layers for group in _groups(layer, training)]
        self._rates = [group["lr"] for group in groups]
        self.parameters: list[Tensor] = [parameter for group in groups for parameter in group["params"]]
        self.optimizer = torch.optim.AdamW(groups, betas=_BETAS, eps=_EPS, fused=True)

    def carry_out(self, factor: float) -> None:
        """Change what is learned along its gradients, at ``factor`` times the highest rates, and forget them."""
        scales = self._move_along()
        if self.training.clip:
            torch.nn.utils.clip_grad_norm_(self.parameters, self.training.clip, foreach=True)
        for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * factor
        self.optimizer.step()
        for layer, scale in scales:
            layer.weight.data.mul_(grid.expand(layer.scale.detach() / scale, layer.spec, layer.shape))
        self.optimizer.zero_grad()

    def _move_along(self) -> list[tuple[FakeModule, Tensor]]:
        """Give learned scales the gradient they have if weights move along; return their layers and present values.

        Layers with adapters need neither: what they round is made of the scales.
        """
        learned = [layer for layer in self.layers if layer.tied_to is None and layer.adapter_in is None]
        found = [layer for layer in learned if layer.scale.grad is not None]
        for layer in found:
            assert layer.scale.grad is not None
            assert layer.weight.grad is not None
            layer.scale.grad = whole_scale_gradient(
                layer.scale.grad, layer.weight.grad, layer.weight.detach(), layer.scale.detach(), layer.spec
            )
        return [(layer, layer.scale.detach().clone()) for layer in found]


def rise_and_fall(step: int, steps: int, warm_steps: int) -> float:
    """Return the factor of the rates at ``step`` of ``steps``: a straight rise, then half a cosine down to almost zero."""
    if step < warm_steps:
        return (step + 1) / (warm_steps + 1)
    rest = max(1, steps - warm_steps)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warm_steps) / rest)))


def _groups(layer: FakeModule, training: Training) -> list[dict[str, Any]]:
    """Return what AdamW changes of a layer, each with its rate: a share of the layer's mean step."""
    if layer.tied_to is not None:
        return []
    scale = float(layer.scale.detach().abs().mean())
    step = scale if layer.global_scale is None else scale / float(layer.global_scale.mean())
    parts: list[tuple[Any, float, float]] = [(layer.weight, training.rate * step, training.weight_decay)]
    if layer.adapter_in is not None:  # both count in steps of the grid: an update moves a weight by about the rate
        own = training.rate * layer.adapter_in.shape[-2] ** -0.5
        parts = [(layer.adapter_out, training.rate, training.weight_decay), (layer.adapter_in, own, training.weight_decay)]
    if layer.learns_scale:
        parts.append((layer.scale, training.scale_rate * scale, 0.0))
    if isinstance(layer.zero_point, nn.Parameter):
        parts.append((layer.zero_point, training.rate, 0.0))
    if layer.input_scale is not None:
        parts.append((layer.input_scale, training.scale_rate * float(layer.input_scale.detach().abs().mean()), 0.0))
    for parameter, _, _ in parts:
        parameter.requires_grad_(True)
    return [{"params": [parameter], "lr": rate, "weight_decay": decay} for parameter, rate, decay in parts]


def order_of(count: int, seed: int, round_: int) -> list[int]:
    """Return the order of so many windows in a round through them."""
    order: list[int] = torch.randperm(count, generator=torch.Generator().manual_seed(seed * 1_000_003 + round_)).tolist()
    return order


def seen(training: Training, windows: Sequence[Tensor], steps: int | None = None) -> list[Tensor]:
    """Return the windows that so many steps, or all, take from the text, in the order of the first round through it."""
    order = order_of(len(windows), training.seed, 0)
    return [windows[i] for i in order[: (steps or training.steps) * training.windows]]
