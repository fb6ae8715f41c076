"""Take a model apart at its blocks: what each block is called with, one block at a time, and what comes after the last.

The sequential walk needs the input of the first block, then runs block after block by itself. Which masks, position
embeddings and flags a block is called with differs between families (and between layers, where sliding and full attention
alternate), so nothing is assumed: :func:`record_block_calls` runs the model's own forward with every block's ``forward``
replaced by one that hands its input on, and writes down the calls. No block computes; cost is the embedding and the masks.
:func:`finish` uses the same trick backwards: the stand-in of the last block returns a given hidden state, so the model's own
norm and head make logits of it.

This is exact only if blocks pass nothing but the hidden state, unchanged, to each other. What can be seen while recording
(a layer that is skipped or repeated, a hidden state changed on the way) is an error at once; :func:`check_chain` compares the
chain with the real forward and catches the rest. A container that the model hands to its blocks (a cache, a shared dictionary)
is copied for every call, so that nothing can be exchanged through it without :func:`check_chain` noticing.

Where blocks do exchange more, :func:`why_entangled` says so, and the model is run as a whole instead: see
:mod:`quantkit.nn.probing` and :mod:`quantkit.calibrate.flow`.
"""

import copy
from collections import UserDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quantkit.errors import CalibrationError, QuantkitError, SpecError
from quantkit.nn.embedding import input_table
from quantkit.nn.sites import Structure

_OUTPUT_FORMS: tuple[Callable[[Tensor], Any], ...] = (lambda h: h, lambda h: (h,), lambda h: (h, None))
"""What a model may expect a block to return: the hidden state, or a tuple that begins with it."""

CANNOT_RUN = (TypeError, ValueError, ArithmeticError, RuntimeError, AttributeError, LookupError, AssertionError)
"""What a model raises that is not run as it expects."""

_SHARED = (type(None), bool, int, float, str, bytes, torch.dtype, torch.device)
"""Arguments of blocks that hold no state, and are handed on as they are, like functions and modules."""


@dataclass(frozen=True, slots=True)
class BlockCalls:
    """How a model calls its blocks on one batch.

    Attributes:
        hidden: input of the first block (B, T, H), in the model's dtype.
        calls: for each block, the positional arguments after the hidden state, and the keyword arguments. A tensor that
            several blocks share is one object here too.
    """

    hidden: Tensor
    calls: tuple[tuple[tuple[Any, ...], dict[str, Any]], ...]


@contextmanager
def running_alone(model: nn.Module) -> Iterator[None]:
    """Name a model whose own forward fails on token ids: a part of another model, or one that wants more than tokens.

    Raises:
        QuantkitError: instead of what the model raises.
    """
    try:
        yield
    except CANNOT_RUN as error:
        raise QuantkitError(
            f"{type(model).__name__} cannot be run on token ids alone: {type(error).__name__}: {error}; give a causal language "
            "model that can, or the whole that this one is a part of"
        ) from error


class _StackDone(Exception):
    """Raised by a stand-in to leave the model's forward, whose rest is not wanted; not an error."""


