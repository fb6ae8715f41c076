"""The steps of training: windows, gradients, AdamW, evaluation; any state between two steps can be written and gone on from.

What a step does follows from its number and the state alone: which windows it takes, the rates, whether it evaluates. Nothing
is drawn at random while it runs (dropout is off), so with the same number of threads on the same machine an interrupted
run ends in the same bytes as one that was not.
"""

import contextlib
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from quantkit.errors import CalibrationError
from quantkit.nn.fake import FakeModule
from quantkit.pipeline.training.loss import Losses, Objective
from quantkit.pipeline.training.settings import Training
from quantkit.pipeline.training.updates import Updates, order_of, rise_and_fall
from quantkit.qtensor import GridTensor
from quantkit.system.progress import Progress, ProgressCallback

Row = tuple[float | None, float | None, float | None]
"""The losses kl, nll and hidden; None for what was not computed."""


@dataclass
class History:
    """What has happened so far, JSON-able.

    Attributes:
        blocks: of every block that was trained by itself, the distance of its output from the float model's before and after.
        steps: (kl, nll, hidden) of every update's windows before it, None for what was not computed.
        evaluations: (updates before it, kl, nll, hidden) on the held-out windows.
        best: position of the best evaluation.
    """

    blocks: list[tuple[float, float]] = field(default_factory=list)
    steps: list[Row] = field(default_factory=list)
    evaluations: list[tuple[int, float | None, float | None, float | None]] = field(default_factory=list)
    best: int = 0

    def facts(self) -> dict[str, Any]:
        """Return what a checkpoint records of its training."""
        return {
            "steps": len(self.steps),
            "best_after": self.evaluations[self.best][0] if self.evaluations else 0,
            "kl": [kl for kl, _, _ in self.steps],
            "nll": [nll for _, nll, _ in self.steps],
            "evaluations": [{"steps": steps, "kl": kl, "nll": nll} for steps, kl, nll, _ in self.evaluations],
            **({"blocks": [list(one) for one in self.blocks]} if self.blocks else {}),
            **({"hidden": [one for _, _, one in self.steps]} if any(one is not None for _, _, one in self.steps) else {}),
        }


