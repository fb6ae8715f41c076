r"""What a model that is being trained should come closer to, and the gradient of that.

.. math:: L = (1 - a)\, KL(P \| Q) + a\, (-\log Q_{next}), \qquad
    \frac{\partial L}{\partial q} = Q - (1 - a) P - a\, e_{next}

averaged over tokens: P is the float model's prediction, Q the trained model's from logits q, and a the share of the text's own
next token. The last token of a window has no next one and counts with P alone. Gradients are taken window by window, so that
the logits of few windows are in memory at a time, whatever the size of a step.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quantkit.kernels.functions.learning import divergence_gradient
from quantkit.system.compute import evaluation_mode

_TILE = 1 << 22
"""Logits worked on at a time, so that the temporaries stay small."""


@dataclass(frozen=True, slots=True)
class Losses:
    """Means over tokens, in nats: divergence from the float model, and of the next token; NaN where not asked for."""

    kl: float
    nll: float

    def total(self, next_token_share: float) -> float:
        """Return what is minimised."""
        kl = (1 - next_token_share) * self.kl if next_token_share < 1 else 0.0
        nll = next_token_share * self.nll if next_token_share > 0 else 0.0
        return kl + nll


@dataclass(frozen=True, slots=True)
class Objective:
    """The loss of a model on windows of token ids.

    Attributes:
        teacher: the float model; None without a divergence.
        next_token_share: a, see the module.
        together: windows per forward.
    """

    teacher: nn.Module | None
    next_token_share: float
    together: int

    def add_gradient(self, model: nn.Module, windows: Sequence[Tensor]) -> Losses:
        """Add the gradient of the mean loss over windows (T,) to the parameters of ``model``; return the losses before it."""
        return self._over(model, windows, backward=True)

    def evaluate(self, model: nn.Module, windows: Sequence[Tensor]) -> Losses:
        """Return the losses on windows (T,) as they are, both of them."""
        with evaluation_mode(model):
            return self._over(model, windows, backward=False)

    def _over(self, model: nn.Module, windows: Sequence[Tensor], *, backward: bool) -> Losses:
        tokens = sum(len(row) for row in windows)
        kl, nll, targets = 0.0, 0.0, 0
        for ids in _batches(windows, self.together):
            logits = model(input_ids=ids, use_cache=False).logits
            flat, next_ids = logits.detach().flatten(0, 1), F.pad(ids[:, 1:], (0, 1), value=-1).flatten()
            slope = torch.zeros_like(flat)
            if self.teacher is not None:
                with torch.no_grad():
                    wanted = self.teacher(input_ids=ids, use_cache=False).logits.to(flat.dtype).flatten(0, 1)
                divergence, by_logits = divergence_gradient(flat, wanted)
                kl += divergence
                slope = by_logits.mul_(1 - self.next_token_share) if self.next_token_share else by_logits
            if self.next_token_share or not backward:
                nll += _next_token(flat, next_ids, slope, self.next_token_share)
                targets += int((next_ids >= 0).sum())
            if backward:
                logits.backward((slope / tokens).view_as(logits))
        return Losses(kl / tokens if self.teacher is not None else float("nan"), nll / targets if targets else float("nan"))


def _next_token(logits: Tensor, targets: Tensor, slope: Tensor, share: float) -> float:
    """Return the summed negative log likelihood of targets (rows,), -1 for none; add its gradient times ``share`` to slope."""
    total, rows = 0.0, max(1, _TILE // logits.shape[-1])
    for start in range(0, len(logits), rows):
        part = slice(start, start + rows)
        known = (targets[part] >= 0).nonzero().squeeze(-1)
        log_q, wanted = logits[part][known].float().log_softmax(-1), targets[part][known].unsqueeze(-1)
        total -= float(log_q.gather(-1, wanted).sum(dtype=torch.float64))
        if share:
            by_logits = log_q.exp_().scatter_add_(-1, wanted, torch.full_like(wanted, -1, dtype=log_q.dtype))
            slope[part] = slope[part].index_add(0, known, by_logits.mul_(share).to(slope.dtype))
    return total


def _batches(windows: Sequence[Tensor], together: int) -> list[Tensor]:
    """Return windows as tensors (B, T) of up to ``together`` of equal length."""
    found: list[list[Tensor]] = []
    for row in windows:
        if found and len(found[-1]) < together and len(found[-1][0]) == len(row):
            found[-1].append(row)
        else:
            found.append([row])
    return [torch.stack(rows) for rows in found]
