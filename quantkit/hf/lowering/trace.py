"""Record one forward pass: inputs and outputs of all modules, and the arguments of attention.

A config tells how a model's author named things; a forward pass shows what is computed. :func:`watch` runs a few random tokens
through a model, with hooks on its modules and an attention function of its own in transformers' ``ALL_ATTENTION_FUNCTIONS``,
and keeps all values, layer by layer. ``quantkit/hf/lowering/lower.py`` then finds out how they are computed from one another.
The model is left as it was (hooks and attention function are removed). The cost is a forward pass of :data:`TOKENS` tokens.
"""

import itertools
import threading
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from quantkit.errors import QuantkitError
from quantkit.hf.experts import uses_experts_interface
from quantkit.nn.embedding import input_table

NAME = "quantkit_watch"
"""Name of the recording attention function in transformers' registries."""

TOKENS = 13
"""Tokens of the recorded pass: few, and a number that no other axis of a model is likely to have."""


FAR = 1 << 20
"""A position beyond every window."""


class CannotWatch(Exception):
    """The model does not run like a standard decoder; the message says where it differs."""


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """One call of a module.

    Attributes:
        path: name of the module in the model.
        module: the module.
        x: first tensor argument.
        y: output, or its first tensor.
        outputs: all tensors of the output.
        arguments: positional and keyword arguments.
    """

    path: str
    module: nn.Module
    x: Tensor
    y: Tensor
    outputs: tuple[Tensor, ...]
    arguments: tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True, slots=True, eq=False)
class AttentionCall:
    """One call of the attention function, for one sequence.

    Attributes:
        order: number of module calls in the layer before this call.
        q, k, v: (T, heads, head_dim), normalized and rotated.
        y: (T, heads * head_dim).
        scale: factor of the scores.
        window: number of keys that a query sees, its own included; None for all up to its position.
        options: other arguments that are not None (softcap, sinks, ...).
    """

    order: int
    q: Tensor
    k: Tensor
    v: Tensor
    y: Tensor
    scale: float
    window: int | None
    options: dict[str, Any]


@dataclass(slots=True, eq=False)
class LayerTrace:
    """The recorded pass of one decoder layer.

    Attributes:
        x, y: residual stream before and after the layer, (T, hidden).
        calls: calls of modules without children, and of experts modules.
        attention: calls of the attention function.
    """

    x: Tensor
    calls: list[Call] = field(default_factory=list)
    attention: list[AttentionCall] = field(default_factory=list)
    y: Tensor | None = None


@dataclass(slots=True, eq=False)
class Trace:
    """A recorded forward pass.

    Attributes:
        ids: int64 (T,).
        start: position of the first token.
        layers: the decoder layers in order.
        before, after: module calls before the first and after the last layer.
        logits: (T, V).
    """

    ids: Tensor
    start: int = 0
    layers: list[LayerTrace] = field(default_factory=list)
    before: list[Call] = field(default_factory=list)
    after: list[Call] = field(default_factory=list)
    logits: Tensor | None = None


def watch(model: PreTrainedModel, stack: nn.Module, start: int = 0) -> Trace:
    """Run :data:`TOKENS` random tokens through ``model`` and record the pass.

    Args:
        model: a causal language model in eval mode.
        stack: the module whose children are the decoder layers.
        start: position of the first token; a large one shows what a model does differently at large positions.

    Raises:
        CannotWatch: the model does not use transformers' attention interface, its mask is not a causal window, or it returns
            no logits.
    """
    generator = torch.Generator().manual_seed(0)
    words, device = input_table(model)
    ids = torch.randint(0, words, (1, TOKENS), generator=generator).to(device)
    recorder = _Recorder(Trace(ids[0], start))
    where = {"position_ids": start + torch.arange(TOKENS, device=ids.device)[None]} if start else {}
    with ExitStack() as cleanup, torch.no_grad():
        recorder.hook(model, stack, cleanup)
        interpose(model, recorder.attention, recorder.mask, cleanup)
        output = model(input_ids=ids, use_cache=False, return_dict=True, **where)
    logits = getattr(output, "logits", None)
    if logits is None:
        raise CannotWatch("the model returns no logits")
    recorder.trace.logits = logits[0]
    if not all(layer.attention for layer in recorder.trace.layers) or not recorder.trace.layers:
        raise CannotWatch("a layer does not use transformers' attention interface")
    return recorder.trace


def flat(x: Tensor) -> Tensor:
    """Flatten a value of one sequence, (1, T, ...) or (T, ...), to (T, everything else)."""
    x = x.detach()
    if x.ndim > 2 and x.shape[0] == 1:
        x = x[0]
    return x.reshape(x.shape[0], -1)