class Learner:
    """A model whose stand-ins are being trained, with its optimizer.

    Args:
        model: prepared; everything but weights, scales and zero points of the stand-ins is frozen.
        objective: what to come closer to.
        training: the settings.
        windows: token ids (T,) to train on.
        held_out: token ids (T,) to evaluate on.
    """

    def __init__(
        self, model: nn.Module, objective: Objective, training: Training, windows: Sequence[Tensor], held_out: Sequence[Tensor]
    ) -> None:
        self.model, self.objective, self.training = model, objective, training
        self.windows, self.held_out = windows, held_out
        self.history, self.best = History(), dict[str, GridTensor]()
        self.layers = {name: one for name, one in model.named_modules() if isinstance(one, FakeModule)}
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        self.updates = Updates(self.layers.values(), training)
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}

    @property
    def done(self) -> int:
        """Number of finished updates."""
        return len(self.history.steps)

    @property
    def finished(self) -> bool:
        """Whether nothing is left to be done."""
        found, patience = self.history, self.training.patience
        stopped = bool(patience) and len(found.evaluations) - 1 - found.best >= patience
        return self.done >= self.training.steps or stopped

    def step(self) -> Losses:
        """Make one update; return the losses before it.

        Raises:
            CalibrationError: a loss is not finite.
        """
        factor = rise_and_fall(self.done, self.training.steps, self.training.warm_steps)
        losses = self.objective.add_gradient(self.model, self._windows_of(self.done))
        if not math.isfinite(self.objective.total(losses)):
            raise CalibrationError(
                f"training: the loss of step {self.done + 1} is not finite; use lower rates, or dtype float32"
            )
        self.updates.carry_out(factor)
        self.history.steps.append(_row(losses))
        return losses

    def evaluate(self) -> Losses:
        """Measure the losses on the held-out windows; keep what the model is if it was never better."""
        found, history = self.objective.evaluate(self.model, self.held_out), self.history
        history.evaluations.append((self.done, *_row(found)))
        if len(history.evaluations) == 1 or self._total(len(history.evaluations) - 1) < self._total(history.best):
            history.best = len(history.evaluations) - 1
            self.best = {name: layer.result() for name, layer in self.layers.items() if layer.tied_to is None}
        return found

    def due(self) -> bool:
        """Whether an evaluation is due, and has not been made."""
        last = self.history.evaluations[-1][0] if self.history.evaluations else -1
        return last != self.done and (self.done % self.training.evaluate_every == 0 or self.done >= self.training.steps)

    def tensors(self) -> dict[str, Tensor]:
        """Return everything that changes, by name; the tensors themselves, no copies."""
        found = {f"parameter.{name}": p.detach() for name, p in self.parameters.items()}
        for name, parameter in self.parameters.items():
            for key, value in self.updates.optimizer.state[parameter].items():
                found[f"{key}.{name}"] = value
        for name, qtensor in self.best.items():
            found |= {f"best.{name}.{part}": value for part, value in qtensor.parts().items()}
        return found

    @torch.no_grad()
    def restore(self, tensors: dict[str, Tensor], history: History) -> None:
        """Go on from what :meth:`tensors` returned, and the history."""
        self.history = history
        self.best = {}
        for name, layer in self.layers.items():
            prefix = f"best.{name}."
            parts: dict[str, Any] = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
            if parts:
                whole = {"zero_point": None, "global_scale": None, "input_scale": None} | parts
                self.best[name] = GridTensor(**whole, spec=layer.spec, shape=layer.shape)
        for name, parameter in self.parameters.items():
            parameter.copy_(tensors[f"parameter.{name}"])
            keys = [key for key in ("step", "exp_avg", "exp_avg_sq") if f"{key}.{name}" in tensors]
            self.updates.optimizer.state[parameter] = {key: tensors[f"{key}.{name}"].clone() for key in keys}

    def _windows_of(self, step: int) -> list[Tensor]:
        """Return the windows of a step: the text round after round, each in an order of its own."""
        count, first = len(self.windows), step * self.training.windows
        places = range(first, first + self.training.windows)
        return [self.windows[order_of(count, self.training.seed, at // count)[at % count]] for at in places]

    def _total(self, evaluation: int) -> float:
        _, *losses = self.history.evaluations[evaluation]
        return self.objective.total(Losses(*(float("nan") if one is None else one for one in losses)))


def carry_out(learner: Learner, save: "SaveState", progress: ProgressCallback) -> None:
    """Train until the end, with an evaluation before the first step, every so many, and after the last.

    Args:
        learner: fresh, or restored.
        save: called between steps with the learner when a state is due.
        progress: gets one event per step, with the loss and the speed.
    """
    training, began, first, last_saved = learner.training, time.monotonic(), learner.done, time.monotonic()
    tokens_per_step = training.windows * sum(map(len, learner.windows)) / len(learner.windows)
    with torch.enable_grad():
        while True:
            if learner.due():
                learner.evaluate()
            if learner.finished:
                break
            losses = learner.step()
            speed = (learner.done - first) * tokens_per_step / (time.monotonic() - began)
            _, kl, nll, _ = learner.history.evaluations[learner.history.best]
            best = f"best {kl:.4f}" if kl is not None else f"best {nll:.4f}"
            total = learner.objective.total(losses)
            progress(Progress("train", learner.done, training.steps, f"{best}, {speed:.0f} tokens/s", total))
            if time.monotonic() - last_saved >= training.save_every_s:
                save(learner)
                last_saved = time.monotonic()


class SaveState:
    """Keep nothing: what a run without a place on the disk does between steps."""

    def __call__(self, learner: Learner) -> None:
        """Write the state of ``learner``."""


@contextlib.contextmanager
def narrowed(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Have every parameter that is not trained in ``dtype``, and look-ups of trained tables too; each gets its own back."""
    home = [(parameter, parameter.data) for parameter in model.parameters() if not parameter.requires_grad]
    tables = [(part, part.like) for part in model.modules() if isinstance(getattr(part, "like", None), Tensor)]
    layers = {id(p) for part in model.modules() if isinstance(part, FakeModule) for p in part._parameters.values()}
    for parameter, own in home:
        if own.is_floating_point() and id(parameter) not in layers:
            parameter.data = own.to(dtype)
    for part, like in tables:
        part.like = like.to(dtype)
    try:
        yield
    finally:
        for parameter, own in home:
            parameter.data = own
        for part, like in tables:
            part.like = like


def _row(losses: Losses) -> Row:
    kl, nll, hidden = (one if math.isfinite(one) else None for one in (losses.kl, losses.nll, losses.hidden))
    return kl, nll, hidden
