r"""SmoothQuant: move part of the activations' outliers into the weights.

.. math:: s_j = \frac{\max |x_j|^{\alpha}}{\max_i |W_{ij}|^{1 - \alpha}}

(Xiao, Lin, Seznec, Wu, Demouth, Han 2023, arXiv 2211.10438, equation 4). A channel that is a hundred times larger than the
others leaves them a hundredth of a token's 8-bit range; after the transform with :math:`\alpha = 1/2` weights and activations
share it evenly. Useful where activations are quantized; sites with float activations are left alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from quantkit.errors import SpecError
from quantkit.spec import Scheme
from quantkit.transforms.base import TRANSFORMS, Statistics


@TRANSFORMS.register("smoothquant")
@dataclass(frozen=True)
class SmoothQuant:
    """Even out activations and weights.

    Args:
        alpha: how much of the difference goes into the weights, 0 to 1.
    """

    alpha: float = 0.5
    needs: ClassVar[tuple[str, ...]] = ("abs_max",)

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise SpecError(f"smoothquant: alpha={self.alpha}; want 0 to 1")

    def factors(self, weights: Sequence[Tensor], schemes: Sequence[Scheme], statistics: Statistics) -> Tensor:
        """See :class:`quantkit.transforms.base.Transform`."""
        largest_x = statistics.results["abs_max"].float()
        if all(scheme.activation is None for scheme in schemes):
            return torch.ones_like(largest_x)
        largest_w = torch.stack([weight.abs().amax(0) for weight in weights]).amax(0)
        s = largest_x**self.alpha / largest_w ** (1 - self.alpha)
        return torch.where((largest_x > 0) & (largest_w > 0), s, torch.ones_like(s))
