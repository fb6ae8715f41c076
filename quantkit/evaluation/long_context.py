"""Does a model still read what stands far back: perplexity and divergence by distance from the beginning of one long window.

Windows of an evaluation are short, and a fault that grows with the distance (rounded keys and values, rotary frequencies, a
sliding window) does not show in their average. One window, as long as the text and the model allow, is scored in four parts. A
model that uses its context predicts the last part better than the first; what matters is that it does so as much as its base.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn

from quantkit.errors import CalibrationError
from quantkit.evaluation.quality import score
from quantkit.evaluation.windows import Windows

PARTS: Final = 4


@dataclass(frozen=True, slots=True)
class Stretch:
    """A part of the long window.

    Attributes:
        first, last: positions of its tokens, from 0; ``last`` is not in it any more.
        perplexity: of the model.
        base_perplexity, kl: of the base, and the mean KL divergence from it in nats; None without one.
    """

    first: int
    last: int
    perplexity: float
    base_perplexity: float | None = None
    kl: float | None = None


def by_distance(
    model: nn.Module | Callable[[Tensor], Tensor], base: Any, tokens: Tensor, parts: int = PARTS
) -> tuple[Stretch, ...]:
    """Score one window in parts.

    Args:
        model, base: as for :func:`quantkit.evaluation.quality.score`.
        tokens: int64 (T,), the window.
        parts: number of parts.

    Raises:
        CalibrationError: the window has fewer than two tokens a part.
    """
    if len(tokens) < 2 * parts:
        raise CalibrationError(f"long_context: {len(tokens)} tokens, want at least {2 * parts}; give more text")
    edges = [round(part * len(tokens) / parts) for part in range(parts + 1)]
    rows: list[Stretch] = []
    for first, last in itertools.pairwise(edges):
        scored = torch.zeros(1, len(tokens), dtype=torch.bool)
        scored[0, max(first, 1) : last] = True
        quality = score(model, Windows(tokens[None, :last], scored[:, :last], available=1), base)
        beside = quality.divergence
        rows.append(
            Stretch(
                first,
                last,
                quality.perplexity,
                None if beside is None else beside.base_perplexity,
                None if beside is None else beside.mean,
            )
        )
    return tuple(rows)
