"""Modules that run quantized weights: :class:`QuantLinear` for a linear layer, :class:`QuantWeight` for an expert stack.

Both hold the parts of a :class:`~quantkit.qtensor.QTensor` as buffers, so ``state_dict``, ``to(device)`` and ``deepcopy`` work
as for any module. ``to(dtype)`` leaves the buffers alone: codes and scales *are* the weight, and a cast would change it.

The kernel is picked at the first forward on a device and dtype, and its prepacked state is kept beside the buffers
without being one: it is never saved, and dropped when a buffer is replaced, moved or loaded into. Writing into a buffer's
memory by hand is not noticed; assign a new tensor instead.

A model that is only run need not hold its weights twice. With ``keeps_codes = False`` (what :func:`quantkit.load` sets) the
buffers' memory is let go once every part is prepacked: placeholders on the meta device stand in ``buffers()``, and
whoever reads a buffer, saves, copies or moves the module gets the same bits back, restored from the kernel's layout.
"""

import dataclasses
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from quantkit.errors import SpecError
from quantkit.kernels.cpu.matmul import State
from quantkit.kernels.select import ComputeMode, Kernel, Problem, RoundingKernel, select
from quantkit.numerics.inputs import InputQuantizer
from quantkit.qtensor import GridTensor, stack
from quantkit.spec import ActivationSpec, QuantSpec

_BUFFERS = ("packed", "scale", "zero_point")
_SINGLE = ("global_scale", "input_scale")
"""Buffers of one number per matrix, which are never let go."""

_PREPARING = threading.RLock()  # one for all: a module that has a lock of its own could not be copied


class _Ready(NamedTuple):
    """A kernel with its prepacked state, and what they were made from."""

    kernel: Kernel
    state: Any
    dtype: torch.dtype | None  # None: the kernel has to be chosen again
    packed: Tensor
    scale: Tensor
    zero_point: Tensor | None


