"""Operations that only move elements, and those that depend on their values."""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from quantkit.hf.lowering.operations.base import known
from quantkit.hf.lowering.operations.products import lookup
from quantkit.hf.lowering.record import Recorder
from quantkit.hf.lowering.trace import TOKENS, CannotWatch

_MOVES = (
    "clone cat stack _to_copy repeat roll flip constant_pad_nd slice_scatter select_scatter tril triu "
    "repeat_interleave unsqueeze_copy permute_copy view_copy expand_copy contiguous narrow_copy take_along_dim"
)
_VALUE = 1 << 40  # room for the numbers of elements, above which a token is written


@known(*_MOVES.split())
def _move(recorder: Recorder, func: Any, args: Any, kwargs: Any) -> Any:
    out = func(*args, **kwargs)
    moved = func(*_numbers(recorder, args), **{k: v for k, v in kwargs.items() if k not in ("dtype", "device", "pin_memory")})
    _take(recorder, out, moved)
    return out


def _numbers(recorder: Recorder, args: Any) -> Any:
    """Replace floating arguments that elements may come from by their numbers: of the token, then of the element."""
    axes = [(recorder.axis(one)[0] - one.ndim) for one in tree_leaves(args) if isinstance(one, Tensor) and recorder.tracks(one)]
    leaves, shape = tree_flatten(args)
    return tree_unflatten([_number(recorder, one, axes[0]) for one in leaves], shape)


def _number(recorder: Recorder, one: Any, axis_from_end: int) -> Any:
    if not isinstance(one, Tensor):
        return one
    tokens = torch.arange(TOKENS) * _VALUE
    if recorder.tracks(one):
        ids, axis, many = recorder.ids(one)
        whole = torch.from_numpy(np.ascontiguousarray(ids))
        whole = whole.unsqueeze(axis) if many == 1 else whole
        if many < 0:
            places = tokens.repeat(-many).reshape([-1 if i == axis else 1 for i in range(one.ndim)])
            return whole.repeat_interleave(TOKENS, axis) + places
        spread = tokens.repeat_interleave(many)
        repeats = [TOKENS if i == axis else 1 for i in range(one.ndim)]
        return whole.repeat(repeats) + spread.reshape([-1 if i == axis else 1 for i in range(one.ndim)])
    if not one.is_floating_point() and one.dtype != torch.bool:
        return one  # an index
    axis = axis_from_end + one.ndim
    if axis < 0 or one.shape[axis] != TOKENS:
        raise CannotWatch("constants are put between tokens")
    part = torch.from_numpy(recorder.constant_ids(one, axis, 1).copy()).unsqueeze(axis)
    return part.repeat([TOKENS if i == axis else 1 for i in range(one.ndim)]) + tokens.reshape(
        [-1 if i == axis else 1 for i in range(one.ndim)]
    )


def _take(recorder: Recorder, out: Tensor, moved: Tensor) -> None:
    """Track ``out`` by an array of the numbers that :func:`_numbers` gave."""
    token = moved // _VALUE
    for axis in range(moved.ndim):
        size = moved.shape[axis]
        if size % TOKENS or not size:
            continue
        many = size // TOKENS
        want = torch.arange(TOKENS).repeat_interleave(many).reshape([-1 if i == axis else 1 for i in range(moved.ndim)])
        if torch.equal(want.expand_as(token), token):
            first = (moved.narrow(axis, 0, many) % _VALUE).numpy()
            first = first if many > 1 else first.squeeze(axis)
            recorder.track(out, first, axis)
            return
        want = torch.arange(TOKENS).repeat(many).reshape([-1 if i == axis else 1 for i in range(moved.ndim)])
        if torch.equal(want.expand_as(token), token):
            rounds = moved.unflatten(axis, (many, TOKENS)).select(axis + 1, 0)
            recorder.track(out, (rounds % _VALUE).numpy(), axis, inner=True)
            return
    raise CannotWatch("elements of different tokens are put into one")


@known("copy_")
def _copy(recorder: Recorder, func: Any, args: Any, kwargs: Any) -> Any:
    target, source = args[:2]
    if recorder.tracks(source):
        ids, axis, many = recorder.ids(source)
        axis += target.ndim - source.ndim
        if not recorder.tracks(target):
            recorder.adopt(target, axis)
        where, each = recorder.axis(target)
        if (where, each) != (axis, many):
            raise CannotWatch("elements are copied to other tokens")
        recorder.assign(target, ids)
    else:
        axis, many = recorder.axis(target)
        recorder.assign(target, recorder.constant_ids(source.expand_as(target), axis, many))
    func(*args, **kwargs)
    return target


@known("fill_", "zero_")
def _fill(recorder: Recorder, func: Any, args: Any, kwargs: Any) -> Any:
    target = args[0]
    func(*args, **kwargs)
    value = args[1] if len(args) > 1 else 0.0
    if isinstance(value, Tensor) and recorder.tracks(value):
        raise CannotWatch("an array is filled with an element")
    recorder.assign(target, recorder.constant(torch.as_tensor(value, dtype=torch.float32), ()))
    return target


@known("index_select")
def _index_select(recorder: Recorder, func: Any, args: Any, kwargs: Any) -> Any:
    x, dim, index = args
    if recorder.tracks(index):
        if recorder.tracks(x) or x.ndim != 2 or dim != 0:
            raise CannotWatch("elements are picked by values")
        return lookup(recorder, x.detach(), index, func(*args))
    return _move(recorder, func, args, kwargs)


@known("index")
def _index(recorder: Recorder, func: Any, args: Any, kwargs: Any) -> Any:
    x, indices = args
    out = func(*args, **kwargs)
    if len(indices) == 1 and not recorder.tracks(x) and recorder.tracks(indices[0]) and x.ndim == 2 and x.is_floating_point():
        return lookup(recorder, x.detach(), indices[0], out)
    if any(one is not None and recorder.tracks(one) for one in indices):
        raise CannotWatch("elements are picked by values")
    moved = func(_number(recorder, x, recorder.axis(x)[0] - x.ndim), indices)
    _take(recorder, out, moved)
    return out


@known("index_put", "index_put_")
def _index_put(recorder: Recorder, func: Any, args: Any, kwargs: Any) -> Any:
    raise CannotWatch("elements are put where values say")


@known("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "unique", "_unique2", "bincount")
def _depends(recorder: Recorder, func: Any, args: Any, kwargs: Any) -> Any:
    name = func._schema.name.removeprefix("aten::")
    raise CannotWatch(f"what it does next depends on values ({name})")


@known("_assert_async", "_assert_scalar", "record_stream")
def _nothing(recorder: Recorder, func: Any, args: Any, kwargs: Any) -> Any:
    return func(*args, **kwargs)
