r"""AWQ: enlarge the weights of important inputs, so that rounding hurts them less.

.. math:: s_j = \Big(\sqrt{E[x_j^2]}\Big)^{\alpha}, \qquad
    \alpha = \arg\min \mathrm{tr}\, (W - Q_s) H (W - Q_s)^T, \quad
    Q_s = \mathrm{round}(W \operatorname{diag}(s)) \operatorname{diag}(s)^{-1}

(Lin, Tang, Tang, Yang, Dang, Han 2024, arXiv 2306.00978, equation 5, with the root mean square in place of the mean magnitude
and the error taken from H = E[x x^T] instead of outputs.) :math:`\alpha` is searched over a grid, one for all layers that read
the tensor; 0 is among the candidates, so the error never grows. The grid of each candidate is the one weighted by importance.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from quantkit.kernels.functions import rounding
from quantkit.nn.sites import SiteStatistics
from quantkit.numerics import grid
from quantkit.numerics.grid import powers_of_two
from quantkit.spec import Scheme
from quantkit.transforms.base import STEPS
from quantkit.transforms.scaling_groups import ChannelScaling


@STEPS.register("awq")
@dataclass(frozen=True)
class AWQ(ChannelScaling):
    """Search the exponent of the inputs' sizes.

    Args:
        candidates: number of exponents tried between 0 and 1.
    """

    candidates: int = 10
    needs: ClassVar[tuple[str, ...]] = ("hessian",)

    def factors(self, weights: Sequence[Tensor], schemes: Sequence[Scheme], statistics: SiteStatistics) -> Tensor:
        """See :class:`quantkit.transforms.scaling_groups.ChannelScaling`."""
        hessian = statistics.results["hessian"]
        size = hessian.diagonal().clamp(min=0).sqrt()
        size = torch.where(size > 0, size, torch.ones_like(size))
        size = size / size.log().mean().exp()
        best, chosen = float("inf"), torch.ones_like(size)
        for i in range(self.candidates + 1):
            s = powers_of_two(size ** (i / self.candidates))
            error = sum(self._error(w, scheme, s, hessian) for w, scheme in zip(weights, schemes, strict=True))
            if error < best:
                best, chosen = error, s
        return chosen

    def _error(self, weight: Tensor, scheme: Scheme, s: Tensor, hessian: Tensor) -> float:
        scaled, spec = weight * s, scheme.weight
        qparams = rounding.search_qparams(scaled, spec, hessian.diagonal() / s.square())
        rounded = grid.dequantize(grid.quantize(scaled, *qparams, spec), *qparams, spec) / s
        error = weight - rounded
        return float(((error @ hessian) * error).sum(dtype=torch.float64))
