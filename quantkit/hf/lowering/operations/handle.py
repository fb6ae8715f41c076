"""Run an operation on tracked tensors, and record what it means."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from quantkit.hf.lowering.operations import elementwise, moves, products, rows  # each knows some operations
from quantkit.hf.lowering.operations.base import HANDLERS
from quantkit.hf.lowering.record import Handler, Recorder
from quantkit.hf.lowering.trace import CannotWatch

_FACTORIES = (
    "new_zeros new_ones new_empty new_full zeros_like ones_like empty_like full_like new_empty_strided rand_like randn_like"
)


def handle(recorder: Recorder, func: Any, args: Any, kwargs: Any) -> Any:
    """Run an operation with tracked arguments and record it.

    Raises:
        CannotWatch: the operation is not known, or mixes tokens.
    """
    name = func._schema.name.removeprefix("aten::").removeprefix("quantkit::")
    in_place = func._schema.is_mutable and name.endswith("_")
    plain = name.removesuffix("_") if in_place else name
    handler = HANDLERS.get(name) or HANDLERS.get(plain)
    if name in _FACTORIES.split():
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


__all__ = ["elementwise", "handle", "moves", "products", "rows"]
