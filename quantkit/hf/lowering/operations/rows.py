"""Operations along axes of a token: sums, softmax, choices, norms."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from quantkit.hf.lowering.operations.base import Operands, Rows, known
from quantkit.hf.lowering.record import Ids, Recorder
from quantkit.hf.lowering.trace import CannotWatch
from quantkit.kernels.program.tape import POSITION


def _dims(args: Any, kwargs: Any, at: int = 1) -> Any:
    return kwargs.get("dim", args[at] if len(args) > at else None)


@known("sum", "mean", "amax", "amin", "max", "min", "any", "all", "linalg_vector_norm")
def _reduce(recorder: Recorder, func: Any, args: Any, kwargs: Any) -> Any:
    name = func._schema.name.removeprefix("aten::")
    if name in ("max", "min") and len(args) > 1 and isinstance(args[1], Tensor):
        return _binary_named(recorder, func, args, kwargs, name)
    out = func(*args, **kwargs)
    x = args[0]
    dims = _dims(args, kwargs, 2 if name == "linalg_vector_norm" else 1)
    if name == "max" and dims is None and (recorder.ids(x)[0] == recorder.elements(POSITION)).all():
        return out  # the length of a sequence, which nothing may hang on: the proof far from the beginning would notice
    rows = Rows(recorder, x, dims)
    ids = rows.rows()
    count = ids.shape[0]
    one = recorder.constant(torch.tensor(1.0 / rows.n), ())
    if name in ("max", "min"):
        first = recorder.compute("a" + name, [ids], count) if not isinstance(out, tuple) else None
        if first is not None:
            return rows.reduced(out, first)
        flipped = ids if name == "max" else recorder.map("neg", ids, shape=ids.shape)
        both = recorder.compute("topk", [flipped], 2 * count, (1.0,))
        values = both[:count] if name == "max" else recorder.map("neg", both[:count], shape=(count,))
        return type(out)((rows.reduced(out[0], values), rows.reduced(out[1], both[count:])))
    if name == "linalg_vector_norm":
        order = args[1] if len(args) > 1 else kwargs.get("ord", 2)
        if order == 1:
            return rows.reduced(out, recorder.compute("sum", [recorder.map("abs", ids, shape=ids.shape)], count))
        if order != 2:
            raise CannotWatch("it uses a norm of another kind")
        total = recorder.compute("sum", [recorder.map("square", ids, shape=ids.shape)], count)
        return rows.reduced(out, recorder.map("sqrt", total, shape=total.shape))
    made = recorder.compute({"mean": "sum", "any": "amax", "all": "amin"}.get(name, name), [ids], count)
    return rows.reduced(out, recorder.map("mul", made, one, shape=made.shape) if name == "mean" else made)


def _binary_named(recorder: Recorder, func: Any, args: Any, kwargs: Any, name: str) -> Any:
    at = Operands(recorder, func(*args, **kwargs), *args[:2])
    return at.done(recorder.map(name, at.ids(args[0]), at.ids(args[1]), shape=at.shape))


@known("var", "var_mean")
def _var(recorder: Recorder, func: Any, args: Any, kwargs: Any) -> Any:
    name = func._schema.name.removeprefix("aten::")
    if name != "var":
        raise CannotWatch("it uses var_mean, which programs do not have")
    rows = Rows(recorder, args[0], _dims(args, kwargs))
    correction = kwargs.get("correction", 1)
    correction = 0 if (len(args) > 2 and args[2] is False) else 1 if correction is None else correction
    ids = rows.rows()
    count = ids.shape[0]
    mean = _mean(recorder, ids)
    apart = recorder.map("sub", ids, np.broadcast_to(mean[:, None], ids.shape), shape=ids.shape)
    total = recorder.compute("sum", [recorder.map("square", apart, shape=ids.shape)], count)
    factor = recorder.constant(torch.tensor(1.0 / (rows.n - correction)), ())
    return rows.reduced(func(*args, **kwargs), recorder.map("mul", total, factor, shape=total.shape))


def _mean(recorder: Recorder, ids: Ids) -> Ids:
    total = recorder.compute("sum", [ids], ids.shape[0])
    return recorder.map("mul", total, recorder.constant(torch.tensor(1.0 / ids.shape[1]), ()), shape=total.shape)


@known("_softmax", "cumsum", "_log_softmax")
def _along(recorder: Recorder, func: Any, args: Any, kwargs: Any) -> Any:
    name = func._schema.name.removeprefix("aten::")
    out = func(*args, **kwargs)
    rows = Rows(recorder, args[0], args[1])
    ids = rows.rows()
    made = recorder.compute({"cumsum": "cumsum"}.get(name, "softmax"), [ids], ids.size)
    if name == "_log_softmax":
        made = recorder.map("log", made, shape=made.shape)
    return recorder.track(out, rows.back(made), rows.axis)


@known("topk", "sort")
def _topk(recorder: Recorder, func: Any, args: Any, kwargs: Any) -> Any:
    out = func(*args, **kwargs)
    name = func._schema.name.removeprefix("aten::")
    x = args[0]
    if name == "topk":
        dim = kwargs.get("dim", args[2] if len(args) > 2 else -1)
        falling = kwargs.get("largest", args[3] if len(args) > 3 else True)
        k = args[1]
    else:
        # sort.default(x, dim, descending), sort.stable(x, *, stable, dim, descending)
        dim = kwargs.get("dim", args[1] if len(args) > 1 else -1)
        falling = kwargs.get("descending", args[2] if len(args) > 2 else False)
        k = x.shape[dim]
    rows = Rows(recorder, x, dim)
    ids = rows.rows()
    ids = ids if falling else recorder.map("neg", ids, shape=ids.shape)
    count = ids.shape[0]
    both = recorder.compute("topk", [ids], 2 * count * k, (float(k),))
    values = both[: count * k]
    values = values if falling else recorder.map("neg", values, shape=values.shape)
    for part, found in ((out[0], values), (out[1], both[count * k :])):
        recorder.track(part, rows.back(found, k), rows.axis)
    return out


@known("gather")
def _gather(recorder: Recorder, func: Any, args: Any, kwargs: Any) -> Any:
    x, dim, index = args[:3]
    out = func(*args, **kwargs)
    if not recorder.tracks(index):
        raise CannotWatch("elements are picked by a constant")
    picks = Rows(recorder, index, dim)
    chosen = picks.rows()
    if recorder.tracks(x):
        rows = Rows(recorder, x, dim)
        ids = rows.rows()
        if rows.axis != picks.axis:
            raise CannotWatch("elements are picked from other tokens")
    else:
        ids = picks.rows(recorder.constant_ids(x, picks.axis, picks.many))
    if ids.shape[0] != chosen.shape[0]:
        raise CannotWatch("elements are picked from a part of an array")
    made = recorder.compute("gather", [ids, chosen], chosen.size)
    return recorder.track(out, picks.back(made), picks.axis)


@known("scatter", "scatter_", "scatter_add", "scatter_add_")
def _scatter(recorder: Recorder, func: Any, args: Any, kwargs: Any) -> Any:
    x, dim, index, source = args[:4]
    if kwargs or len(args) > 4 or not recorder.tracks(index):
        raise CannotWatch("it scatters in an unusual way")
    name = func._schema.name.removeprefix("aten::")
    picks = Rows(recorder, index, dim)
    if recorder.tracks(x):
        base = Rows(recorder, x, dim).rows()
    else:
        own = recorder.constant_ids(x, picks.axis, picks.many)
        base = picks.rows(own)
    chosen = picks.rows()
    if isinstance(source, Tensor) and recorder.tracks(source):
        values = Rows(recorder, source, dim).rows()
    elif isinstance(source, Tensor) and source.ndim:
        values = picks.rows(recorder.constant_ids(source, picks.axis, picks.many))
    else:
        values = recorder.constant(torch.as_tensor(source, dtype=torch.float32), chosen.shape)
    if values.shape != chosen.shape or base.shape[0] != chosen.shape[0]:
        raise CannotWatch("it scatters a part of an array")
    made = recorder.compute("scatter", [base, chosen, values], base.size, (float("add" in name),))
    made = picks.back(made, base.shape[1])
    if not name.endswith("_"):
        return recorder.track(func(*args), made, picks.axis)
    if not recorder.tracks(x):
        recorder.adopt(x, picks.axis)
    func(*args)
    recorder.assign(x, made)
    return x


@known("native_layer_norm", "_fused_rms_norm")
def _norm(recorder: Recorder, func: Any, args: Any, kwargs: Any) -> Any:
    out = func(*args, **kwargs)
    center = "layer" in func._schema.name
    x, shape, weight = args[:3]
    bias, eps = (args[3], args[4]) if center else (None, args[3])
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    if len(shape) != 1:
        raise CannotWatch("it normalizes over several axes")
    ids, axis, _ = recorder.ids(x)
    n = shape[0]
    gain = recorder.constant(torch.ones(n) if weight is None else weight, (n,))
    shift = recorder.constant(torch.zeros(n) if bias is None else bias, (n,))
    made = recorder.compute("norm", [ids.reshape(-1, n), gain, shift], ids.size, (float(eps), float(center)))
    recorder.track(out[0], made.reshape(ids.shape), axis)
    return out
