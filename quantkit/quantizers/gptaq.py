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
from typing import ClassVar

import torch
from torch import Tensor

from quantkit.quantizers.base import QUANTIZERS, Statistics
from quantkit.quantizers.gptq import GPTQ, damp


@QUANTIZERS.register("gptaq")
@dataclass(frozen=True)
class GPTAQ(GPTQ):
    """GPTQ towards the float model's outputs.

    Args:
        correction: c, the share of the inputs' drift that is made up for.
    """

    correction: float = 0.5
    needs: ClassVar[tuple[str, ...]] = ("hessian", "drift")

    def _target(self, weight: Tensor, hessian: Tensor, statistics: Statistics) -> Tensor:
        drift = statistics.results.get("drift")
        if drift is None:
            return weight
        key = f"gptaq {self.damping} shift"
        if key not in statistics.cache:
            damped = damp(hessian, self.damping)
            statistics.cache[key] = torch.linalg.solve(damped, drift.to(damped).T).T
        return weight + self.correction * (weight @ statistics.cache[key])
