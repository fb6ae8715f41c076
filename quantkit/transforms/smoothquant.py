r"""SmoothQuant: move part of the activations' outliers into the weights.

.. math:: s_j = \frac{\max |x_j|^{\alpha}}{\max_i |W_{ij}|^{1 - \alpha}}

(Xiao, Lin, Seznec, Wu, Demouth, Han 2023, arXiv 2211.10438, equation 4). A channel that is a hundred times larger than the
others leaves them a hundredth of a token's 8-bit range; after the transform with :math:`\alpha = 1/2` weights and activations
share it evenly. Useful where activations are quantized; layers with float activations are left alone.

Which alpha is best differs from one tensor to the next. ``alpha=None`` tries :data:`CANDIDATES`, and no scaling at all, on a
sample of the inputs, rounds weights and inputs as they will be, and takes what changes the outputs least:

.. math:: \alpha = \arg\min \| Q(W \operatorname{diag}(s))\, Q(\operatorname{diag}(s)^{-1} x) - W x \|^2
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quantkit.errors import SpecError
from quantkit.nn.sites import SiteStatistics
from quantkit.numerics import grid
from quantkit.numerics.grid import powers_of_two
from quantkit.numerics.inputs import InputQuantizer
from quantkit.spec import Scheme
from quantkit.transforms.base import STEPS
from quantkit.transforms.scaling_groups import ChannelScaling

CANDIDATES = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


@STEPS.register("smoothquant")
@dataclass(frozen=True)
class SmoothQuant(ChannelScaling):
    """Even out activations and weights.

    Args:
        alpha: how much of the difference goes into the weights, 0 to 1; None finds it for every tensor.
    """

    alpha: float | None = 0.5

    def __post_init__(self) -> None:
        if self.alpha is not None and not 0 <= self.alpha <= 1:
            raise SpecError(f"smoothquant: alpha={self.alpha}; want 0 to 1, or None to find it")

    @property
    def needs(self) -> tuple[str, ...]:
        """Names of the collectors it wants: samples only to find alpha."""
        return ("abs_max",) if self.alpha is not None else ("abs_max", "samples")

    def factors(self, weights: Sequence[Tensor], schemes: Sequence[Scheme], statistics: SiteStatistics) -> Tensor:
        """See :class:`quantkit.transforms.scaling_groups.ChannelScaling`."""
        largest_x = statistics.results["abs_max"].float()
        if all(scheme.activation is None for scheme in schemes):
            return torch.ones_like(largest_x)
        largest_w = torch.stack([weight.abs().amax(0) for weight in weights]).amax(0)

        def smoothed(alpha: float) -> Tensor:
            s = largest_x**alpha / largest_w ** (1 - alpha)
            return powers_of_two(torch.where((largest_x > 0) & (largest_w > 0), s, torch.ones_like(s)))

        if self.alpha is not None:
            return smoothed(self.alpha)
        x = statistics.results["samples"].float()
        tried = [torch.ones_like(largest_x), *(smoothed(alpha) for alpha in CANDIDATES)]
        return min(tried, key=lambda s: sum(_error(w, scheme, s, x) for w, scheme in zip(weights, schemes, strict=True)))


def _error(weight: Tensor, scheme: Scheme, s: Tensor, x: Tensor) -> float:
    """Return ||Q(W s) Q(x / s) - W x||^2 for rows x (tokens, in); a static grid is taken for one per token."""
    scaled, spec, inputs = weight * s, scheme.weight, x / s
    activation = scheme.activation
    if activation is not None and activation.static:
        activation = replace(activation, grid=replace(activation.grid, block=(1, -1)), dynamic=True)
    quantizer = InputQuantizer(activation)
    stored = quantizer.prepare_weight(scaled)
    qparams = grid.choose_qparams(stored, spec)
    rounded = grid.dequantize(grid.quantize(stored, *qparams, spec), *qparams, spec)
    return float((quantizer(inputs) @ rounded.T - x @ weight.T).square().sum(dtype=torch.float64))
