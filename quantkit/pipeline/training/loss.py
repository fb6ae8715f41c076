r"""What a model that is being trained should come closer to, and the gradient of that.

.. math:: L = (1 - a)\, KL(P \| Q) + a\, (-\log Q_{next}), \qquad
    \frac{\partial L}{\partial q} = Q - (1 - a) P - a\, e_{next}

averaged over tokens: P is the float model's prediction, Q the trained model's from logits q, and a the share of the text's own
next token. The last token of a window has no next one and counts with P alone. With a share h, outputs x of the blocks are
compared with those of the float model, x', too:

.. math:: (1 - h) L + h \operatorname{mean} \|x - x'\|^2 / \|x'\|^2

over blocks and tokens; dividing keeps the few tokens with enormous activations from deciding everything. Gradients are taken
window by window, so that the logits of few windows are in memory at a time, whatever the size of a step.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quantkit.nn.hooks import outputs_of
from quantkit.pipeline.training.teacher import Teacher
from quantkit.system.compute import evaluation_mode

_TILE = 1 << 22
"""Logits worked on at a time, so that the temporaries stay small."""


@dataclass(frozen=True, slots=True)
class Losses:
    """Means over tokens; NaN where not asked for.

    Attributes:
        kl: divergence from the float model, in nats.
        nll: negative log likelihood of the next token, in nats.
        hidden: squared distance of blocks' outputs from the float model's, relative to those.
    """

    kl: float
    nll: float
    hidden: float = float("nan")

    def total(self, next_token_share: float, hidden_share: float = 0.0) -> float:
        """Return what is minimised."""
        kl = (1 - next_token_share) * self.kl if next_token_share < 1 else 0.0
        nll = next_token_share * self.nll if next_token_share > 0 else 0.0
        return (1 - hidden_share) * (kl + nll) + (hidden_share * self.hidden if hidden_share else 0.0)


@dataclass(frozen=True, slots=True)
class Objective:
    """The loss of a model on windows of token ids.

    Attributes:
        teacher: what the float model says; None without a divergence.
        next_token_share: a, see the module.
        together: windows per forward.
        hidden_share: h, see the module.
        blocks: paths of the blocks whose outputs are compared, if h is not 0.
    """

    teacher: Teacher | None
    next_token_share: float
    together: int
    hidden_share: float = 0.0
    blocks: tuple[str, ...] = ()

    def total(self, losses: Losses) -> float:
        """Return what is minimised."""
        return losses.total(self.next_token_share, self.hidden_share)

    def add_gradient(self, model: nn.Module, windows: Sequence[Tensor]) -> Losses:
        """Add the gradient of the mean loss over windows (T,) to the parameters of ``model``; return the losses before it."""
        return self._over(model, windows, backward=True)

    def evaluate(self, model: nn.Module, windows: Sequence[Tensor]) -> Losses:
        """Return the losses on windows (T,) as they are, both of them."""
        with evaluation_mode(model):
            return self._over(model, windows, backward=False)

    def _over(self, model: nn.Module, windows: Sequence[Tensor], *, backward: bool) -> Losses:
        tokens = sum(len(row) for row in windows)
        kl, nll, hidden, targets = 0.0, 0.0, 0.0, 0
        for ids in by_length(windows, self.together):
            with outputs_of(model, self.blocks) as outputs:
                logits = model(input_ids=ids, use_cache=False).logits
            flat, next_ids = logits.detach().flatten(0, 1), F.pad(ids[:, 1:], (0, 1), value=-1).flatten()
            slope, wanted = torch.zeros_like(flat), list[Tensor]()
            if self.teacher is not None:
                divergence, by_logits, wanted = self.teacher.divergence(flat, ids)
                kl += divergence
                slope = by_logits.mul_(1 - self.next_token_share) if self.next_token_share else by_logits
            if self.next_token_share or not backward:
                nll += _next_token(flat, next_ids, slope, self.next_token_share)
                targets += int((next_ids >= 0).sum())
            slope = slope.mul_((1 - self.hidden_share) / tokens) if self.hidden_share else slope / tokens
            away = _distances(outputs, wanted, self.hidden_share / tokens)
            hidden += sum(distance for distance, _ in away) / max(1, len(away))
            if backward:
                slopes = [slope.view_as(logits), *(by_output for _, by_output in away)]
                torch.autograd.backward([logits, *outputs], slopes)
        nan = float("nan")
        return Losses(
            kl / tokens if self.teacher is not None else nan,
            nll / targets if targets else nan,
            hidden / tokens if self.hidden_share else nan,
        )


def _distances(outputs: Sequence[Tensor], wanted: Sequence[Tensor], share: float) -> list[tuple[float, Tensor]]:
    """Return for every block the summed relative squared distance over tokens, and ``share`` times its mean's gradient."""
    found = []
    for output, target in zip(outputs, wanted, strict=True):
        difference, size = output.detach().float() - target.float(), target.float().square().sum(-1, keepdim=True)
        slope = difference / size.clamp(min=1e-30)
        distance = float((slope * difference).sum(dtype=torch.float64))
        found.append((distance, slope.mul_(2 * share / len(outputs)).to(output.dtype)))
    return found


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


def by_length(windows: Sequence[Tensor], together: int) -> list[Tensor]:
    """Return windows as tensors (B, T) of up to ``together`` of equal length."""
    found: list[list[Tensor]] = []
    for row in windows:
        if found and len(found[-1]) < together and len(found[-1][0]) == len(row):
            found[-1].append(row)
        else:
            found.append([row])
    return [torch.stack(rows) for rows in found]
