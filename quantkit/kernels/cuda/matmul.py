"""The compiled CUDA kernel: 2- to 8-bit integer and fp8 weights times float16 or bfloat16 activations.

Few tokens are multiplied straight from the codes: ``code - zero_point`` meets the activations exactly in the tensor cores,
each group's sum is scaled in float32, and only the result is rounded. Many tokens meet the weight expanded, slice by slice,
in their own dtype, so there each weight is rounded once, as the reference kernel does. Activations that a layer rounds per
token to int8 or fp8 anyway are multiplied as they are, 8 bits by 8 bits.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from quantkit.errors import KernelError
from quantkit.kernels import build
from quantkit.kernels.cuda import layout, nvcc, ops
from quantkit.kernels.cuda.layout import Fragments
from quantkit.kernels.select import KERNELS, ComputeMode, Problem
from quantkit.numerics import grid
from quantkit.qtensor import GridTensor, QTensor, as_grid
from quantkit.spec import ActivationSpec, QuantSpec, WeightSpec, token_activations

DTYPES = (torch.float16, torch.bfloat16)
SMALLEST_GROUP = 32
FP8_CAPABILITY = (8, 9)
"""Older devices have no fp8 conversions: the kernels for it compile to nothing there."""


class State(NamedTuple):
    """A prepacked weight and the grid it came from."""

    weight: Fragments
    spec: QuantSpec


class CudaKernel:
    """``torch.ops.quantkit.fragment_matmul`` on a library that nvcc compiles on first use."""

    priority = 10
    compute: ComputeMode = "float"

    def rejects(self, problem: Problem) -> str | None:
        """Reject other devices and dtypes, groups the layout does not cut, and machines where the library cannot be built."""
        if problem.device != "cuda":
            return f"runs on cuda, not on {problem.device}"
        if problem.dtype not in DTYPES:
            return f"activations are {problem.dtype}, want float16 or bfloat16"
        spec = problem.spec
        if not isinstance(spec, QuantSpec) or spec.blocks is not None:
            return f"codes are {spec.describe()}, want integers or fp8_e4m3"
        if reason := unfit(spec, problem.shape):
            return reason
        try:
            nvcc.library()
        except KernelError as error:
            build.warn_once(f"quantized layers on CUDA run on the slow reference kernel: {error}")
            return str(error)
        if not spec.is_integer and torch.cuda.is_available() and torch.cuda.get_device_capability() < FP8_CAPABILITY:
            return "fp8 products want compute capability 8.9 or later"
        return None

    def prepack(self, qtensor: QTensor) -> State:
        """Copy a 2-D weight into the order of the tensor cores, on its device."""
        weight = as_grid(qtensor)
        return State(layout.prepack(weight), weight.spec)

    def matmul(self, x: Tensor, state: State, bias: Tensor | None) -> Tensor:
        """Return ``x @ w.T + bias`` in x's dtype."""
        return self._run(x, state, bias, "codes" if state.spec.is_integer else "fp8 codes")

    def rounds(self, spec: WeightSpec, activation: ActivationSpec) -> bool:
        """Say whether :meth:`matmul_rounded` can take activations of this grid to weights of ``spec``."""
        if (
            not isinstance(spec, QuantSpec)
            or spec.blocks is not None
            or not spec.symmetric
            or spec.dtype not in ("int8", "fp8_e4m3")
        ):
            return False
        return activation.dynamic and activation.grid == token_activations(spec.dtype).grid

    def matmul_rounded(self, x: Tensor, state: State, bias: Tensor | None, activation: ActivationSpec) -> Tensor:
        """Round x per token to ``activation`` and multiply the codes; same arguments and result as :meth:`matmul`."""
        return self._run(x, state, bias, "int8" if activation.grid.is_integer else "fp8")

    def unpack(self, state: State, spec: WeightSpec) -> GridTensor:
        """Return the weight that was prepacked."""
        assert isinstance(spec, QuantSpec)
        return layout.restore(state.weight, spec)

    def details(self) -> dict[str, str]:
        """Return nvcc and what it has built."""
        return nvcc.details()

    @staticmethod
    def _run(x: Tensor, state: State, bias: Tensor | None, form: str) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        if flat.shape[-1] != state.weight.columns:
            raise KernelError(f"x is {tuple(x.shape)}; want (..., {state.weight.columns})")
        y: Tensor = ops.ops().fragment_matmul(flat.contiguous(), *state.weight, bias, form)
        return y.view(*x.shape[:-1], state.weight.rows)


def unfit(spec: QuantSpec, shape: tuple[int, ...]) -> str | None:
    """Say why a weight does not go into the layout; None if it does."""
    if not spec.is_integer and spec.dtype != "fp8_e4m3":
        return f"codes are {spec.dtype}, want integers or fp8_e4m3"
    if spec.offset:
        return f"the grid {spec.describe()} has zero points that are no codes"
    if spec.scale_dtype not in ("float16", "bfloat16"):
        return f"scales are {spec.scale_dtype}, want float16 or bfloat16"
    if 0 in shape:
        return f"the weight {shape} is empty"
    _, group = grid.block_size(spec, shape)
    if group != shape[-1] and (group < SMALLEST_GROUP or group & (group - 1)):
        return f"groups of {group} columns; want a power of two from {SMALLEST_GROUP} on, or one scale per row"
    return None


KERNELS.register("cuda")(CudaKernel())
