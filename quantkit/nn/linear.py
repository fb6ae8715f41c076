"""Modules that run quantized weights: :class:`QuantLinear` for a linear layer, :class:`QuantWeight` for an expert stack.

Each holds its weight once, as one value: a :class:`~quantkit.qtensor.QTensor`, which may be one in a file
(:class:`~quantkit.nn.on_disk.OnDisk`), until the first product, from then on the layout of the kernel that runs it,
:class:`~quantkit.nn.packed.Packed`. The kernel is picked for the device and dtype of that
product; a product under a gradient leaves the value alone. ``module.qtensor`` is the weight in either state, made again from
the kernel's layout bit for bit, and can be assigned. Saving, copying and moving go the same way.

``state_dict`` has the parts of the QTensor under their names, ``to(device)`` and ``deepcopy`` work as for any module, and
``to(dtype)`` leaves codes and scales alone: they *are* the weight, and a cast would change it.
"""

import contextlib
import dataclasses
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from quantkit.errors import SpecError
from quantkit.kernels.cpu.matmul import State
from quantkit.kernels.select import ComputeMode, Kernel, Problem, RoundingKernel, select
from quantkit.nn.on_disk import OnDisk
from quantkit.nn.packed import Packed
from quantkit.numerics.inputs import InputQuantizer
from quantkit.qtensor import QTensor
from quantkit.spec import ActivationSpec, QuantSpec

_packing = threading.RLock()
"""Held while a weight is packed: threads that run a model for the first time pack each layer once."""


class QuantModule(nn.Module):
    """A module with one quantized weight.

    Args:
        qtensor: the weight.
        activation: what inputs are rounded to, None leaves them alone; a static grid's scale is ``qtensor.input_scale``.

    Attributes:
        spec: which numbers the weight has.
        shape: of the weight.
        activation: as given.
        value: what is held: the QTensor, or what has replaced it. One attribute, so that threads see either.
        revision: grows when the weight is assigned, loaded or moved, for those who keep something made of it.
        tied_to: name of the embedding whose table this is, for a tied head; a checkpoint holds it there.

    Raises:
        SpecError: a static grid for the inputs without a stored scale, or such a scale without the grid.
    """

    tied_to: str | None = None

    def __init__(self, qtensor: QTensor, activation: ActivationSpec | None = None) -> None:
        super().__init__()
        if (activation is not None and activation.static) != (qtensor.input_scale is not None):
            got = "no activations" if activation is None else f"activations {activation.describe()}"
            raise SpecError(
                f"{got}, input scale {qtensor.input_scale}: a static grid, and no other, wants a stored input scale"
            )
        self.spec, self.shape, self.activation = qtensor.spec, qtensor.shape, activation
        self.value: QTensor | Packed = qtensor
        self.revision = 0
        self.register_state_dict_post_hook(_save_parts)
        self.register_load_state_dict_pre_hook(_load_parts)

    @property
    def qtensor(self) -> QTensor:
        """The quantized weight: what is held, or made again from it. Assigning replaces the weight by one of its kind."""
        value = self.value
        return value.canonical() if isinstance(value, Packed | OnDisk) else value

    @qtensor.setter
    def qtensor(self, value: QTensor) -> None:
        if (value.spec, value.shape) != (self.spec, self.shape):
            raise SpecError(
                f"a weight {value.spec.describe()} {value.shape} in place of one {self.spec.describe()} {self.shape}; "
                "make a new module for another kind"
            )
        self.value = value
        self.revision += 1

    @property
    def device(self) -> torch.device:
        """Where the weight is."""
        return self.value.device

    @property
    def numel(self) -> int:
        """Number of weights."""
        return int(torch.Size(self.shape).numel())

    @property
    def nbytes(self) -> int:
        """Bytes that a file needs for the weight."""
        return self.value.nbytes

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the weight, computed in float32 and rounded once to ``dtype``."""
        return self.qtensor.dequantize(dtype)

    def release(self) -> Sequence[Tensor]:
        """Hold no more than the place of the weight, if it is in a file; return the views of that file, if any."""
        value = self.value
        if isinstance(value, Packed) and value.origin is not None:
            self.value = value = value.origin
        return value.views if isinstance(value, OnDisk) else ()

    @contextlib.contextmanager
    def placed_on(self, device: torch.device) -> Iterator[None]:
        """Hold the weight on ``device`` for a while, and then the very value again that was held before."""
        before = self.value
        self.value = before.to(device)
        try:
            yield
        finally:
            self.value = before

    def extra_repr(self) -> str:
        """Return shape and grids for ``print(model)``."""
        inputs = f", inputs {self.activation.describe()}" if self.activation else ""
        return f"{'x'.join(map(str, self.shape))}, {self.spec.describe()}{inputs}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Apply ``fn`` (a move or a cast) to everything, but keep the dtypes of the weight's parts.

        The one override of torch's own methods: nothing public is called when a module moves, and buffers, which would move by
        themselves, would be cast.
        """
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        qtensor = self.qtensor
        self.qtensor = qtensor.with_parts({name: _moved(part, fn) for name, part in qtensor.parts().items()})
        return self