def record_block_calls(model: nn.Module, structure: Structure, ids: Tensor, mask: Tensor | None = None) -> BlockCalls:
    """Run the model up to its blocks and return what each of them is called with; no block computes.

    Args:
        model: the model ``structure`` describes, in evaluation mode; its blocks' weights are not read (may be on meta).
        structure: from :func:`quantkit.hf.structure.describe`.
        ids: int64 (B, T).
        mask: bool (B, T), False for padding on either side; None for none.

    Raises:
        SpecError: if blocks are not called one after the other on each other's unchanged output.
        CalibrationError: if the model is in training mode.
    """
    inputs: list[Tensor] = []
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def visit(index: int, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        inputs.append(hidden)
        calls.append(own_containers(args, kwargs))
        if len(calls) == len(structure.blocks):
            raise _StackDone
        return hidden

    with suppress(_StackDone):
        _drive(model, structure, ids, mask, visit, _output_form(model, structure))
    return BlockCalls(inputs[0], tuple(calls))


def call_block(block: nn.Module, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Run one block on ``hidden`` (B, T, H) and return its hidden state (B, T, H), whatever it wraps it in.

    Raises:
        SpecError: if the block returns neither a tensor nor a tuple that begins with one, of the input's shape.
    """
    output = block(hidden, *args, **kwargs)
    result = output[0] if isinstance(output, tuple | list) and output else output
    if not isinstance(result, Tensor) or result.shape != hidden.shape:
        got = tuple(result.shape) if isinstance(result, Tensor) else type(result).__name__
        raise SpecError(f"{type(block).__name__} returned {got}; want a hidden state of shape {tuple(hidden.shape)}")
    return result


def stack_by_length(rows: Iterable[Tensor]) -> list[Tensor]:
    """Return rows (T,) as batches (B, T) without padding: those of equal length together, in order of first appearance."""
    by_length: dict[int, list[Tensor]] = {}
    for row in rows:
        by_length.setdefault(len(row), []).append(row)
    return [torch.stack(same) for same in by_length.values()]


def cast_call(
    args: tuple[Any, ...], kwargs: dict[str, Any], dtype: torch.dtype, device: torch.device | str
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Move a recorded call to ``device`` and its floating tensors to ``dtype``; nothing else changes type.

    A tensor that needs no change is not copied, one that occurs twice is copied once; containers are copied. Additive masks are
    clamped to the range of a narrower dtype: minus infinity would make NaN of a row that is masked completely.
    """
    return _rebuilt(args, kwargs, lambda tensor: _cast_tensor(tensor, dtype, device))


def own_containers(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return a call whose containers are copies of their own, while tensors are the same."""
    return _rebuilt(args, kwargs, lambda tensor: tensor)


def _rebuilt(
    args: tuple[Any, ...], kwargs: dict[str, Any], change: Callable[[Tensor], Tensor]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    done: dict[int, Tensor] = {}

    def rebuild(value: Any) -> Any:
        if isinstance(value, Tensor):
            if id(value) not in done:
                done[id(value)] = change(value)
            return done[id(value)]
        if type(value) in (tuple, list):
            return type(value)(rebuild(item) for item in value)
        if isinstance(value, tuple) and hasattr(value, "_fields"):  # a named tuple
            return type(value)(*(rebuild(item) for item in value))
        if isinstance(value, dict | UserDict):
            other = copy.copy(value)
            other.update({key: rebuild(item) for key, item in value.items()})
            return other
        return value if callable(value) or isinstance(value, _SHARED) else copy.deepcopy(value)

    return tuple(rebuild(value) for value in args), {key: rebuild(value) for key, value in kwargs.items()}


def finish(model: nn.Module, structure: Structure, hidden: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return the logits (B, T, vocabulary) the model makes of ``hidden`` (B, T, H), the output of its last block.

    ``hidden`` is moved to the device of the model's embeddings and cast to ``dtype``, that of the model's norm and head; None
    is the embeddings', which differs if they are quantized and the rest was cast. The model runs on one repeated token up to
    the last block; nothing after that may depend on the tokens (:func:`check_chain` would tell).
    """
    last = len(structure.blocks) - 1

    def visit(index: int, own: Tensor, _args: tuple[Any, ...], _kwargs: dict[str, Any]) -> Tensor:
        return hidden.to(own.device, dtype or own.dtype) if index == last else own

    ids = _some_ids(model, tuple(hidden.shape[:2]))
    form = _output_form(model, structure)
    logits: Tensor = _drive(model, structure, ids, None, visit, form, grad=hidden.requires_grad).logits
    return logits


def check_chain(model: nn.Module, structure: Structure, ids: Tensor | None = None, mask: Tensor | None = None) -> None:
    """Verify on a few tokens that record + call_block + finish is this model's forward; do it before hours are spent.

    The tokens and their reverse go through the blocks as calibration does: both through one block before the next, so that
    something left behind by one batch and picked up by the other shows.

    Args:
        model: with its weights; costs four forwards.
        structure: from :func:`quantkit.hf.structure.describe`.
        ids: int64 (B, T); eight tokens if None.
        mask: bool (B, T) or None.

    Raises:
        SpecError: if the chain's logits are not the model's, or a block cannot run by itself: blocks exchange state. Or if
            the hidden state is not (B, T, ...).
        CalibrationError: if the model's own logits are not finite.
    """
    if ids is None:
        ids = torch.arange(8, device=input_table(model)[1]).unsqueeze(0)
    batches = [(ids, mask), (ids.flip(1), None if mask is None else mask.flip(1))]
    with torch.no_grad():
        with running_alone(model):
            wanted = [model(**_inputs(*batch), use_cache=False).logits for batch in batches]
        if not all(bool(torch.isfinite(want).all()) for want in wanted):
            raise CalibrationError(f"{type(model).__name__}: logits are not finite; a weight is NaN or infinite, or overflows")
        recorded = [record_block_calls(model, structure, *batch) for batch in batches]
        if recorded[0].hidden.shape[:2] != ids.shape:
            raise SpecError(
                f"its blocks hand on {tuple(recorded[0].hidden.shape)} for tokens {tuple(ids.shape)}; want (B, T, ...)"
            )
        hidden = [calls.hidden for calls in recorded]
        for index, block in enumerate(structure.blocks):
            module = model.get_submodule(block.name)
            try:
                calls = [own_containers(*one.calls[index]) for one in recorded]
                hidden = [call_block(module, h, *call) for h, call in zip(hidden, calls, strict=True)]
            except CANNOT_RUN as error:
                raise SpecError(
                    f"{block.name} cannot run by itself; does it need what another block leaves? {error}"
                ) from error
        finished = [finish(model, structure, h, h.dtype) for h in hidden]  # a bfloat16 model may add its blocks up in float32
        worst = max((got - want).abs().max().item() for got, want in zip(finished, wanted, strict=True))
    limit = 1e-3 * max(want.abs().max().item() for want in wanted)
    if not worst <= limit:
        raise SpecError(
            f"{type(model).__name__}: running the {len(structure.blocks)} blocks one by one changes the logits by {worst:.3g} "
            f"(limit {limit:.3g}); its blocks exchange more than the hidden state"
        )


def why_entangled(model: nn.Module, structure: Structure) -> str | None:
    """Say why the blocks cannot be run one by one, so that the whole model has to run; None if they can.

    Raises:
        CalibrationError: if the model's own logits are not finite, or it is in training mode.
    """
    try:
        check_chain(model, structure)
    except SpecError as error:
        return str(error)
    return None


Visit = Callable[[int, Tensor, tuple[Any, ...], dict[str, Any]], Tensor]


def _drive(
    model: nn.Module,
    structure: Structure,
    ids: Tensor,
    mask: Tensor | None,
    visit: Visit,
    form: Callable[[Tensor], Any],
    *,
    grad: bool = False,
) -> Any:
    """Run the model with stand-ins for its blocks and return its output.

    ``visit(index, hidden, args, kwargs)`` is what block ``index`` computes; ``form`` wraps it as the model expects.
    """
    if model.training:
        raise CalibrationError(f"{type(model).__name__} is in training mode (dropout); call model.eval() first")
    handed_on: list[Tensor] = []
    names = [block.name for block in structure.blocks]

    def stand_in(index: int) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            hidden, *rest = args if args else (kwargs.pop("hidden_states", None),)
            if index != len(handed_on):
                raise SpecError(f"{names[index]} is called as number {len(handed_on)} of the blocks; want each once, in order")
            if not isinstance(hidden, Tensor) or (handed_on and hidden is not handed_on[-1]):
                raise SpecError(
                    f"{names[index]}: its input is not the output of {names[max(index - 1, 0)]}; blocks must be a chain"
                )
            handed_on.append(visit(index, hidden, tuple(rest), kwargs))
            return form(handed_on[-1])

        return forward

    with _forwards_replaced([model.get_submodule(name) for name in names], stand_in), torch.set_grad_enabled(grad):
        output = model(**_inputs(ids, mask), use_cache=False)
    if len(handed_on) != len(names):
        raise SpecError(f"{names[len(handed_on)]} is never called by {type(model).__name__}; want every block once, in order")
    return output


@contextmanager
def _forwards_replaced(blocks: list[nn.Module], stand_in: Callable[[int], Callable[..., Any]]) -> Iterator[None]:
    """Give each block another ``forward`` and put back what it had, in whatever way the body ends."""
    before = [block.__dict__.get("forward") for block in blocks]
    try:
        for index, block in enumerate(blocks):
            block.__dict__["forward"] = stand_in(index)
        yield
    finally:
        for block, forward in zip(blocks, before, strict=True):
            block.__dict__.pop("forward", None)
            if forward is not None:
                block.__dict__["forward"] = forward


def _output_form(model: nn.Module, structure: Structure) -> Callable[[Tensor], Any]:
    """Find what the model expects its blocks to return: try the forms on two tokens, up to the second block's input."""
    ids = _some_ids(model, (1, 2))
    reasons = []

    def visit(index: int, hidden: Tensor, _args: tuple[Any, ...], _kwargs: dict[str, Any]) -> Tensor:
        if index == 1:
            raise _StackDone
        return hidden

    for form in _OUTPUT_FORMS:
        try:
            logits = _drive(model, structure, ids, None, visit, form).logits
        except _StackDone:
            return form
        except (SpecError, *CANNOT_RUN) as error:
            reasons.append(f"{type(error).__name__}: {error}")
            continue
        if logits.shape[:-1] == ids.shape:  # a model of one block: what comes after it decides
            return form
        reasons.append(f"logits have shape {tuple(logits.shape)} for {tuple(ids.shape)} tokens")
    unique = "; ".join(dict.fromkeys(reasons))
    raise SpecError(f"{type(model).__name__} cannot be walked block by block from {structure.blocks[0].name}: {unique}")


def _some_ids(model: nn.Module, shape: tuple[int, ...]) -> Tensor:
    """Return int64 ids of one token that is not padding, where the input embedding is."""
    pad = getattr(getattr(model, "config", None), "pad_token_id", None)
    return torch.full(shape, 1 if pad == 0 else 0, dtype=torch.int64, device=input_table(model)[1])


def _inputs(ids: Tensor, mask: Tensor | None) -> dict[str, Tensor | None]:
    """Return the model's keyword arguments for token ids and a bool mask."""
    return {"input_ids": ids, "attention_mask": None if mask is None else mask.to(torch.int64)}


def _cast_tensor(value: Tensor, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """Move a tensor, and change its dtype if it is floating; finite values stay finite."""
    if not value.is_floating_point():
        return value.to(device)
    if torch.finfo(dtype).max < torch.finfo(value.dtype).max:
        value = value.clamp(torch.finfo(dtype).min, torch.finfo(dtype).max)
    return value.to(device, dtype)