class _Quantized(nn.Module):
    """The parts of one quantized tensor as buffers, kept in their own dtypes."""

    packed: Tensor
    scale: Tensor
    zero_point: Tensor | None
    global_scale: Tensor | None
    input_scale: Tensor | None

    def __init__(self, qtensor: GridTensor, activation: ActivationSpec | None = None) -> None:
        super().__init__()
        if (activation is not None and activation.static) != (qtensor.input_scale is not None):
            got = "no activations" if activation is None else f"activations {activation.describe()}"
            raise SpecError(
                f"{got}, input scale {qtensor.input_scale}: a static grid, and no other, wants a stored input scale"
            )
        self.spec, self.shape, self.activation = qtensor.spec, qtensor.shape, activation
        for name in (*_BUFFERS, *_SINGLE):
            self.register_buffer(name, getattr(qtensor, name))
        self.keeps_codes = True
        self._compute: ComputeMode = "float"
        self._ready: dict[int, _Ready] = {}  # by expert; 0 for a plain weight
        self._released = False  # the buffers are placeholders; every part is in `_ready`
        self._device = "cpu"  # where the parts of a released module are

    @property
    def qtensor(self) -> GridTensor:
        """The quantized weight: the buffers themselves, or what they held, restored, where they have been let go."""
        if self._released:
            return self._restored()
        packed, scale, zero = (self._buffers[name] for name in _BUFFERS)
        assert packed is not None
        assert scale is not None
        return GridTensor(packed, scale, zero, self.spec, self.shape, self.global_scale, self.input_scale)

    @property
    def compute(self) -> ComputeMode:
        """What kernels make of x: ``"float"``, nothing (the default), or ``"int8"``, rounded block by block.

        :mod:`quantkit.kernels.cpu.matmul` states the error of the second. Where a gradient is wanted, x is always left as it
        is.
        """
        return self._compute

    @compute.setter
    def compute(self, value: ComputeMode) -> None:
        self._compute = value
        self._ready = {expert: ready._replace(dtype=None) for expert, ready in self._ready.items()}

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the weight, computed in float32 and rounded once to ``dtype``."""
        return self.qtensor.dequantize(dtype)

    def prepacked(self, dtype: torch.dtype = torch.float32, expert: int = 0) -> Any:
        """Return the kernel's state for activations of ``dtype``: what a forward would use, prepacked now if need be."""
        ready = self._ready.get(expert)
        return (ready if ready is not None and self._fits(ready, dtype) else self._prepare(dtype, expert)).state

    def split_planes(self) -> bool:
        """Let the CPU kernels hold 8-bit codes as two planes of 4 bits, in place; say whether they do now.

        Products stay the same to the last bit. What drops prepacked states (a move, a load) drops the planes too.
        """
        if self.spec.bits != 8:
            return False
        for expert in range(1 if len(self.shape) == 2 else self.shape[0]):
            state = self.prepacked(torch.float32, expert)
            if not isinstance(state, State):
                return False
            self._ready[expert] = self._ready[expert]._replace(state=state.split())
        return True

    def adopt(self, kernel: Kernel, states: Sequence[Any]) -> None:
        """Take the states that ``kernel`` made of this weight, one per matrix, in place of what the buffers hold.

        The buffers' memory is let go; they may have been on the meta device from the start.
        """
        assert len(states) == (1 if len(self.shape) == 2 else self.shape[0])
        self.keeps_codes = False
        self._release()
        self._device = "cpu"
        packed, scale, zero = (self._buffers[name] for name in _BUFFERS)
        assert packed is not None
        assert scale is not None
        self._ready = {part: _Ready(kernel, state, None, packed, scale, zero) for part, state in enumerate(states)}

    def extra_repr(self) -> str:
        """Return shape and grids for ``print(model)``."""
        inputs = f", inputs {self.activation.describe()}" if self.activation else ""
        rounded = "" if self._compute == "float" else f", {self._compute} activations"
        return f"{'x'.join(map(str, self.shape))}, {self.spec.describe()}{inputs}{rounded}"

    def _multiply(self, x: Tensor, bias: Tensor | None, expert: int = 0) -> Tensor:
        if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
            return nn.functional.linear(self._inputs(expert)(x), self._part(expert).dequantize(x.dtype), bias)
        ready = self._ready.get(expert)
        if ready is None or not self._fits(ready, x.dtype):
            ready = self._prepare(x.dtype, expert)
        if bias is not None and bias.dtype != x.dtype:
            bias = bias.to(x.dtype)
        if self.activation is None:
            return ready.kernel.matmul(x, ready.state, bias)
        inputs = self._inputs(expert)
        x = inputs.prepare_input(x)
        if isinstance(ready.kernel, RoundingKernel) and ready.kernel.rounds(self.spec, self.activation):
            return ready.kernel.matmul_rounded(x, ready.state, bias, self.activation)
        return ready.kernel.matmul(inputs.round(x), ready.state, bias)

    def _inputs(self, expert: int) -> InputQuantizer:
        scale = self.input_scale
        return InputQuantizer(self.activation, scale if scale is None or scale.ndim == 1 else scale[expert])

    def _fits(self, ready: _Ready, dtype: torch.dtype) -> bool:
        buffers = self._buffers
        return (
            ready.dtype is dtype
            and ready.packed is buffers["packed"]
            and ready.scale is buffers["scale"]
            and ready.zero_point is buffers["zero_point"]
        )

    def _part(self, expert: int) -> GridTensor:
        if self._released:
            ready = self._ready[expert]
            return ready.kernel.unpack(ready.state, self.spec)
        return self.qtensor if len(self.shape) == 2 else self.qtensor[expert]

    def _prepare(self, dtype: torch.dtype, expert: int) -> _Ready:
        with _PREPARING:
            device = self._device if self._released else self.qtensor.packed.device.type
            problem = Problem(self.spec, (self.shape[-2], self.shape[-1]), device, dtype)
            kernel = select(problem, self._compute)
            ready = self._choose(kernel, dtype, expert)
            if not self.keeps_codes and not self._released:
                for other in range(1 if len(self.shape) == 2 else self.shape[0]):
                    self._choose(kernel, dtype, other)
                self._release()
                ready = self._ready[expert]
            return ready

    def _choose(self, kernel: Kernel, dtype: torch.dtype, expert: int) -> _Ready:
        """Make one part ready for a kernel; kernels of one class share their states."""
        old = self._ready.get(expert)
        same = old is not None and type(old.kernel) is type(kernel) and self._fits(old._replace(dtype=dtype), dtype)
        state = old.state if old is not None and same else kernel.prepack(self._part(expert))
        packed, scale, zero = (self._buffers[name] for name in _BUFFERS)
        assert packed is not None
        assert scale is not None
        self._ready[expert] = _Ready(kernel, state, dtype, packed, scale, zero)
        return self._ready[expert]

    def _release(self) -> None:
        held = {name: self._buffers[name] for name in _BUFFERS}
        self._device = self.packed.device.type
        empty: dict[str, Any] = {
            name: None if tensor is None else torch.empty_like(tensor, device="meta") for name, tensor in held.items()
        }
        self._released = True  # first: another thread that reads the weight meanwhile must not find a placeholder
        self._buffers.update(empty)
        self._ready = {expert: ready._replace(**empty) for expert, ready in self._ready.items()}

    def _restored(self) -> GridTensor:
        parts = [ready.kernel.unpack(ready.state, self.spec) for _, ready in sorted(self._ready.items())]
        whole = parts[0] if len(self.shape) == 2 else stack(parts)
        return dataclasses.replace(whole, input_scale=self.input_scale)  # which kernels know nothing of

    def _take_back(self) -> None:
        """Hold the canonical tensors again."""
        if self._released:
            whole = self._restored()
            own = {name: getattr(whole, name) for name in _BUFFERS}
            self._buffers.update(own)
            self._ready = {expert: ready._replace(**own) for expert, ready in self._ready.items()}
            self._released = False

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Apply ``fn`` (a move or a cast) to everything, but keep the dtypes of codes, scales and zero points."""
        self._take_back()
        kept = {id(self._buffers[name]) for name in (*_BUFFERS, *_SINGLE)}

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return tensor.to(moved.device) if id(tensor) in kept and moved.dtype != tensor.dtype else moved

        self._ready = {}
        super()._apply(move, recurse)  # type: ignore[no-untyped-call]
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._take_back()
        self._ready = {}
        super()._load_from_state_dict(*args, **kwargs)

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        held = dict(self._buffers)
        if self._released:
            whole = self._restored()
            self._buffers.update({name: getattr(whole, name) for name in _BUFFERS})
        try:
            super()._save_to_state_dict(*args, **kwargs)
        finally:
            self._buffers.update(held)

    def __getattr__(self, name: str) -> Any:
        if name in _BUFFERS and self.__dict__.get("_released"):
            return getattr(self._restored(), name)
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _BUFFERS and self.__dict__.get("_released"):
            self._take_back()
        super().__setattr__(name, value)

    def __getstate__(self) -> dict[str, Any]:
        buffers = dict(self._buffers)
        if self._released:
            whole = self._restored()
            buffers.update({name: getattr(whole, name) for name in _BUFFERS})
        return {**self.__dict__, "_buffers": buffers, "_ready": {}, "_released": False}


class QuantLinear(_Quantized):
    """A linear layer with a quantized weight: ``y = x @ w.T + bias``.

    Args:
        qtensor: the weight, 2-D.
        bias: (out,) or None; kept as a parameter without gradient.
        activation: what inputs are rounded to, None leaves them alone; a static grid's scale is ``qtensor.input_scale``.

    Attributes:
        spec: grid of the weight.
        shape: (out, in).
        in_features: input size K.
        out_features: output size N.
        tied_to: name of the embedding whose table this is, for a tied head; a checkpoint holds it there.

    Raises:
        SpecError: if the weight is not 2-D or the bias does not fit it.
    """

    bias: nn.Parameter | None
    tied_to: str | None = None

    def __init__(self, qtensor: GridTensor, bias: Tensor | None = None, *, activation: ActivationSpec | None = None) -> None:
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
        return cls(GridTensor.empty(spec, shape, device), values)

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
        activation: what inputs are rounded to, None leaves them alone; a static grid's scale is ``qtensor.input_scale``.

    Attributes:
        spec: grid of the weights.
        shape: (experts, out, in).

    Raises:
        SpecError: if the weight is not 3-D.
    """

    def __init__(self, qtensor: GridTensor, *, activation: ActivationSpec | None = None) -> None:
        if len(qtensor.shape) != 3:
            raise SpecError(f"QuantWeight: weight {qtensor.shape}; want (experts, out, in), and QuantLinear for one matrix")
        super().__init__(qtensor, activation)

    @classmethod
    def empty(cls, spec: QuantSpec, shape: tuple[int, int, int], *, device: torch.device | str = "meta") -> Self:
        """Return a stack whose buffers wait to be loaded.

        Raises:
            SpecError: if ``spec`` does not fit ``shape`` = (experts, out, in).
        """
        return cls(GridTensor.empty(spec, shape, device))

    def matmul(self, x: Tensor, expert: int) -> Tensor:
        """Return ``x @ w[expert].T`` for x (..., in); (..., out) in x's dtype. Raises as :meth:`QuantLinear.forward`."""
        if not 0 <= expert < self.shape[0]:
            raise SpecError(f"QuantWeight: expert {expert} of {self.shape[0]}")
        return self._multiply(x, None, expert)