def _moved(part: Tensor, fn: Callable[[Tensor], Tensor]) -> Tensor:
    moved = fn(part)
    return moved if moved.dtype == part.dtype else part.to(moved.device)


def _save_parts(module: nn.Module, state_dict: dict[str, Any], prefix: str, _metadata: Mapping[str, Any]) -> None:
    """Add the parts of the weight to a ``state_dict`` (a hook of torch's)."""
    assert isinstance(module, QuantModule)
    state_dict |= {f"{prefix}{name}": part for name, part in module.qtensor.parts().items()}


def _load_parts(
    module: nn.Module,
    state_dict: dict[str, Any],
    prefix: str,
    metadata: Mapping[str, Any],
    strict: bool,
    missing: list[str],
    _unexpected: list[str],
    errors: list[str],
) -> None:
    """Take the parts of the weight out of a ``state_dict`` (a hook of torch's); says what torch says of buffers."""
    assert isinstance(module, QuantModule)
    qtensor, found = module.qtensor, {}
    for name, own in qtensor.parts().items():
        given = state_dict.pop(f"{prefix}{name}", None)
        if given is None:
            missing += [f"{prefix}{name}"] if strict else []
        elif given.shape != own.shape:
            errors.append(
                f"size mismatch for {prefix}{name}: {tuple(given.shape)} in the state dict, {tuple(own.shape)} in the module."
            )
        elif metadata.get("assign_to_params_buffers", False):
            found[name] = given.detach()
        else:
            found[name] = given.detach().to(own.device, own.dtype, copy=True)
    if found:
        module.qtensor = qtensor.with_parts(found)


class _Multiplier(QuantModule):
    """A quantized weight that kernels multiply by."""

    def __init__(self, qtensor: QTensor, activation: ActivationSpec | None = None) -> None:
        super().__init__(qtensor, activation)
        self._compute: ComputeMode = "float"

    @property
    def compute(self) -> ComputeMode:
        """What kernels make of x on a CPU: ``"float"``, nothing (the default), or ``"int8"``, rounded block by block.

        :mod:`quantkit.kernels.cpu.matmul` states the error of the second. On another device, and where a gradient is wanted, x
        is always left as it is.
        """
        return self._compute

    @compute.setter
    def compute(self, value: ComputeMode) -> None:
        self._compute = value
        if isinstance(self.value, Packed):
            self.value = dataclasses.replace(self.value, dtype=None)

    def pack(self, dtype: torch.dtype = torch.float32) -> Packed:
        """Hold the layout of the kernel that multiplies activations of ``dtype``, from now on, and return it.

        A thread that reads the weight meanwhile sees it before or after; of several that want it packed, one does it and the
        others wait.

        Raises:
            KernelError: if no kernel, or not the one forced by ``QUANTKIT_KERNEL``, can run this.
        """
        value = self.value
        if isinstance(value, Packed) and value.dtype is dtype:
            return value
        with _packing:
            value = self.value
            if isinstance(value, Packed) and value.dtype is dtype:
                return value
            device = value.device.type
            compute = self._compute if device == "cpu" else "float"
            kernel = select(Problem(self.spec, (self.shape[-2], self.shape[-1]), device, dtype), compute)
            packed = value.run_by(kernel, dtype) if isinstance(value, Packed) else Packed.of(value, kernel, dtype)
            self.value = packed
        return packed

    def unpack(self) -> QTensor:
        """Hold the QTensor again, until the next product without a gradient, and return it."""
        self.value = qtensor = self.qtensor
        return qtensor

    def prepacked(self, dtype: torch.dtype = torch.float32, expert: int = 0) -> Any:
        """Return the kernel's state for activations of ``dtype``: what a forward would use, prepacked now if need be."""
        return self.pack(dtype).states[expert]

    def adopt(self, kernel: Kernel, states: Sequence[Any]) -> None:
        """Hold the states that ``kernel`` made of this weight on the CPU, one per matrix, in place of what is held.

        That may have been on the meta device from the start.
        """
        assert len(states) == (1 if len(self.shape) == 2 else self.shape[0])
        self.value = Packed.adopted(self.qtensor, kernel, states, torch.device("cpu"))

    def split_planes(self) -> bool:
        """Let the CPU kernels hold 8-bit codes as two planes of 4 bits, in place; say whether they do now.

        Products stay the same to the last bit. What drops prepacked states (a move, a load) drops the planes too.
        """
        states = self.pack().states
        if not isinstance(self.spec, QuantSpec) or self.spec.bits != 8 or not all(isinstance(one, State) for one in states):
            return False
        for expert, state in enumerate(states):  # one by one, so that little is held twice
            states[expert] = state.split()
        return True

    def extra_repr(self) -> str:
        """Return shape, grids and compute mode for ``print(model)``."""
        rounded = "" if self._compute == "float" else f", {self._compute} activations"
        return f"{super().extra_repr()}{rounded}"

    def _multiply(self, x: Tensor, bias: Tensor | None, expert: int = 0) -> Tensor:
        if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
            return nn.functional.linear(self._inputs(expert)(x), self._part(expert).dequantize(x.dtype), bias)
        value = self.value
        if not isinstance(value, Packed) or value.dtype is not x.dtype:
            value = self.pack(x.dtype)
        if bias is not None and bias.dtype != x.dtype:
            bias = bias.to(x.dtype)
        kernel, state, activation = value.kernel, value.states[expert], self.activation
        if activation is None:
            return kernel.matmul(x, state, bias)
        inputs = self._inputs(expert)
        x = inputs.prepare_input(x)
        if isinstance(kernel, RoundingKernel) and kernel.rounds(self.spec, activation):
            return kernel.matmul_rounded(x, state, bias, activation)
        return kernel.matmul(inputs.round(x), state, bias)

    def input_scale(self, expert: int = 0) -> float | None:
        """Return the stored scale of the inputs of one matrix; None where their grid has none."""
        scale = self._inputs(expert).scale
        return None if scale is None else float(scale)

    def _inputs(self, expert: int) -> InputQuantizer:
        scale = self.value.input_scale
        return InputQuantizer(self.activation, scale if scale is None or scale.ndim == 1 else scale[expert])

    def _part(self, expert: int) -> QTensor:
        value = self.value
        if isinstance(value, Packed):
            return value.part(expert)
        whole = self.qtensor
        return whole if len(self.shape) == 2 else whole[expert]


