r"""Bias correction: take back what rounding does to the average output.

Rounding errors of a layer do not average out where its inputs have a mean:

.. math:: b \leftarrow b + (W - Q)\, E[x]

(Nagel, van Baalen, Blankevoort, Welling 2019, arXiv 1906.04721, section 4.2, with the mean input from calibration text.) A
layer without a bias keeps none: a checkpoint's readers would not look for it. Nothing is rewritten beforehand; the correction
follows every site's rounding, with the inputs that the quantized layers before it produce.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from quantkit.spec import Scheme
from quantkit.transforms.base import TRANSFORMS, Statistics


@TRANSFORMS.register("bias-correction")
@dataclass(frozen=True)
class BiasCorrection:
    """Correct the biases of quantized layers."""

    needs: ClassVar[tuple[str, ...]] = ()

    def factors(self, weights: Sequence[Tensor], schemes: Sequence[Scheme], statistics: Statistics) -> Tensor:
        """Return ones: it scales nothing."""
        return torch.ones(weights[0].shape[1])
