"""Logits as the engine draws from them."""

from collections.abc import Sequence

from torch import Tensor

from quantkit.engine.sampling import History, Sampling, penalize
from quantkit.kernels.functions.sampling import Draw, shape


def shape_logits(logits: Tensor, samplings: Sequence[Sampling], histories: Sequence[History] | None = None) -> Tensor:
    """Return float32 (rows, vocabulary): the softmax of a row is the distribution drawn from."""
    return shape(penalize(logits, samplings, histories), Draw.of(samplings, [0] * len(samplings), logits.device))
