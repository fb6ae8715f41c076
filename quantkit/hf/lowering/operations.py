"""What each torch operation means for the elements of a token; see :mod:`quantkit.hf.lowering.record`."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from quantkit.hf.lowering.record import Ids, Recorder
from quantkit.hf.lowering.trace import TOKENS, CannotWatch
from quantkit.kernels.program.definition import Linear
from quantkit.kernels.program.tape import POSITION, Lookup, Product

Handler = Callable[[Recorder, Any, Any, Any], Any]
HANDLERS: dict[str, Handler] = {}
"""Name of an operation (of its overload packet) to what it does."""

_UNARY = (
    "neg abs exp log sqrt rsqrt reciprocal square sigmoid tanh silu relu sin cos erf floor sign expm1 log1p softplus".split()
)
_BINARY = {
    "mul": "mul", "div": "div", "maximum": "max", "minimum": "min", "lt": "lt", "le": "le", "gt": "gt", "ge": "ge", "eq": "eq",
    "ne": "ne", "pow": "pow", "bitwise_and": "mul", "logical_and": "mul", "bitwise_or": "max", "logical_or": "max",
}  # fmt: skip
_MOVES = (
    "clone cat stack _to_copy repeat roll flip constant_pad_nd slice_scatter select_scatter tril triu "
    "repeat_interleave unsqueeze_copy permute_copy view_copy expand_copy contiguous narrow_copy take_along_dim"
).split()
_FACTORIES = (
    "new_zeros new_ones new_empty new_full zeros_like ones_like empty_like full_like new_empty_strided rand_like randn_like"
).split()
_VALUE = 1 << 40  # room for the numbers of elements, above which a token is written


def handle(recorder: Recorder, func: Any, args: Any, kwargs: Any) -> Any:
    """Run an operation with tracked arguments and record it.

    Raises:
        CannotWatch: the operation is not known, or mixes tokens.
    """
    name = func._schema.name.removeprefix("aten::").removeprefix("quantkit::")
    in_place = func._schema.is_mutable and name.endswith("_")
    plain = name.removesuffix("_") if in_place else name
    handler = HANDLERS.get(name) or HANDLERS.get(plain)
    if name in _FACTORIES:
        out = func(*args, **kwargs)
        return out.zero_() if "empty" in name else out
    if handler is None:
        out = func(*args, **kwargs)
        if all(recorder.tracks(one) for one in tree_leaves(out) if isinstance(one, Tensor)) and not in_place:
            return out
        raise CannotWatch(f"it uses {name}, which programs do not have")
    if in_place and name not in HANDLERS:
        return _in_place(recorder, func, args, kwargs, handler)
    return handler(recorder, func, args, kwargs)


def _in_place(recorder: Recorder, func: Any, args: Any, kwargs: Any, handler: Handler) -> Any:
    """Compute as if into new memory, and assign the result's elements to the old."""
    name = func._schema.name.removesuffix("_")
    packet = getattr(torch.ops.aten, name.removeprefix("aten::"))
    target = args[0]
    with torch.utils._python_dispatch._disable_current_modes():
        before = target.clone()
    made = handler(recorder, getattr(packet, func._overloadname), args, kwargs)
    ids, axis, _ = recorder.ids(made)
    del before
    if not recorder.tracks(target):
        recorder.adopt(target, axis)
    func(*args, **kwargs)
    recorder.assign(target, ids)
    return target


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
        if out.shape[self.axis] != TOKENS * self.many:
            raise CannotWatch("an operation mixes tokens")
        shape = list(out.shape)
        shape[self.axis] = self.many
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
            whole = found if self.many > 1 else np.expand_dims(found, axis)
        elif axis < 0 or part.shape[axis] == 1:
            whole = recorder.constant(part, tuple(part.shape))
        else:
            whole = recorder.constant_ids(part, axis, self.many)
            whole = whole if self.many > 1 else np.expand_dims(whole, axis)
        whole = np.broadcast_to(whole, self._whole)
        return whole if self.many > 1 else whole.squeeze(self.axis)

    def done(self, ids: Ids) -> Tensor:
        """Track the output as these elements."""
        return self.recorder.track(self.out, ids.reshape(self.shape), self.axis)


@known(*_UNARY)
def _unary(recorder: Recorder, func: Any, args: Any, kwargs: Any) -> Any:
    name = func._schema.name.removeprefix("aten::")
    if name == "softplus" and (len(args) > 1 or kwargs):
        raise CannotWatch("it uses a softplus with parameters")
    at = Operands(recorder, func(*args, **kwargs), args[0])
    return at.done(recorder.map(name, at.ids(args[0]), shape=at.shape))


@known("logical_not", "bitwise_not")
def _not(recorder: Recorder, func: Any, args: Any, kwargs: Any) -> Any:
    at = Operands(recorder, func(*args, **kwargs), args[0])
    return at.done(recorder.map("not", at.ids(args[0]), shape=at.shape))


