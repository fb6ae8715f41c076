"""A quantized weight that lies in a file and is read when somebody wants it: a third kind of QTensor.

While a model is quantized, and of a large one while it is looked at, only a block at a time is in memory. What has been written
is represented by where it is: the file is mapped, so it may be renamed or deleted meanwhile, but nobody may write to it.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quantkit.qtensor import QTensor
from quantkit.spec import WeightSpec


@dataclass(frozen=True, slots=True, eq=False)
class OnDisk:
    """What stands in place of a :class:`~quantkit.qtensor.QTensor` that is in a file; exactly the same weight.

    Copied or pickled, it becomes the QTensor itself.

    Attributes:
        read: returns the QTensor: views of the file, or what is decoded from them anew each time.
        views: the tensors of the mapped file that it is read from.
        spec, shape, nbytes, input_scale: those of the QTensor.
    """

    read: Callable[[], QTensor]
    views: Sequence[Tensor]
    spec: WeightSpec
    shape: tuple[int, ...]
    nbytes: int
    input_scale: Tensor | None = None

    @classmethod
    def of(cls, like: QTensor, read: Callable[[], QTensor], views: Iterable[Tensor]) -> "OnDisk":
        """Return what is read by ``read``, with the facts of ``like``, which is the same weight or an empty one of its kind."""
        scale = like.input_scale
        return cls(read, tuple(views), like.spec, like.shape, like.nbytes, None if scale is None else scale.clone())

    @property
    def device(self) -> torch.device:
        """The CPU, which the file is mapped for."""
        return torch.device("cpu")

    @property
    def numel(self) -> int:
        """Number of weights."""
        return int(torch.Size(self.shape).numel())

    def canonical(self) -> QTensor:
        """Return the weight."""
        return self.read()

    def parts(self) -> dict[str, Tensor]:
        """Read the tensors; see :class:`~quantkit.qtensor.QTensor`, as for all that follows."""
        return self.read().parts()

    def with_parts(self, parts: Mapping[str, Tensor | None]) -> Any:
        """Return the weight in memory, with other parts."""
        return self.read().with_parts(parts)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the weight as floats."""
        return self.read().dequantize(dtype)

    def rows(self, index: slice | Tensor) -> Any:
        """Return some rows, in memory."""
        return self.read().rows(index)

    def to(self, device: torch.device | str) -> Any:
        """Return the weight on ``device``; in memory where it has to move."""
        return self if torch.device(device) == self.device else self.read().to(device)

    def __getitem__(self, expert: int) -> Any:
        """Return one expert, in memory."""
        return self.read()[expert]

    @classmethod
    def stack(cls, parts: Sequence[Any]) -> Any:
        """Join weights, in memory."""
        read = [part.canonical() for part in parts]
        return type(read[0]).stack(read)

    def __reduce__(self) -> tuple[Any, ...]:
        return _as_it_is, (self.read(),)


def _as_it_is(qtensor: QTensor) -> QTensor:
    return qtensor
