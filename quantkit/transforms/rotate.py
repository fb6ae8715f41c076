r"""Rotation: replace channels by mixtures of all of them, in which no single one is an outlier.

For an orthogonal Q, :math:`W x = (W Q)(Q^T x)`. If everything that writes a tensor and everything that reads it turns with it,
the model computes what it did, but a value that stood in one channel is spread over all (Ashkboos et al. 2024, QuaRot, arXiv
2404.00456, section 4; Liu et al. 2024, SpinQuant, arXiv 2405.16406, whose R1 and R2 these are):

- the residual stream: embedding, output head, and every linear layer that writes to it or reads it through a norm. The norms'
  gains move into the layers that follow them first, because a gain per channel does not commute with a rotation;
- the values of each head, between the value and the output projection.

Both become part of the weights, so any program runs the checkpoint as it ran the original. A tied head is parted from the
embedding, which it no longer equals: the model grows by one table. The inputs of the MLP's second layer, behind a
non-linearity, would need a rotation at run time and stay as they are.

Q is a Hadamard matrix with random signs (:mod:`quantkit.numerics.hadamard`). :mod:`quantkit.rotation` finds the places, tries,
and undoes everything for a model whose logits change: norms with a mean or after the layers, experts, positions that are added.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from quantkit.numerics.hadamard import random_hadamard
from quantkit.spec import Scheme
from quantkit.transforms.base import TRANSFORMS, Statistics


@TRANSFORMS.register("rotate")
@dataclass(frozen=True)
class Rotate:
    """Rotate the residual stream and the values of the heads.

    Args:
        values: also rotate the values of every head.
        seed: of the random signs.
    """

    values: bool = True
    seed: int = 0
    needs: ClassVar[tuple[str, ...]] = ()

    def factors(self, weights: Sequence[Tensor], schemes: Sequence[Scheme], statistics: Statistics) -> Tensor:
        """Return ones: a rotation scales nothing."""
        return torch.ones(weights[0].shape[1])

    def rotation(self, size: int) -> Tensor:
        """Return the orthogonal matrix of ``size`` channels, float64."""
        return random_hadamard(size, self.seed)