@known("gelu")
def _gelu(recorder: Recorder, func: Any, args: Any, kwargs: Any) -> Any:
    at = Operands(recorder, func(*args, **kwargs), args[0])
    kind = "gelu_tanh" if kwargs.get("approximate") == "tanh" else "gelu"
    return at.done(recorder.map(kind, at.ids(args[0]), shape=at.shape))


@known(*_BINARY)
def _binary(recorder: Recorder, func: Any, args: Any, kwargs: Any) -> Any:
    name = func._schema.name.removeprefix("aten::").removesuffix("_")
    if kwargs.get("rounding_mode"):
        if kwargs["rounding_mode"] != "floor":
            raise CannotWatch("it divides with truncation")
        at = Operands(recorder, func(*args, **kwargs), *args[:2])
        exact = recorder.map("div", at.ids(args[0]), at.ids(args[1]), shape=at.shape)
        return at.done(recorder.map("floor", exact, shape=at.shape))
    out = func(*args, **kwargs)
    if out.is_complex():
        if name != "mul":
            raise CannotWatch("it computes with complex numbers")
        return _complex_product(recorder, out, *args[:2])
    at = Operands(recorder, out, *args[:2])
    a, b = at.ids(args[0]), at.ids(args[1])
    if name == "pow" and not isinstance(args[1], Tensor) and float(args[1]) in _POWERS:
        return at.done(_power(recorder, a, float(args[1]), at.shape))
    return at.done(recorder.map(_BINARY[name], a, b, shape=at.shape))


_POWERS = {2.0: "square", 0.5: "sqrt", -0.5: "rsqrt", -1.0: "reciprocal", 1.0: "copy"}


def _power(recorder: Recorder, a: Ids, exponent: float, shape: tuple[int, ...]) -> Ids:
    return a if exponent == 1.0 else recorder.map(_POWERS[exponent], a, shape=shape)


@known("floor_divide")
def _floor_divide(recorder: Recorder, func: Any, args: Any, kwargs: Any) -> Any:
    at = Operands(recorder, func(*args, **kwargs), *args[:2])
    exact = recorder.map("div", at.ids(args[0]), at.ids(args[1]), shape=at.shape)
    return at.done(recorder.map("floor", exact, shape=at.shape))


@known("add", "sub", "rsub")
def _add(recorder: Recorder, func: Any, args: Any, kwargs: Any) -> Any:
    name = func._schema.name.removeprefix("aten::").removesuffix("_")
    at = Operands(recorder, func(*args, **kwargs), *args[:2])
    a, b = at.ids(args[0]), at.ids(args[1])
    a, b = (b, a) if name == "rsub" else (a, b)
    alpha = kwargs.get("alpha", args[2] if len(args) > 2 else 1)
    if alpha != 1:
        b = recorder.map("mul", b, at.ids(alpha), shape=at.shape)
    return at.done(recorder.map("add" if name == "add" else "sub", a, b, shape=at.shape))


@known("addcmul")
def _addcmul(recorder: Recorder, func: Any, args: Any, kwargs: Any) -> Any:
    at = Operands(recorder, func(*args, **kwargs), *args[:3])
    product = recorder.map("mul", at.ids(args[1]), at.ids(args[2]), shape=at.shape)
    if kwargs.get("value", 1) != 1:
        product = recorder.map("mul", product, at.ids(kwargs["value"]), shape=at.shape)
    return at.done(recorder.map("add", at.ids(args[0]), product, shape=at.shape))


@known("lerp")
def _lerp(recorder: Recorder, func: Any, args: Any, kwargs: Any) -> Any:
    at = Operands(recorder, func(*args, **kwargs), *args[:3])
    a, b, w = (at.ids(part) for part in args[:3])
    part = recorder.map("mul", w, recorder.map("sub", b, a, shape=at.shape), shape=at.shape)
    return at.done(recorder.map("add", a, part, shape=at.shape))


@known("clamp", "clamp_min", "clamp_max", "hardtanh")
def _clamp(recorder: Recorder, func: Any, args: Any, kwargs: Any) -> Any:
    name = func._schema.name.removeprefix("aten::").removesuffix("_")
    names = {"clamp_min": ("min",), "clamp_max": ("max",)}.get(name, ("min", "max"))
    limits = {**dict(zip(names, args[1:], strict=False)), **{k: v for k, v in kwargs.items() if k in ("min", "max")}}
    at = Operands(recorder, func(*args, **kwargs), args[0], *limits.values())
    ids = at.ids(args[0])
    for which, op in (("min", "max"), ("max", "min")):
        if limits.get(which) is not None:
            ids = recorder.map(op, ids, at.ids(limits[which]), shape=at.shape)
    return at.done(ids)


@known("leaky_relu")
def _leaky(recorder: Recorder, func: Any, args: Any, kwargs: Any) -> Any:
    at = Operands(recorder, func(*args, **kwargs), args[0])
    a = at.ids(args[0])
    slope = at.ids(args[1] if len(args) > 1 else 0.01)
    low = recorder.map("mul", a, slope, shape=at.shape)
    positive = recorder.map("gt", a, at.ids(0.0), shape=at.shape)
    return at.done(recorder.map("where", positive, a, low, shape=at.shape))


