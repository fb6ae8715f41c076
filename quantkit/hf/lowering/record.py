"""Record the arithmetic of one decode step, operation by operation, as the steps of a tape.

A model decodes :data:`TOKENS` sequences at once, one token each, while every torch operation passes through a
:class:`Recorder`. The sequences are there to be told apart from everything else: an axis of that size, in memory that descends
from the token ids, runs over tokens, and all other axes over the *elements* of a token. Every element has a number, the step
that made it and its place there. Memory of the model's tensors maps to such numbers, so that views need no attention at all,
and whatever only moves elements (concatenation, copies, assignments to a part, in place or not) only moves numbers. What is
computed becomes a step whose operands are arrays of numbers; they are written as strided reads, after joining pieces where the
elements are not regular.

Refused by name: operations that mix tokens, depend on values (a branch, a number taken out of a tensor), or are not known.
"""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from quantkit.hf.lowering.trace import TOKENS, CannotWatch
from quantkit.kernels.program.tape import MOST_AXES, Compute, Join, Place, Read, Step

_NODE = 1 << 26
"""Elements that one step may make."""

_MOST_PIECES = 4096

Ids = NDArray[np.int64]


class _Memory:
    """The elements in one tensor's memory.

    Attributes:
        stride: distance from one token to the next, in elements of memory.
        ids: number of each element of the first token, by place; -1 where there is none.
    """

    def __init__(self, stride: int, ids: Ids) -> None:
        self.stride, self.ids = stride, ids


