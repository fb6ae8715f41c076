"""Modules that run quantized weights: :class:`QuantLinear` for a linear layer, :class:`QuantWeight` for an expert stack.

Both hold the parts of a :class:`~quantkit.qtensor.QTensor` as buffers, so ``state_dict``, ``to(device)`` and ``deepcopy`` work
as for any module. ``to(dtype)`` leaves the buffers alone: codes and scales *are* the weight, and a cast would change it.

The kernel is picked at the first forward on a device and dtype, and its prepacked state is kept beside the buffers
without being one: it is never saved, and dropped when a buffer is replaced, moved or loaded into. Writing into a buffer's
memory by hand is not noticed; assign a new tensor instead.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from quantkit.errors import SpecError
from quantkit.kernels.select import Kernel, Problem, select
from quantkit.numerics import grid
from quantkit.numerics.dtypes import SCALE_DTYPES
from quantkit.numerics.fake import fake_quantize
from quantkit.numerics.pack import packed_words
from quantkit.qtensor import QTensor
from quantkit.spec import QuantSpec

_BUFFERS = ("packed", "scale", "zero_point")


class _Ready(NamedTuple):
    """A kernel with its prepacked state, and what they were made from."""

    kernel: Kernel
    state: Any
    dtype: torch.dtype
    packed: Tensor
    scale: Tensor
    zero_point: Tensor | None


class _Quantized(nn.Module):
    """The parts of one quantized tensor as buffers, kept in their own dtypes."""

    packed: Tensor
    scale: Tensor
    zero_point: Tensor | None

    def __init__(self, qtensor: QTensor, activation: QuantSpec | None = None) -> None:
        super().__init__()
        if activation is not None and not activation.dynamic:
            raise SpecError(f"activations {activation.describe()}: want a dynamic grid; static scales are not supported")
        self.spec, self.shape, self.activation = qtensor.spec, qtensor.shape, activation
        for name in _BUFFERS:
            self.register_buffer(name, getattr(qtensor, name))
        self._ready: dict[int, _Ready] = {}  # by expert; 0 for a plain weight

    @property
    def qtensor(self) -> QTensor:
        """The quantized weight, sharing memory with the buffers."""
        return QTensor(self.packed, self.scale, self.zero_point, self.spec, self.shape)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the weight, computed in float32 and rounded once to ``dtype``."""
        return self.qtensor.dequantize(dtype)

    def extra_repr(self) -> str:
        """Return shape and grids for ``print(model)``."""
        inputs = f", inputs {self.activation.describe()}" if self.activation else ""
        return f"{'x'.join(map(str, self.shape))}, {self.spec.describe()}{inputs}"

    def _multiply(self, x: Tensor, bias: Tensor | None, expert: int = 0) -> Tensor:
        if self.activation is not None:
            x = fake_quantize(x, self.activation)
        if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
            return nn.functional.linear(x, self._part(expert).dequantize(x.dtype), bias)
        ready = self._ready.get(expert)
        buffers = self._buffers
        if (
            ready is None
            or ready.dtype is not x.dtype
            or ready.packed is not buffers["packed"]
            or ready.scale is not buffers["scale"]
            or ready.zero_point is not buffers["zero_point"]
        ):
            ready = self._prepare(x.dtype, expert)
        if bias is not None and bias.dtype != x.dtype:
            bias = bias.to(x.dtype)
        return ready.kernel.matmul(x, ready.state, bias)

    def _part(self, expert: int) -> QTensor:
        return self.qtensor if len(self.shape) == 2 else self.qtensor[expert]

    def _prepare(self, dtype: torch.dtype, expert: int) -> _Ready:
        part = self._part(expert)
        problem = Problem(self.spec, (part.shape[0], part.shape[1]), self.packed.device.type, dtype)
        kernel, old = select(problem), self._ready.get(expert)
        same = old is not None and old.kernel is kernel and all(getattr(old, name) is self._buffers[name] for name in _BUFFERS)
        state = old.state if old is not None and same else kernel.prepack(part)
        ready = _Ready(kernel, state, dtype, self.packed, self.scale, self.zero_point)
        self._ready[expert] = ready
        return ready

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Apply ``fn`` (a move or a cast) to everything, but keep the dtypes of codes, scales and zero points."""
        kept = {id(self._buffers[name]) for name in _BUFFERS}

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return tensor.to(moved.device) if id(tensor) in kept and moved.dtype != tensor.dtype else moved

        self._ready = {}
        super()._apply(move, recurse)  # type: ignore[no-untyped-call]
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._ready = {}
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_ready": {}}


class QuantLinear(_Quantized):
    """A linear layer with a quantized weight: ``y = x @ w.T + bias``.

    Args:
        qtensor: the weight, 2-D.
        bias: (out,) or None; kept as a parameter without gradient.
        activation: dynamic grid that inputs are rounded to; None leaves them alone.

    Attributes:
        spec: grid of the weight.
        shape: (out, in).
        in_features: input size K.
        out_features: output size N.

    Raises:
        SpecError: if the weight is not 2-D or the bias does not fit it.
    """

    bias: nn.Parameter | None

    def __init__(self, qtensor: QTensor, bias: Tensor | None = None, *, activation: QuantSpec | None = None) -> None:
        if len(qtensor.shape) != 2 or (bias is not None and tuple(bias.shape) != qtensor.shape[:1]):
            got = f"weight {qtensor.shape}, bias {None if bias is None else tuple(bias.shape)}"
            raise SpecError(f"QuantLinear: {got}; want (out, in) and (out,), and QuantWeight for a stack of experts")
        super().__init__(qtensor, activation)
        self.out_features, self.in_features = qtensor.shape
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach(), requires_grad=False))

    @classmethod
    def empty(
        cls,
        spec: QuantSpec,
        shape: tuple[int, int],
        *,
        bias: bool = False,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "meta",
    ) -> Self:
        """Return a layer whose buffers wait to be loaded; ``dtype`` is the bias's.

        Raises:
            SpecError: if ``spec`` does not fit ``shape`` = (out, in).
        """
        values = torch.empty(shape[0], dtype=dtype, device=device) if bias else None
        return cls(_empty_qtensor(spec, shape, device), values)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x @ w.T + bias`` for x (..., in) of float32, float16 or bfloat16; (..., out) in x's dtype.

        Where a gradient of x (or of the bias) is wanted, the weight is dequantized and torch differentiates.

        Raises:
            KernelError: if no kernel, or not the one forced by ``QUANTKIT_KERNEL``, can run this.
        """
        return self._multiply(x, self._parameters["bias"])