class _Recorder:
    """Hooks and attention function of one recorded pass."""

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self.thread = threading.get_ident()
        self.inside: LayerTrace | None = None
        self.windows: dict[int, int | None] = {}  # id of a mask to its window
        self.masks: list[Tensor] = []  # keeps the ids alive

    def hook(self, model: nn.Module, stack: nn.Module, cleanup: ExitStack) -> None:
        layers = {id(layer) for layer in stack.children()}
        for path, module in model.named_modules():
            if id(module) in layers:
                handles = [
                    module.register_forward_pre_hook(self._enter, with_kwargs=True),
                    module.register_forward_hook(self._leave),
                ]
            elif not any(True for _ in module.children()) or uses_experts_interface(module):
                handles = [module.register_forward_hook(self._called(path), with_kwargs=True)]
            else:
                continue
            for handle in handles:
                cleanup.callback(handle.remove)

    def _foreign(self) -> bool:
        """Return whether another thread than the recording one is running the model."""
        return threading.get_ident() != self.thread

    def _enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if self._foreign():
            return
        x = next(value for value in (*args, kwargs.get("hidden_states")) if isinstance(value, Tensor))
        self.inside = LayerTrace(flat(x).clone())
        self.trace.layers.append(self.inside)

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._foreign():
            return
        assert self.inside is not None
        self.inside.y = flat(output if isinstance(output, Tensor) else output[0]).clone()
        self.inside = None

    def _called(self, path: str) -> Callable[..., None]:
        def record(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            xs = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
            ys = (output,) if isinstance(output, Tensor) else tuple(v for v in output or () if isinstance(v, Tensor))
            if not xs or not ys or self._foreign():
                return
            call = Call(path, module, xs[0].detach().clone(), ys[0].detach().clone(), ys, (args, kwargs))
            place = self.trace.before if not self.trace.layers else self.trace.after
            (place if self.inside is None else self.inside.calls).append(call)

        return record

    def mask(self, *args: Any, **options: Any) -> Tensor:
        """Replace transformers' mask functions: record the window and return the mask as booleans."""
        sees = options["mask_function"]
        q, kv = torch.arange(options["q_length"]), torch.arange(options["kv_length"])
        mask = _evaluate(sees, q[:, None], kv).to(self.trace.ids.device)
        self.masks.append(mask)
        self.windows[id(mask)] = _window(sees)
        return mask

    def attention(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
    ) -> tuple[Tensor, None]:
        """Replace transformers' attention functions: record the call and compute it in plain torch."""
        if self._foreign():
            raise QuantkitError("another thread prepares to generate with this model; run the model afterwards")
        if attention_mask is None or id(attention_mask) not in self.windows or self.inside is None:
            raise CannotWatch("attention is not called with a mask of transformers' mask functions")
        if key.shape != value.shape or query.shape[-1] != key.shape[-1] or query.shape[1] % key.shape[1]:
            shapes = ", ".join(str(tuple(part.shape[1:])) for part in (query, key, value))
            raise CannotWatch(f"queries, keys and values have shapes {shapes} (is it latent attention?)")
        scale, softcap = options.get("scaling"), options.get("softcap")
        scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
        repeats = query.shape[1] // key.shape[1]
        keys, values = (part.repeat_interleave(repeats, 1).float() for part in (key, value))
        scores = query.float() @ keys.transpose(2, 3) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        scores = scores.masked_fill(~attention_mask, -torch.inf)
        y = (F.softmax(scores, -1) @ values).to(query.dtype).transpose(1, 2).contiguous()
        known = {"scaling", "dropout", "sliding_window", "position_ids"}  # the window follows from the mask
        rest = {name: v for name, v in options.items() if name not in known and v is not None and not isinstance(v, bool)}
        q, k, v = (part[0].transpose(0, 1).contiguous() for part in (query, key, value))
        call = AttentionCall(len(self.inside.calls), q, k, v, flat(y), scale, self.windows[id(attention_mask)], rest)
        self.inside.attention.append(call)
        return y, None


def _evaluate(sees: Callable[..., Any], q: Tensor, kv: Tensor) -> Tensor:
    """Return a mask function of transformers at broadcast queries and keys, as bool (1, 1, queries, keys)."""
    shape = torch.broadcast_shapes(q.shape, kv.shape)
    seen = sees(torch.tensor(0), torch.tensor(0), q, kv)
    return torch.as_tensor(seen).expand(shape)[None, None]


def _window(sees: Callable[..., Any]) -> int | None:
    """Return how many keys a query sees, its own included, or None for all; determined at two large positions.

    Raises:
        CannotWatch: the mask is not a causal window of one size.
    """
    counts = set()
    for far in (FAR, FAR - 5):
        q, kv = torch.tensor(far), torch.arange(FAR + 8)
        seen = torch.as_tensor(sees(torch.tensor(0), torch.tensor(0), q, kv)).expand(kv.shape)
        count = int(seen.sum())
        if not bool(seen[far + 1 - count : far + 1].all()):
            raise CannotWatch("the attention mask is not a causal window")
        counts.add(None if count == far + 1 else count)
    if len(counts) > 1:
        raise CannotWatch("the attention mask is not a window of one size (is it chunked attention?)")
    return counts.pop()


_numbers = itertools.count()


class MaskReader:
    """Replaces transformers' mask functions, and knows what a mask lets queries see."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[int | None, int | None] | CannotWatch] = {}
        self._masks: list[Tensor] = []  # keeps the memory alive
        self.made: Callable[[Tensor], Tensor] = lambda mask: mask

    def __call__(self, *args: Any, **options: Any) -> Tensor:
        """Return a mask that hides nothing: zeros, to be added to scores."""
        mask = self.made(torch.zeros(1, 1, options["q_length"], options["kv_length"], device=options.get("device")))
        self._masks.append(mask)
        try:
            self._known[mask.untyped_storage()._cdata] = _span(options["mask_function"])
        except CannotWatch as error:
            self._known[mask.untyped_storage()._cdata] = error
        return mask

    def read(self, mask: Tensor | None) -> tuple[int | None, int | None]:
        """Return window and chunk of a mask; None is no limit.

        Raises:
            CannotWatch: it is another's mask, or neither.
        """
        found = None if mask is None else self._known.get(mask.untyped_storage()._cdata)
        if found is None:
            raise CannotWatch("attention is not called with a mask of transformers' mask functions")
        if isinstance(found, CannotWatch):
            raise found
        return found

    def only(self) -> tuple[int | None, int | None]:
        """Return window and chunk of all masks that were made.

        Raises:
            CannotWatch: they are not the same.
        """
        found = {self.read(mask) for mask in self._masks}
        if len(found) != 1:
            raise CannotWatch("its own attention has several masks, or none of transformers' mask functions")
        return found.pop()


def _span(sees: Callable[..., Any]) -> tuple[int | None, int | None]:
    """Return the window and the chunk of a mask function; see :func:`_window`."""
    try:
        return _window(sees), None
    except CannotWatch:
        counts = _counts(sees, range(FAR, FAR + 3))
        if counts[1:] != [counts[0] + 1, counts[0] + 2] and 1 not in counts:
            raise
    # In chunks: find the next first token of one, and from there the length.
    q = torch.arange(FAR, FAR + (1 << 14))
    first = torch.as_tensor(sees(torch.tensor(0), torch.tensor(0), q, q - 1)).expand(q.shape)
    begins = (~first).nonzero().flatten()
    if len(begins) < 2:
        raise CannotWatch("the attention mask is neither a causal window nor chunks")
    chunk = int(begins[1] - begins[0])
    if (FAR + int(begins[0])) % chunk:
        raise CannotWatch("the attention mask is neither a causal window nor chunks")
    for far in (FAR, FAR + chunk // 2, FAR + chunk - 1):
        if _counts(sees, [far]) != [far % chunk + 1]:
            raise CannotWatch("the attention mask is neither a causal window nor chunks")
    return None, chunk


def _counts(sees: Callable[..., Any], queries: Any) -> list[int]:
    """Return how many keys queries see, which must be the last ones before them."""
    counts = []
    for far in queries:
        kv = torch.arange(far + 8)
        seen = torch.as_tensor(sees(torch.tensor(0), torch.tensor(0), torch.tensor(far), kv)).expand(kv.shape)
        count = int(seen.sum())
        if not bool(seen[far + 1 - count : far + 1].all()):
            raise CannotWatch("the attention mask is not a causal window")
        counts.append(count)
    return counts


def interpose(model: PreTrainedModel, attention: Callable[..., Any], mask: Callable[..., Any], cleanup: ExitStack) -> None:
    """Let the configs of the model select these functions until ``cleanup``."""
    name = f"{NAME}_{next(_numbers)}"  # unique, because two threads may record two models
    ALL_ATTENTION_FUNCTIONS.register(name, attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(name, mask)
    cleanup.callback(ALL_ATTENTION_FUNCTIONS._global_mapping.pop, name, None)
    cleanup.callback(ALL_MASK_ATTENTION_FUNCTIONS._global_mapping.pop, name, None)
    configs = {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}
    for config in configs.values():
        if hasattr(config, "_attn_implementation_internal"):
            before = config._attn_implementation_internal
            config._attn_implementation_internal = name
            cleanup.callback(setattr, config, "_attn_implementation_internal", before)