class Recorder(TorchDispatchMode):
    """Write down what happens to tracked tensors.

    Args:
        handle: runs an operation with tracked arguments and records it.

    Attributes:
        steps: the steps so far.
        widths: number of elements of every value.
    """

    def __init__(self, handle: "Handler") -> None:
        super().__init__()
        self._handle = handle
        self.steps: list[Step] = []
        self.widths: dict[int, int] = {}
        self._memory: dict[int, _Memory] = {}
        self._alive: list[Any] = []  # memory that is freed would be used again, and taken for what it held
        self._constants: dict[int, Tensor] = {}
        self._known: dict[Any, int] = {}
        self._next = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [one for one in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
        if not any(self.tracks(one) for one in tensors):
            out = func(*args, **kwargs)
            return out.zero_() if func._schema.name.startswith("aten::empty") else out  # whose content might change
        return self._handle(self, func, args, kwargs)

    # -- values

    def value(self, width: int) -> int:
        """Return the number of a new value."""
        number, self._next = self._next, self._next + 1
        if width >= _NODE:
            raise CannotWatch(f"a step makes {width} elements per token")
        self.widths[number] = width
        return number

    def elements(self, number: int, shape: Iterable[int] = ()) -> Ids:
        """Return the numbers of a value's elements."""
        ids = np.arange(self.widths[number], dtype=np.int64) + number * _NODE
        return ids.reshape(tuple(shape) or ids.shape)

    def constant(self, x: Tensor, shape: tuple[int, ...]) -> Ids:
        """Return the numbers of the elements of a constant, broadcast to ``shape`` without the token axis."""
        key: Any = (x.untyped_storage()._cdata, x.storage_offset(), tuple(x.shape), x.stride(), x._version)
        key = ("number", float(x)) if x.numel() == 1 else key
        if x.numel() >= _NODE >> 2:
            raise CannotWatch(f"a constant of {x.numel()} elements would be copied")
        if key not in self._known:
            self._alive.append(x)
            flat = x.detach().reshape(-1).to("cpu", torch.float32, copy=True)
            number = self._next
            self._next += 1
            self.widths[number] = flat.numel()
            self._constants[number] = flat
            self._known[key] = number
        ids = self.elements(self._known[key]).reshape(tuple(x.shape))
        return np.broadcast_to(ids, shape)

    # -- tensors

    def tracks(self, x: Tensor) -> bool:
        """Return whether a tensor's elements belong to tokens."""
        return x.untyped_storage()._cdata in self._memory

    def track(self, x: Tensor, ids: Ids, axis: int, inner: bool = False) -> Tensor:
        """Register a tensor in memory of its own; ``ids`` are those of one token, ``axis`` that of the tokens.

        If the axis is longer than :data:`TOKENS`, each token has several places on it, and ``ids`` their number: neighbours,
        or one in each of several rounds of all tokens where ``inner``.
        """
        if not x.numel():
            return x
        many = x.shape[axis] // TOKENS
        stride, many = (x.stride(axis), -many) if inner and many > 1 else (x.stride(axis) * many, many)
        self._memory[x.untyped_storage()._cdata] = memory = _Memory(stride, np.full(0, -1, dtype=np.int64))
        self._alive.append(x)
        self._write(memory, _offsets(x, axis, many), ids)
        return x

    def _write(self, memory: _Memory, offsets: Ids, ids: Ids) -> None:
        if not offsets.size:
            return
        most = int(offsets.max()) + 1
        if most > len(memory.ids):
            memory.ids = np.concatenate([memory.ids, np.full(most - len(memory.ids), -1, dtype=np.int64)])
        memory.ids[offsets] = ids

    def assign(self, x: Tensor, ids: Ids) -> None:
        """Write elements into a tensor that is tracked, or constant memory that becomes tracked."""
        memory = self._memory[x.untyped_storage()._cdata]
        axis, many = self.axis(x)
        self._write(memory, _offsets(x, axis, many), np.broadcast_to(ids, _without(x, axis, many)))

    def adopt(self, x: Tensor, axis: int) -> None:
        """Track a constant tensor, because elements are about to be written into it."""
        if x._base is not None and x._base.numel() != x.numel():
            base, where = x._base, x.stride(axis)
            axes = [i for i in range(base.ndim) if base.shape[i] == TOKENS and base.stride(i) == where]
            if len(axes) != 1:
                raise CannotWatch("elements are written into a part of a constant")
            x, axis = base, axes[0]
        self.track(x, self.constant_ids(x, axis, 1), axis)

    def axis(self, x: Tensor) -> tuple[int, int]:
        """Return the token axis of a tracked tensor, and how many places there belong to one token.

        The number is negative where they are in different rounds of all tokens, instead of neighbours.
        """
        stride = self._memory[x.untyped_storage()._cdata].stride
        for axis, (size, step) in enumerate(zip(x.shape, x.stride(), strict=True)):
            if size == TOKENS and step == stride:
                return axis, 1
        for axis, (size, step) in enumerate(zip(x.shape, x.stride(), strict=True)):
            if size and size % TOKENS == 0 and step * (size // TOKENS) == stride:
                return axis, size // TOKENS
        for axis, (size, step) in enumerate(zip(x.shape, x.stride(), strict=True)):
            if size > TOKENS and size % TOKENS == 0 and step == stride:
                return axis, -(size // TOKENS)
        raise CannotWatch(f"an array of shape {tuple(x.shape)} has no axis of tokens")

    def ids(self, x: Tensor) -> tuple[Ids, int, int]:
        """Return the elements of a tracked tensor's first token, the token axis, and its length per token.

        The token axis is left out of the elements' shape if it is one per token.
        """
        axis, many = self.axis(x)
        memory = self._memory[x.untyped_storage()._cdata]
        found = memory.ids[_offsets(x, axis, many)]
        if (found < 0).any():
            raise CannotWatch("elements are read that were never written")
        return found, axis, many

    def constant_ids(self, x: Tensor, axis: int, many: int) -> Ids:
        """Return the elements of a constant with an axis of tokens, along which it must not change."""
        size = x.shape[axis]
        if size == 1:
            part = x.select(axis, 0) if many == 1 else x
        else:
            parts = x if many == 1 else x.unflatten(axis, (TOKENS, many) if many > 1 else (-many, TOKENS))
            along = axis + (many < 0)
            part = parts.select(along, 0)
            if parts.stride(along) and not torch.equal(part.unsqueeze(along).expand(parts.shape), parts):
                raise CannotWatch("a constant differs from token to token")
        return self.constant(part, tuple(part.shape))

    # -- steps

    def read(self, ids: Ids) -> Read:
        """Return elements as a strided read, of joined pieces where they are not regular."""
        if (plain := self._strided(ids)) is not None:
            return plain
        pieces = _pieces(ids)
        out = self.value(ids.size)
        where = np.arange(ids.size, dtype=np.int64).reshape(ids.shape)
        reads, places = [], []
        for piece in pieces:
            got, target = ids[piece], where[piece]
            if got.ndim > MOST_AXES:
                raise CannotWatch("an array has too many axes")
            reads.append(_required(self._strided(got)))
            to = _strides(target)
            assert to is not None
            places.append(Place(int(target.flat[0]), to))
        self.steps.append(Join(tuple(reads), tuple(places), out))
        return _required(self._strided(self.elements(out, ids.shape)))

    def run(self, ids: Ids) -> Read:
        """Return elements as a run of neighbours in a value."""
        source = self.read(ids)
        if isinstance(source.source, int) and source.strides == _contiguous(source.shape):
            return Read(source.source, source.offset, (source.size,), (1,))
        out = self.value(source.size)
        self.steps.append(Join((source,), (Place(0, _contiguous(source.shape)),), out))
        return Read(out, 0, (source.size,), (1,))

    def compute(self, op: str, parts: Iterable[Ids], width: int, numbers: tuple[float, ...] = ()) -> Ids:
        """Append arithmetic and return the elements of its result."""
        reads = tuple(self.read(part) for part in parts)
        out = self.value(width)
        self.steps.append(Compute(op, reads, out, numbers))
        return self.elements(out)

    def map(self, op: str, *parts: Ids, shape: tuple[int, ...]) -> Ids:
        """Append an elementwise operation on parts that broadcast to ``shape``; return its elements in that shape."""
        whole = [np.broadcast_to(part, shape) for part in parts]
        axes = _folded(whole)
        found = self.compute(op, [part.reshape(axes) for part in whole], int(np.prod(shape, dtype=np.int64)))
        return found.reshape(shape)

    def _strided(self, ids: Ids) -> Read | None:
        if ids.size == 0:
            raise CannotWatch("an operation on nothing")
        node = int(ids.flat[0]) // _NODE
        if int(ids.min()) // _NODE != node or int(ids.max()) // _NODE != node:
            return None
        strides = _strides(ids)
        if strides is None:
            return None
        shape = ids.shape or (1,)
        strides = strides or (0,)
        if len(shape) > MOST_AXES:
            return None
        return Read(self._constants.get(node, node), int(ids.flat[0]) % _NODE, tuple(shape), strides)


def _required(one: Read | None) -> Read:
    if one is None:
        raise CannotWatch("elements are in no regular order")
    return one


def _without(x: Tensor, axis: int, many: int) -> tuple[int, ...]:
    shape = list(x.shape)
    if many == 1:
        del shape[axis]
    else:
        shape[axis] = abs(many)
    return tuple(shape)


def _offsets(x: Tensor, axis: int, many: int) -> Ids:
    """Return the place in memory of every element of the first token."""
    shape, strides = list(x.shape), list(x.stride())
    shape[axis], strides[axis] = abs(many), strides[axis] * (TOKENS if many < 0 else 1)
    if many == 1:
        del shape[axis], strides[axis]
    places = np.zeros(shape, dtype=np.int64)
    for i, (size, stride) in enumerate(zip(shape, strides, strict=True)):
        places += (np.arange(size, dtype=np.int64) * stride).reshape([-1 if j == i else 1 for j in range(len(shape))])
    return places + int(x.storage_offset())


def _contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(int(np.prod(shape[i + 1 :], dtype=np.int64)) for i in range(len(shape)))


def _strides(ids: Ids) -> tuple[int, ...] | None:
    """Return s with ``ids[i, j, ...] == ids[0, 0, ...] + i s_0 + j s_1 + ...``; None if there is no such thing."""
    first = ids[(0,) * ids.ndim]
    strides = [int(ids[tuple(1 if i == axis else 0 for i in range(ids.ndim))] - first) if ids.shape[axis] > 1 else 0
               for axis in range(ids.ndim)]  # fmt: skip
    want = np.full((1,) * ids.ndim, first, dtype=np.int64)
    for axis, stride in enumerate(strides):
        want = want + (np.arange(ids.shape[axis], dtype=np.int64) * stride).reshape(
            [-1 if i == axis else 1 for i in range(ids.ndim)]
        )
    return tuple(strides) if np.array_equal(want, ids) else None


def _pieces(ids: Ids) -> list[tuple[slice, ...]]:
    """Cut an array into regular pieces."""
    found: list[tuple[slice, ...]] = []
    waiting = [tuple(slice(0, size) for size in ids.shape)]
    while waiting:
        where = waiting.pop()
        part = ids[where]
        node = part.flat[0] // _NODE
        if part.min() // _NODE == node == part.max() // _NODE and _strides(part) is not None:
            found.append(where)
        else:
            axis, cuts = min(
                ((axis, cuts) for axis in range(part.ndim) if (cuts := _cuts(part, axis))), key=lambda pair: len(pair[1])
            )
            begin = where[axis].start
            ends = [*cuts, part.shape[axis]]
            for start, stop in zip([0, *cuts], ends, strict=True):
                waiting.append((*where[:axis], slice(begin + start, begin + stop), *where[axis + 1 :]))
        if len(found) + len(waiting) > _MOST_PIECES:
            raise CannotWatch("an array is put together of too many pieces")
    return found


def _cuts(part: Ids, axis: int) -> list[int]:
    """Return where the elements along an axis stop being regular."""
    moved = np.moveaxis(part, axis, 0).reshape(part.shape[axis], -1)
    steps = np.diff(moved, axis=0)
    same = (steps == steps[:, :1]).all(1) & ((moved[1:] // _NODE) == (moved[:-1] // _NODE)).all(1)
    cuts, i = [], 0
    while i < len(steps):
        if not same[i]:
            cuts.append(i + 1)
            i += 1
            continue
        stride, j = steps[i, 0], i
        while j < len(steps) and same[j] and steps[j, 0] == stride:
            j += 1
        if j < len(steps):
            cuts.append(j + 1)
        i = j + 1
    return cuts


def _folded(parts: list[Ids]) -> tuple[int, ...]:
    """Return the common shape of arrays with neighbouring axes joined wherever all of them allow it."""
    shape = parts[0].shape
    known = [_strides(part) for part in parts]
    if any(one is None for one in known):
        return tuple(size for size in shape if size > 1) or (1,)
    axes: list[int] = []
    last: list[int] | None = None
    for axis, size in enumerate(shape):
        if size == 1:
            continue
        strides = [one[axis] for one in known if one is not None]
        if last is not None and all(before == size * now for before, now in zip(last, strides, strict=True)):
            axes[-1] *= size
        else:
            axes.append(size)
        last = strides
    return tuple(axes) or (1,)


Handler = Callable[[Recorder, Any, Any, Any], Any]
