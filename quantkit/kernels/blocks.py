r"""Weights in the blocks of a GGUF file: dequantized once, multiplied as floats.

The compiled CPU kernels multiply by blocks as they are. Where they cannot (another device, no compiler), the reference kernel
would unpack the whole weight in every product; this one keeps it unpacked, which takes the memory of a float32 model.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from quantkit.kernels.select import KERNELS, ComputeMode, Problem
from quantkit.qtensor import QTensor
from quantkit.spec import QuantSpec, WeightSpec


class Unpacked(NamedTuple):
    """A weight and the same as float32 (N, K)."""

    qtensor: QTensor
    weight: Tensor


class BlockKernel:
    """Multiply by what the blocks stand for."""

    priority = 1
    compute: ComputeMode = "float"

    def rejects(self, problem: Problem) -> str | None:
        """Reject everything but blocks, and activations that are not floating point."""
        if not isinstance(problem.spec, QuantSpec) or problem.spec.blocks is None:
            return f"the weight is {problem.spec.describe()}, want blocks of a GGUF file"
        return None if problem.dtype.is_floating_point else f"activations are {problem.dtype}, want a floating dtype"

    def prepack(self, qtensor: QTensor) -> Unpacked:
        """Unpack a weight."""
        return Unpacked(qtensor, qtensor.dequantize())

    def matmul(self, x: Tensor, state: Unpacked, bias: Tensor | None) -> Tensor:
        """Return ``x @ w.T + bias`` with w rounded to x's dtype."""
        return F.linear(x, state.weight.to(x.dtype), bias)

    def unpack(self, state: Unpacked, spec: WeightSpec) -> QTensor:
        """Return the weight as it was."""
        return state.qtensor

    def details(self) -> dict[str, str]:
        """Return torch's version."""
        return {"torch": torch.__version__}


KERNELS.register("blocks")(BlockKernel())
