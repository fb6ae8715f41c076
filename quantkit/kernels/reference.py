r"""The reference kernel: dequantize, then ``F.linear``. Plain torch, so every spec on every device.

The weight is computed in float32 and rounded once to x's dtype; the product is torch's own in that dtype. With float32 or
float64 activations nothing is rounded but the sums; with bfloat16 the weight itself loses bits, as in a bfloat16 model.
Cost: the whole weight is unpacked on every call. It is what the other kernels are tested against.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from quantkit.kernels.select import KERNELS, ComputeMode, Problem
from quantkit.qtensor import QTensor
from quantkit.spec import WeightSpec


class ReferenceKernel:
    """Dequantize and multiply; the state is the quantized tensor itself."""

    priority = 0
    compute: ComputeMode = "float"

    def rejects(self, problem: Problem) -> str | None:
        """Reject only activations that are not floating point."""
        return None if problem.dtype.is_floating_point else f"activations are {problem.dtype}, want a floating dtype"

    def prepack(self, qtensor: QTensor) -> QTensor:
        """Return ``qtensor``."""
        return qtensor

    def matmul(self, x: Tensor, state: QTensor, bias: Tensor | None) -> Tensor:
        """Return ``x @ w.T + bias`` with w rounded to x's dtype; differentiable in x and bias."""
        return F.linear(x, state.dequantize(x.dtype), bias)

    def unpack(self, state: QTensor, spec: WeightSpec) -> QTensor:
        """Return ``state``."""
        return state

    def details(self) -> dict[str, str]:
        """Return torch's version."""
        return {"torch": torch.__version__}


KERNELS.register("reference")(ReferenceKernel())