@known("where")
def _where(recorder: Recorder, func: Any, args: Any, kwargs: Any) -> Any:
    if len(args) != 3:
        raise CannotWatch("it looks for values")
    at = Operands(recorder, func(*args, **kwargs), *args)
    return at.done(recorder.map("where", *(at.ids(part) for part in args), shape=at.shape))


@known("masked_fill")
def _masked_fill(recorder: Recorder, func: Any, args: Any, kwargs: Any) -> Any:
    at = Operands(recorder, func(*args, **kwargs), *args)
    x, mask, value = (at.ids(part) for part in args)
    return at.done(recorder.map("where", mask, value, x, shape=at.shape))


# -- along an axis


class Rows:
    """A tensor's elements as (outer, n), n being the joined length of some axes; puts results back in order."""

    def __init__(self, recorder: Recorder, x: Tensor, dims: Any) -> None:
        self.recorder = recorder
        dims = range(x.ndim) if dims is None or dims == [] else [dims] if isinstance(dims, int) else dims
        self.dims = sorted({dim % x.ndim for dim in dims})
        self.ids, self.axis, self.many = recorder.ids(x)
        if self.axis in self.dims:
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


# -- complex numbers: an axis of real and imaginary parts more, at the end


@known("polar")
def _polar(recorder: Recorder, func: Any, args: Any, kwargs: Any) -> Any:
    out = func(*args, **kwargs)
    real = torch.view_as_real(out)
    at = Operands(recorder, func(*args, **kwargs).real.clone(), *args)
    size, angle = at.ids(args[0]), at.ids(args[1])
    parts = [recorder.map("mul", size, recorder.map(op, angle, shape=at.shape), shape=at.shape) for op in ("cos", "sin")]
    recorder.track(real, np.stack(parts, -1), at.axis)
    return out


def _complex_product(recorder: Recorder, out: Tensor, a: Any, b: Any) -> Tensor:
    real = torch.view_as_real(out)
    sides = [_as_pairs(part) for part in (a, b)]
    at = Operands(recorder, real, *sides)
    shape = at.shape[:-1]

    def product(x: Ids, y: Ids) -> Ids:
        return recorder.map("mul", x, y, shape=shape)

    (ar, ai), (br, bi) = ((ids[..., 0], ids[..., 1]) for ids in (at.ids(side) for side in sides))
    if not all(isinstance(part, Tensor) and part.is_complex() for part in (a, b)):
        parts = [product(ar, br), product(ai, bi)]  # the real one's are both itself
    else:
        parts = [
            recorder.map("sub", product(ar, br), product(ai, bi), shape=shape),
            recorder.map("add", product(ar, bi), product(ai, br), shape=shape),
        ]
    recorder.track(real, np.stack(parts, -1), at.axis)
    return out


def _as_pairs(x: Any) -> Any:
    if not isinstance(x, Tensor):
        return x
    return torch.view_as_real(x) if x.is_complex() else x.unsqueeze(-1)


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


# -- products


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
    if many > 1:
        return recorder.track(out, _small(recorder, ids, b, bias), 0)
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
        return found if many > 1 else found[None]

    m, n, k = a.shape[1], b.shape[2], a.shape[2]
    if not recorder.tracks(b) and many == 1 and m == 1 and k > 1:
        weight = b[0].t()
        if b.stride(0) and not torch.equal(b[:1].expand_as(b), b):
            raise CannotWatch("a weight differs from token to token")
        return recorder.track(out, linear(recorder, recorder.ids(a)[0], weight, None).reshape(1, n), 0)
    left, right = part(a), np.swapaxes(part(b), 1, 2)
    if k == 1:
        made = recorder.map("mul", left, np.swapaxes(right, 1, 2), shape=(many, m, n))
    else:
        made = recorder.compute("contract", [left, right], many * m * n).reshape(many, m, n)
    return recorder.track(out, made if many > 1 else made[0], 0)


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
    weight = recorder.constant(b.transpose(1, 2), (b.shape[0], b.shape[2], b.shape[1]))
    made = recorder.compute("contract", [ids[:, None], weight], b.shape[0] * b.shape[2])
    return recorder.track(out, made.reshape(b.shape[0], b.shape[2]), 1)


@known("convolution", "conv1d")
def _convolution(recorder: Recorder, func: Any, args: Any, kwargs: Any) -> Any:
    x, weight, bias, stride, padding, dilation, transposed, _, groups = args
    out = func(*args, **kwargs)
    ids, axis, many = recorder.ids(x)
    if axis or many > 1 or x.ndim != 3 or transposed or list(stride) != [1] or list(dilation) != [1]:
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


# -- elements that only move


@known(*_MOVES)
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


__all__ = ["HANDLERS", "handle", "linear", "lookup", "tree_map"]
