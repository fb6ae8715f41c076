"""The one loop that learns quantized weights: a block's, a whole model's, against whatever loss a caller has.

Adam on the weights' own parameters, everything else in the model frozen; the learning rate rises for a few steps and then
falls linearly to almost zero.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from quantkit.errors import CalibrationError
from quantkit.qtensor import GridTensor

_WARM_STEPS = 3
_BETAS, _EPS = (0.9, 0.95), 1e-12


class Learnable(Protocol):
    """A quantized weight while it is learned, standing in the model where the weight was."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """Return what Adam changes."""

    def begin(self, factor: float) -> None:
        """Get ready for a step at ``factor`` times the highest rates; what learns in its backward pass uses that."""

    def refresh(self) -> None:
        """Compute the weight anew after a step has changed the parameters."""

    def result(self) -> GridTensor:
        """Return what has been learned."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """How long is learned, and how fast.

    Attributes:
        steps: number of updates.
        rate: Adam's highest learning rate.
        diverged: what to say when the loss is not finite: what it is, and a way out.
    """

    steps: int
    rate: float
    diverged: str


def train(
    model: nn.Module,
    weights: Iterable[Learnable],
    loss: Callable[[int], float],
    schedule: Schedule,
    report: Callable[[int, float], None] = lambda step, value: None,
) -> tuple[float, ...]:
    """Learn ``weights``, which stand in ``model`` already; every other parameter is frozen meanwhile.

    Args:
        model: requires gradients afterwards where it did before.
        weights: what is learned; :meth:`Learnable.result` has the outcome afterwards.
        loss: step number to the loss before that step; adds the loss's gradient to the parameters of the weights.
        schedule: steps and rate.
        report: called after each step with the number of finished steps and the loss.

    Returns:
        The loss before each step.

    Raises:
        CalibrationError: if a loss is not finite.
    """
    learned = list(weights)
    parameters = [parameter for weight in learned for parameter in weight.parameters()]
    own = {id(parameter) for parameter in parameters}
    frozen = [parameter for parameter in model.parameters() if parameter.requires_grad and id(parameter) not in own]
    optimizer = torch.optim.Adam(parameters, lr=schedule.rate, betas=_BETAS, eps=_EPS)
    losses: list[float] = []
    for parameter in frozen:
        parameter.requires_grad_(False)
    try:
        with torch.enable_grad():
            for step in range(schedule.steps):
                factor = rise_and_fall(step, schedule.steps)
                for weight in learned:
                    weight.begin(factor)
                losses.append(loss(step))
                if not math.isfinite(losses[-1]):
                    raise CalibrationError(schedule.diverged)
                optimizer.param_groups[0]["lr"] = schedule.rate * factor
                optimizer.step()
                optimizer.zero_grad()
                for weight in learned:
                    weight.refresh()
                report(step + 1, losses[-1])
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)
    return tuple(losses)


def rise_and_fall(step: int, steps: int) -> float:
    """Return the factor of the learning rate at ``step`` of ``steps``: a short rise, then a straight line to almost zero."""
    return min(1.0, (step + 1) / _WARM_STEPS) * (1 - step / steps)