class QuantWeight(_Quantized):
    """A quantized stack of expert matrices that stands where a 3-D parameter stood.

    Args:
        qtensor: the weights, (experts, out, in).
        activation: dynamic grid that inputs are rounded to; None leaves them alone.

    Attributes:
        spec: grid of the weights.
        shape: (experts, out, in).

    Raises:
        SpecError: if the weight is not 3-D.
    """

    def __init__(self, qtensor: QTensor, *, activation: QuantSpec | None = None) -> None:
        if len(qtensor.shape) != 3:
            raise SpecError(f"QuantWeight: weight {qtensor.shape}; want (experts, out, in), and QuantLinear for one matrix")
        super().__init__(qtensor, activation)

    @classmethod
    def empty(cls, spec: QuantSpec, shape: tuple[int, int, int], *, device: torch.device | str = "meta") -> Self:
        """Return a stack whose buffers wait to be loaded.

        Raises:
            SpecError: if ``spec`` does not fit ``shape`` = (experts, out, in).
        """
        return cls(_empty_qtensor(spec, shape, device))

    def matmul(self, x: Tensor, expert: int) -> Tensor:
        """Return ``x @ w[expert].T`` for x (..., in); (..., out) in x's dtype. Raises as :meth:`QuantLinear.forward`."""
        if not 0 <= expert < self.shape[0]:
            raise SpecError(f"QuantWeight: expert {expert} of {self.shape[0]}")
        return self._multiply(x, None, expert)


def _empty_qtensor(spec: QuantSpec, shape: tuple[int, ...], device: torch.device | str) -> QTensor:
    rows, columns = grid.block_size(spec, shape)
    blocks = (*shape[:-2], shape[-2] // rows, shape[-1] // columns)
    return QTensor(
        torch.empty((*shape[:-1], packed_words(shape[-1], spec.bits)), dtype=torch.int32, device=device),
        torch.empty(blocks, dtype=SCALE_DTYPES[spec.scale_dtype], device=device),
        None if spec.symmetric else torch.empty(blocks, dtype=torch.uint8, device=device),
        spec,
        shape,
    )
