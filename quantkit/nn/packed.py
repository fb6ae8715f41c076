"""A quantized weight in the layout of the kernel that runs it."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quantkit.kernels.select import Kernel
from quantkit.nn.on_disk import OnDisk
from quantkit.qtensor import QTensor
from quantkit.spec import WeightSpec


@dataclass(frozen=True, slots=True, eq=False)
class Packed:
    """What stands in place of a :class:`~quantkit.qtensor.QTensor` once a kernel has repacked it; exactly the same weight.

    Copied or pickled, it becomes the QTensor again: a kernel's layout belongs to this machine.

    Attributes:
        kernel: the kernel.
        states: what its ``prepack`` made, one state per matrix.
        dtype: dtype of the activations that the kernel was chosen for; None: it has to be chosen again.
        spec, shape, device, nbytes, input_scale: those of the QTensor.
        whole: the QTensor itself, where the states are it or views of it; None where they hold the weight on their own.
        origin: where in a file the weight is, if it was read from there.
    """

    kernel: Kernel
    states: list[Any]
    dtype: torch.dtype | None
    spec: WeightSpec
    shape: tuple[int, ...]
    device: torch.device
    nbytes: int
    input_scale: Tensor | None
    whole: QTensor | None = None
    origin: OnDisk | None = None

    @classmethod
    def of(cls, weight: QTensor, kernel: Kernel, dtype: torch.dtype) -> "Packed":
        """Let ``kernel`` repack every matrix of a weight, for activations of ``dtype``."""
        origin = weight if isinstance(weight, OnDisk) else None
        qtensor = weight.read() if isinstance(weight, OnDisk) else weight
        parts = [qtensor] if len(qtensor.shape) == 2 else [qtensor[expert] for expert in range(qtensor.shape[0])]
        states = [kernel.prepack(part) for part in parts]
        own = all(state is part for state, part in zip(states, parts, strict=True))
        return dataclasses.replace(
            cls.adopted(qtensor, kernel, states, qtensor.device), dtype=dtype, whole=qtensor if own else None, origin=origin
        )

    @classmethod
    def adopted(cls, like: QTensor, kernel: Kernel, states: Sequence[Any], device: torch.device) -> "Packed":
        """Return states that ``kernel`` made elsewhere, of a weight with the spec and shape of ``like``."""
        return cls(kernel, list(states), None, like.spec, like.shape, device, like.nbytes, like.input_scale)

    def canonical(self) -> QTensor:
        """Return the weight as it was before, bit for bit."""
        if self.whole is not None:
            return self.whole
        parts = [self.part(expert) for expert in range(len(self.states))]
        qtensor = parts[0] if len(self.shape) == 2 else type(parts[0]).stack(parts)
        return qtensor if self.input_scale is None else qtensor.with_parts({"input_scale": self.input_scale})

    def part(self, expert: int) -> QTensor:
        """Return one matrix of the weight (the only one is number 0), without input scale."""
        return self.kernel.unpack(self.states[expert], self.spec)

    def run_by(self, kernel: Kernel, dtype: torch.dtype) -> "Packed":
        """Return the same weight for another kernel; kernels of one class share their states."""
        if type(kernel) is type(self.kernel):
            return dataclasses.replace(self, kernel=kernel, dtype=dtype)
        return Packed.of(self.origin or self.canonical(), kernel, dtype)

    def to(self, device: torch.device | str) -> "Packed | QTensor":
        """Return the weight on ``device``; as a QTensor where it has to move."""
        return self if torch.device(device) == self.device else self.canonical().to(device)

    def __reduce__(self) -> tuple[Any, ...]:
        return _as_it_is, (self.canonical(),)


def _as_it_is(qtensor: QTensor) -> QTensor:
    return qtensor
