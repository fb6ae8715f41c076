"""Elementwise operations, on complex numbers too."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from quantkit.hf.lowering.operations.base import Operands, known
from quantkit.hf.lowering.record import Ids, Recorder
from quantkit.hf.lowering.trace import CannotWatch

_UNARY_NAMES = "neg abs exp log sqrt rsqrt reciprocal square sigmoid tanh silu relu sin cos erf floor sign expm1 log1p softplus"
_BINARY = {
    "mul": "mul", "div": "div", "maximum": "max", "minimum": "min", "lt": "lt", "le": "le", "gt": "gt", "ge": "ge", "eq": "eq",
    "ne": "ne", "pow": "pow", "bitwise_and": "mul", "logical_and": "mul", "bitwise_or": "max", "logical_or": "max",
}  # fmt: skip


@known(*_UNARY_NAMES.split())
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
