r"""GPTAQ: GPTQ that also makes up for what the quantized layers before it did to its inputs.

A layer behind quantized ones sees inputs x instead of the float model's x'. GPTQ asks its output on x to stay what the float
weight would make *of x*; here it is to stay what the float model has, :math:`W x'`:

.. math:: \min_Q E\,\|W x' - Q x\|^2 = \min_Q E\,\|(W^* - Q)\, x\|^2 + \text{const}, \qquad
    W^* = W + c\, W\, E[(x' - x) x^T]\, H^{-1}, \quad H = E[x x^T] + \lambda I

with c = 1, so that any method for the symmetric problem can go on with :math:`W^*` in place of W. (Li et al. 2025, GPTAQ, arXiv
2504.02692, fold this into the sweep; Arai, Ichikawa 2025, QEP, arXiv 2504.09629, have the closed form used here, and the
factor c <= 1 against fitting the calibration text too closely.)

Cost over GPTQ: a second forward of every block, one more in x in statistic, one factorisation, and the float model's inputs of
one block in memory. Sites with experts, whose rows differ between the two models, are treated as by GPTQ.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.nn.sites import SiteStatistics
from quantkit.nn.sizes import RunSize
from quantkit.quantizers.base import QUANTIZERS, BlockCost
from quantkit.quantizers.gptq import GPTQ, damp


@QUANTIZERS.register("gptaq")
@dataclass(frozen=True)
class GPTAQ(GPTQ):
    """GPTQ towards the float model's outputs.

    Args:
        correction: c, the share of the inputs' drift that is made up for.
    """

    correction: float = 0.5

    @property
    def needs(self) -> tuple[str, ...]:
        """Names of the collectors: the second moment of the inputs and their drift, with all tokens alike or not."""
        return ("guided_hessian", "guided_drift") if self.guided else ("hessian", "drift")

    def _target(self, weight: Tensor, statistics: SiteStatistics) -> Tensor:
        if self.needs[1] not in statistics.results:
            return weight
        return weight + self.correction * (weight @ statistics.derived(_Shift(self.needs, self.damping, weight.device)))

    def cost(self, size: RunSize) -> BlockCost:
        """Return the float block's pass, and the float model's activations, inputs of layers and their moments."""
        guided = super().cost(size)
        return BlockCost(
            ("and one of the float block", *guided.passes),
            guided.nbytes + 4 * (size.tokens * (2 * size.hidden + 2 * size.widest) + 2 * size.widest**2),
        )


@dataclass(frozen=True, slots=True)
class _Shift:
    """Computes what layers with the same inputs share: E[(x' - x) x^T] H^-1."""

    moments: tuple[str, ...]
    damping: float
    device: torch.device

    def __call__(self, statistics: SiteStatistics) -> Tensor:
        moment, drift = (statistics.results[name] for name in self.moments)
        damped = damp(moment.to(self.device), self.damping)
        shift: Tensor = torch.linalg.solve(damped, drift.to(damped).T)
        return shift.T
