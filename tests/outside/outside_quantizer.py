"""A quantizer in a file of its own: stochastic rounding, up or down with the probability that keeps the average.

An installed package names it in ``[project.entry-points."quantkit.quantizers"]``: ``dice = "outside_quantizer:Dice"``.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.nn.sites import SiteStatistics
from quantkit.numerics import grid
from quantkit.qtensor import GridTensor
from quantkit.quantizers.base import Quantizer
from quantkit.spec import QuantSpec


@dataclass(frozen=True)
class Dice(Quantizer):
    """Round up or down by chance.

    Args:
        seed: of the chance.
    """

    seed: int = 0

    def quantize(
        self, weight: Tensor, spec: QuantSpec, statistics: SiteStatistics | None
    ) -> tuple[GridTensor, tuple[str, ...]]:
        """Quantize ``weight`` (out, in) without calibration."""
        scale, zero = grid.choose_qparams(weight, spec)
        step = scale.float().repeat_interleave(weight.shape[1] // scale.shape[1], 1)
        noise = torch.rand(weight.shape, generator=torch.Generator().manual_seed(self.seed)) - 0.5
        return GridTensor.from_codes(grid.quantize(weight + noise * step, scale, zero, spec), scale, zero, spec), ()
