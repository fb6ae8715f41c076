r"""The compiled CPU kernels: ``cpu`` with float activations, ``cpu-int8`` with activations rounded to int8.

Both read the one layout of :mod:`~quantkit.kernels.cpu.layout`, whatever the codes are: integers, 16 numbers of a table (NF4,
FP4, IQ4), FP8, the blocks of a GGUF file. ``cpu`` multiplies the numbers themselves, before they are scaled; sums are float32,
and only the result is rounded to x's dtype. bfloat16 activations are multiplied as they are where this CPU does that faster
than with floats: all numbers are exact in bfloat16 but those of NF4, which lose what a bfloat16 model's weights lose.

``cpu-int8`` rounds each block of :data:`BLOCK` activations (of a group, where that is smaller) to :math:`q \cdot \max|x| / 127`
and sums int8 products exactly in int32, so the error of a product is that of the rounding: each activation moves by at
most 1/254 of the largest of its block. It is several times faster at many rows, where the float path is bound by
arithmetic, and is never chosen by itself: ask for it with ``compute="int8"``.
"""

import ctypes
import dataclasses
from typing import NamedTuple

import torch
from torch import Tensor

from quantkit.errors import KernelError
from quantkit.kernels import build
from quantkit.kernels.cpu import layout, ops
from quantkit.kernels.cpu.huge_pages import in_huge_pages
from quantkit.kernels.cpu.layout import LinearStruct, Prepacked
from quantkit.kernels.cpu.tables import inputs_struct, rejects_inputs
from quantkit.kernels.select import KERNELS, ComputeMode, Problem
from quantkit.qtensor import QTensor
from quantkit.spec import ActivationSpec, QuantSpec, WeightSpec

BLOCK = 32
"""Columns that share an int8 activation scale; a smaller or odd group has blocks of its own.

On SmolLM2-135M with 4-bit weights (round to nearest, asymmetric, groups of 64, int8 head) rounding activations so moves the
predictions by a KL divergence of 0.0039; blocks of 64 move them by 0.0073.
"""


class State(NamedTuple):
    """A prepacked weight and its C view."""

    weight: Prepacked
    struct: LinearStruct

    def split(self) -> "State":
        """Return this weight with 8-bit codes in two planes (:func:`quantkit.kernels.cpu.layout.split`)."""
        weight = layout.split(self.weight)
        if weight is self.weight:
            return self
        weight = weight._replace(codes=in_huge_pages(weight.codes))
        return State(weight, weight.struct())


class CpuKernel:
    """``torch.ops.quantkit.wq_matmul`` on a library compiled on first use."""

    priority = 10

    def __init__(self, compute: ComputeMode) -> None:
        self.compute = compute
        self._block = BLOCK if compute == "int8" else 0

    def rejects(self, problem: Problem) -> str | None:
        """Reject other devices and activation dtypes, empty weights, and machines where the library cannot be built."""
        if problem.device != "cpu":
            return f"runs on the cpu, not on {problem.device}"
        if problem.dtype not in build.DTYPE_CODES:
            return f"activations are {problem.dtype}, want float32, float16 or bfloat16"
        spec = problem.spec
        if not isinstance(spec, QuantSpec):
            return f"codes are {spec.describe()}, want a grid"
        if reason := layout.rejects(spec, problem.shape):
            return reason
        if self.compute == "int8" and spec.dtype == "fp8_e4m3":
            return f"codes are {spec.describe()}: no multiples of a step, so products stay float"
        try:
            build.library()
        except KernelError as error:
            if self.compute == "float":
                build.warn_once(f"quantized layers run on the slow reference kernel: {error}")
            return str(error)
        return None

    def prepack(self, qtensor: QTensor) -> State:
        """Copy a 2-D weight into blocks of 16 rows."""
        weight = layout.prepack(qtensor).moved(in_huge_pages)
        return State(weight, weight.struct())

    def matmul(self, x: Tensor, state: State, bias: Tensor | None) -> Tensor:
        """Return ``x @ w.T + bias`` in x's dtype, summed in float32."""
        if type(x) is Tensor and not torch.compiler.is_compiling():
            return ops.compute(x, *state, self._block, bias)  # the same function, without 3 us of dispatch
        return ops.wq_matmul()(x, *state.weight, self._block, bias)

    def rounds(self, spec: WeightSpec, activation: ActivationSpec) -> bool:
        """Say whether the kernels can round inputs so: at run time, for every token."""
        return activation.dynamic and rejects_inputs(activation, abs(activation.grid.block[1])) is None

    def matmul_rounded(self, x: Tensor, state: State, bias: Tensor | None, activation: ActivationSpec) -> Tensor:
        """Round x to ``activation``, in the basis it is in, and multiply; int8 products are exact."""
        inputs, _ = inputs_struct(dataclasses.replace(activation, rotated=False), state.weight.columns, None)
        struct = LinearStruct.from_buffer_copy(state.struct)
        struct.inputs = ctypes.addressof(inputs)
        return ops.compute(x, state.weight, struct, self._block, bias)

    def unpack(self, state: State, spec: WeightSpec) -> QTensor:
        """Return the weight that was prepacked."""
        assert isinstance(spec, QuantSpec)
        return layout.restore(state.weight, spec)

    def details(self) -> dict[str, str]:
        """Return compiler, instruction set, threads and where the library lies."""
        return build.details()


KERNELS.register("cpu")(CpuKernel("float"))
KERNELS.register("cpu-int8")(CpuKernel("int8"))
