"""Products, convolutions and tables."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from quantkit.hf.lowering.operations.base import Operands, known
from quantkit.hf.lowering.record import Ids, Recorder
from quantkit.hf.lowering.trace import CannotWatch
from quantkit.kernels.program.definition import Linear
from quantkit.kernels.program.tape import Lookup, Product

_SMALL = 1 << 12
"""Elements of a stack of constants up to which they are multiplied as such, and not each as a linear layer."""


@known("mm", "addmm")
def _mm(recorder: Recorder, func: Any, args: Any, kwargs: Any) -> Any:
    bias, a, b = args if len(args) == 3 else (None, *args)
    if kwargs.get("alpha", 1) != 1 or kwargs.get("beta", 1) != 1:
        raise CannotWatch("it uses addmm with factors")
    out = func(*args, **kwargs)
    if not recorder.tracks(a) or recorder.tracks(b):
        raise CannotWatch("a product of two arrays of tokens")
    ids, axis, many = recorder.ids(a)
    if axis != 0:
        raise CannotWatch("a product mixes tokens")
    if many != 1:
        return recorder.track(out, _small(recorder, ids, b, bias), 0, many < 0)
    return recorder.track(out, linear(recorder, ids, b.t(), bias), 0)


def linear(recorder: Recorder, ids: Ids, weight: Any, bias: Tensor | None) -> Ids:
    """Append a linear layer with weight (out, in) and return the elements of its output."""
    rows, columns = weight.shape[-2:]
    if columns == 1:
        made = recorder.map("mul", ids.reshape(1), recorder.constant(weight[:, 0], (rows,)), shape=(rows,))
        return made if bias is None else recorder.map("add", made, recorder.constant(bias, (rows,)), shape=(rows,))
    read = recorder.run(ids)
    out = recorder.value(rows)
    found = weight.detach() if isinstance(weight, Tensor) else weight
    recorder.steps.append(Product(Linear(found, (rows, columns), None if bias is None else bias.detach()), (read,), out))
    return recorder.elements(out)


def _small(recorder: Recorder, ids: Ids, weight: Tensor, bias: Tensor | None) -> Ids:
    """Multiply several rows (m, k) of a token by a constant (k, n)."""
    m, (k, n) = ids.shape[0], weight.shape
    made = recorder.compute("contract", [ids.reshape(1, m, k), recorder.constant(weight.t(), (n, k))[None]], m * n)
    made = made.reshape(m, n)
    return made if bias is None else recorder.map("add", made, recorder.constant(bias, (n,)), shape=(m, n))


@known("bmm", "baddbmm")
def _bmm(recorder: Recorder, func: Any, args: Any, kwargs: Any) -> Any:
    if len(args) == 3:
        return _baddbmm(recorder, func, args, kwargs)
    a, b = args
    out = func(*args, **kwargs)
    if recorder.tracks(a) and recorder.tracks(b) and recorder.axis(a) != recorder.axis(b):
        raise CannotWatch("a product mixes tokens")
    tracked = a if recorder.tracks(a) else b
    axis, many = recorder.axis(tracked)
    if axis != 0:
        return _shared(recorder, out, a, b)

    def part(x: Tensor) -> Ids:
        if recorder.tracks(x):
            found, where, each = recorder.ids(x)
            if (where, each) != (0, many):
                raise CannotWatch("a product mixes tokens")
        else:
            found = recorder.constant_ids(x, 0, many)
        return found if many != 1 else found[None]

    m, n, k = a.shape[1], b.shape[2], a.shape[2]
    if not recorder.tracks(b) and many == 1 and m == 1 and k > 1:
        weight = b[0].t()
        if b.stride(0) and not torch.equal(b[:1].expand_as(b), b):
            raise CannotWatch("a weight differs from token to token")
        return recorder.track(out, linear(recorder, recorder.ids(a)[0], weight, None).reshape(1, n), 0)
    left, right, batch = part(a), np.swapaxes(part(b), 1, 2), abs(many)
    if k == 1:
        made = recorder.map("mul", left, np.swapaxes(right, 1, 2), shape=(batch, m, n))
    else:
        made = recorder.compute("contract", [left, right], batch * m * n).reshape(batch, m, n)
    return recorder.track(out, made if many != 1 else made[0], 0, many < 0)


def _baddbmm(recorder: Recorder, func: Any, args: Any, kwargs: Any) -> Any:
    added, a, b = args
    out = func(*args, **kwargs)
    product = _bmm(recorder, torch.ops.aten.bmm.default, (a, b), {})
    at = Operands(recorder, out, product)
    parts = []
    for part, factor in ((product, kwargs.get("alpha", 1)), (added, kwargs.get("beta", 1))):
        ids = at.ids(part)
        parts.append(ids if factor == 1 else recorder.map("mul", ids, at.ids(factor), shape=at.shape))
    return at.done(recorder.map("add", *parts, shape=at.shape))


def _shared(recorder: Recorder, out: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """A batch (b, T, k) of a token's parts by constants (b, k, n)."""
    if recorder.tracks(b) or recorder.axis(a) != (1, 1):
        raise CannotWatch("a product mixes tokens")
    ids = recorder.ids(a)[0]  # (b, k)
    if b.numel() > _SMALL:
        products = [linear(recorder, part, weight.t(), None) for part, weight in zip(ids, b, strict=True)]
        return recorder.track(out, np.stack(products), 1)
    weight = recorder.constant(b.transpose(1, 2), (b.shape[0], b.shape[2], b.shape[1]))
    made = recorder.compute("contract", [ids[:, None], weight], b.shape[0] * b.shape[2])
    return recorder.track(out, made.reshape(b.shape[0], b.shape[2]), 1)


