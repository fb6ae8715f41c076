"""What the meanings of operations have in common: operands that broadcast, and arrays along an axis."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from quantkit.hf.lowering.record import Handler, Ids, Recorder
from quantkit.hf.lowering.trace import TOKENS, CannotWatch

HANDLERS: dict[str, Handler] = {}
"""Name of an operation (of its overload packet) to what it does."""


def known(*names: str) -> Callable[[Handler], Handler]:
    """Register a handler."""

    def register(handler: Handler) -> Handler:
        HANDLERS.update(dict.fromkeys(names, handler))
        return handler

    return register


class Operands:
    """Operands that broadcast to an output, without its token axis.

    Attributes:
        axis: token axis of the output.
        shape: shape of the output without it (or with its length per token).
    """

    def __init__(self, recorder: Recorder, out: Tensor, *parts: Any) -> None:
        self.recorder, self.out = recorder, out
        tracked = [one for one in parts if isinstance(one, Tensor) and recorder.tracks(one)]
        found = {(recorder.axis(one)[0] - one.ndim + out.ndim, recorder.axis(one)[1]) for one in tracked}
        if len(found) != 1:
            raise CannotWatch("an operation mixes tokens")
        ((self.axis, self.many),) = found
        if out.shape[self.axis] != TOKENS * abs(self.many):
            raise CannotWatch("an operation mixes tokens")
        shape = list(out.shape)
        shape[self.axis] = abs(self.many)
        self._whole = tuple(shape)
        self.shape = tuple(shape[: self.axis] + shape[self.axis + 1 :]) if self.many == 1 else self._whole

    def ids(self, part: Any) -> Ids:
        """Return the elements of a part in the shape of the output."""
        recorder = self.recorder
        if not isinstance(part, Tensor):
            part = torch.tensor(float(part))
        axis = self.axis - self.out.ndim + part.ndim
        if recorder.tracks(part):
            found = recorder.ids(part)[0]
            whole = found if self.many != 1 else np.expand_dims(found, axis)
        elif axis < 0 or part.shape[axis] == 1:
            whole = recorder.constant(part, tuple(part.shape))
        else:
            whole = recorder.constant_ids(part, axis, self.many)
            whole = whole if self.many != 1 else np.expand_dims(whole, axis)
        whole = np.broadcast_to(whole, self._whole)
        return whole if self.many != 1 else whole.squeeze(self.axis)

    def done(self, ids: Ids) -> Tensor:
        """Track the output as these elements."""
        return self.recorder.track(self.out, ids.reshape(self.shape), self.axis, self.many < 0)


class Rows:
    """A tensor's elements as (outer, n), n being the joined length of some axes; puts results back in order."""

    def __init__(self, recorder: Recorder, x: Tensor, dims: Any) -> None:
        self.recorder = recorder
        dims = range(x.ndim) if dims is None or dims == [] else [dims] if isinstance(dims, int) else dims
        self.dims = sorted({dim % x.ndim for dim in dims})
        self.ids, self.axis, self.many = recorder.ids(x)
        if self.axis in self.dims or self.many < 0:
            raise CannotWatch("an operation mixes tokens")
        own = [dim - (self.many == 1 and dim > self.axis) for dim in self.dims]
        self.own = own
        self.moved = np.moveaxis(self.ids, own, range(-len(own), 0))
        self.outer = self.moved.shape[: self.moved.ndim - len(own)]
        self.n = int(np.prod(self.moved.shape[self.moved.ndim - len(own) :], dtype=np.int64))

    def rows(self, ids: Ids | None = None) -> Ids:
        """Return the elements of this tensor, or of one like it, as (outer, n)."""
        moved = self.moved if ids is None else np.moveaxis(ids, self.own, range(-len(self.own), 0))
        return moved.reshape(int(np.prod(self.outer, dtype=np.int64)), -1)

    def back(self, ids: Ids, n: int | None = None) -> Ids:
        """Reverse :meth:`rows` for a result with ``n`` elements in place of the axis; the same number as before if None."""
        if len(self.own) != 1:
            return np.moveaxis(ids.reshape(self.moved.shape), range(-len(self.own), 0), self.own)
        return np.moveaxis(ids.reshape(*self.outer, self.n if n is None else n), -1, self.own[0])

    def reduced(self, out: Tensor, ids: Ids) -> Tensor:
        """Track the result of a reduction."""
        kept = out.ndim == self.ids.ndim + (self.many == 1)
        axis = self.axis if kept else self.axis - sum(dim < self.axis for dim in self.dims)
        shape = list(out.shape)
        shape[axis] = self.many
        if self.many == 1:
            del shape[axis]
        return self.recorder.track(out, ids.reshape(shape), axis)