class QuantLinear(_Multiplier):
    """A linear layer with a quantized weight: ``y = x @ w.T + bias``.

    Args:
        qtensor: the weight, 2-D.
        bias: (out,) or None; kept as a parameter without gradient.
        activation: what inputs are rounded to, None leaves them alone; a static grid's scale is ``qtensor.input_scale``.

    Attributes:
        shape: (out, in).
        in_features: input size K.
        out_features: output size N.

    Raises:
        SpecError: if the weight is not 2-D or the bias does not fit it.
    """

    bias: nn.Parameter | None

    def __init__(self, qtensor: QTensor, bias: Tensor | None = None, *, activation: ActivationSpec | None = None) -> None:
        if len(qtensor.shape) != 2 or (bias is not None and tuple(bias.shape) != qtensor.shape[:1]):
            got = f"weight {qtensor.shape}, bias {None if bias is None else tuple(bias.shape)}"
            raise SpecError(f"QuantLinear: {got}; want (out, in) and (out,), and QuantWeight for a stack of experts")
        super().__init__(qtensor, activation)
        self.out_features, self.in_features = qtensor.shape
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach(), requires_grad=False))

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x @ w.T + bias`` for x (..., in) of float32, float16 or bfloat16; (..., out) in x's dtype.

        Where a gradient of x (or of the bias) is wanted, the weight is dequantized and torch differentiates.

        Raises:
            KernelError: if no kernel, or not the one forced by ``QUANTKIT_KERNEL``, can run this.
        """
        return self._multiply(x, self._parameters["bias"])


class QuantWeight(_Multiplier):
    """A quantized stack of expert matrices that stands where a 3-D parameter stood.

    Args:
        qtensor: the weights, (experts, out, in).
        activation: what inputs are rounded to, None leaves them alone; a static grid's scale is ``qtensor.input_scale``.

    Attributes:
        shape: (experts, out, in).

    Raises:
        SpecError: if the weight is not 3-D.
    """

    def __init__(self, qtensor: QTensor, *, activation: ActivationSpec | None = None) -> None:
        if len(qtensor.shape) != 3:
            raise SpecError(f"QuantWeight: weight {qtensor.shape}; want (experts, out, in), and QuantLinear for one matrix")
        super().__init__(qtensor, activation)

    def matmul(self, x: Tensor, expert: int) -> Tensor:
        """Return ``x @ w[expert].T`` for x (..., in); (..., out) in x's dtype. Raises as :meth:`QuantLinear.forward`."""
        if not 0 <= expert < self.shape[0]:
            raise SpecError(f"QuantWeight: expert {expert} of {self.shape[0]}")
        return self._multiply(x, None, expert)