@known("convolution", "conv1d")
def _convolution(recorder: Recorder, func: Any, args: Any, kwargs: Any) -> Any:
    x, weight, bias, stride, padding, dilation, transposed, _, groups = args
    out = func(*args, **kwargs)
    ids, axis, many = recorder.ids(x)
    if axis or many != 1 or x.ndim != 3 or transposed or list(stride) != [1] or list(dilation) != [1]:
        raise CannotWatch("it uses a convolution that programs do not have")
    if padding[0]:
        zero = recorder.constant(torch.tensor(0.0), (ids.shape[0], padding[0]))
        ids = np.concatenate([zero, ids, zero], 1)
    size, per_group = weight.shape[2], weight.shape[1]
    windows = np.lib.stride_tricks.sliding_window_view(ids, size, axis=1)  # (channels, places, size)
    places = windows.shape[1]
    if per_group == 1 and weight.shape[0] == groups:
        kernel = recorder.constant(weight[:, 0], (groups, size))[:, None]
        product = recorder.map("mul", np.ascontiguousarray(windows), kernel, shape=windows.shape)
        made = recorder.compute("sum", [product.reshape(-1, size)], groups * places).reshape(groups, places)
    else:
        inputs = windows.reshape(groups, per_group, places, size).transpose(0, 2, 1, 3).reshape(groups, places, -1)
        kernel = recorder.constant(weight, tuple(weight.shape)).reshape(groups, -1, per_group * size)
        made = recorder.compute("contract", [inputs, kernel], weight.shape[0] * places)
        made = made.reshape(groups, places, -1).transpose(0, 2, 1).reshape(-1, places)
    if bias is not None:
        made = recorder.map("add", made, recorder.constant(bias, bias.shape)[:, None], shape=made.shape)
    return recorder.track(out, made, 0)


@known("embedding")
def _embedding(recorder: Recorder, func: Any, args: Any, kwargs: Any) -> Any:
    table, index = args[:2]
    out = func(*args, **kwargs)
    if recorder.tracks(table):
        raise CannotWatch("it looks up rows of a table of tokens")
    return lookup(recorder, table.detach(), index, out)


def lookup(recorder: Recorder, table: Any, index: Tensor, out: Tensor) -> Tensor:
    """Track ``out`` as rows of a table."""
    ids, axis, _ = recorder.ids(index)
    made = []
    for one in ids.reshape(-1):
        value = recorder.value(out.shape[-1])
        recorder.steps.append(Lookup(table, (recorder.run(np.array([one])),), value))
        made.append(recorder.elements(value))
    return recorder.track(out, np.stack(made).reshape(*ids.shape, out.shape[-1]), axis)
