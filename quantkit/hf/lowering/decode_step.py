"""Write the tape of a model: watch one decode step, and prove that the tape predicts what the model does.

The model first reads a few tokens of :data:`~quantkit.hf.lowering.trace.TOKENS` sequences, so that its cache is as it is in
decoding. Then it takes one step under a :class:`~quantkit.hf.lowering.record.Recorder`, with hooks wherever something is more
than arithmetic on a token: attention (transformers' registry of attention functions), experts, quantized layers, and the cache,
whose keys and values the tape keeps itself and whose other tensors are states that the step reads and writes.

What one step shows may be wrong for others: :func:`write_tape` compares the tape's logits with the model's own for a text from
its beginning on, and at the last positions that the model supports.
"""

import inspect
import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes
from transformers import DynamicCache, PreTrainedModel

from quantkit.errors import QuantkitError
from quantkit.hf.cache import LENGTH_DEPENDENT_ROPE, cache_argument, rope_types
from quantkit.hf.experts import uses_experts_interface
from quantkit.hf.lowering import norms, tidy
from quantkit.hf.lowering.lower import CannotLower
from quantkit.hf.lowering.operations.handle import handle
from quantkit.hf.lowering.operations.products import linear, lookup
from quantkit.hf.lowering.parts import attributes, experts_of, inside, states_in
from quantkit.hf.lowering.plain_attention import Past, find
from quantkit.hf.lowering.record import Ids, Recorder
from quantkit.hf.lowering.trace import FAR, TOKENS, CannotWatch, MaskReader, interpose
from quantkit.hf.paged import context_tokens
from quantkit.kernels.program import run_tape
from quantkit.kernels.program.definition import Cache
from quantkit.kernels.program.tape import (
    POSITION,
    TOKEN,
    Attend,
    Load,
    Mixture,
    Steps,
    Store,
    Tape,
)
from quantkit.nn.block_calls import CANNOT_RUN
from quantkit.nn.embedding import QuantEmbedding, input_table
from quantkit.nn.install import float_activations
from quantkit.nn.linear import QuantLinear
from quantkit.system.memory import return_freed_memory

_BEFORE = 4
"""Tokens that the model has read before the step."""

_NOTHING = -1
"""Number of no value."""

_LONGEST = 600
"""The longest window that is looked beyond, where a model makes its own mask."""


_TOLERANCE = {torch.float32: 2e-4, torch.float16: 5e-2}
"""Largest accepted norm of the logits' error relative to the norm of the logits; 0.1 in bfloat16."""


def write_tape(model: PreTrainedModel) -> Tape:
    """Return a tape that predicts what ``model`` does, here and at the last positions that it supports.

    Weights are shared with the model, except biases, norms and other small constants, which are copied in float32.

    Raises:
        CannotLower: it cannot be said as a tape, or the tape predicts something else.
    """
    try:
        if types := rope_types(model.config.get_text_config(decoder=True)) & LENGTH_DEPENDENT_ROPE:
            raise CannotWatch(f"its rotary frequencies change with the length of a sequence ({', '.join(types)})")
        with float_activations(model):
            tape = replace(record_step(model), max_tokens=context_tokens(model))
            compare(tape, model, lambda ids, start: run_tape.logits(tape, ids, start), 0)
            limit = min(tape.max_tokens or FAR // 4, FAR // 4)
            chunks = [step.chunk for step in tape.body.steps if isinstance(step, Attend) and step.chunk]
            limit -= (limit - TOKENS) % math.lcm(*chunks)  # the model's own mask counts from its first token
            if limit > 2 * TOKENS and "position_ids" in inspect.signature(model.forward).parameters:
                compare(tape, model, lambda ids, start: run_tape.logits(tape, ids, start), limit - TOKENS)
    except CannotWatch as error:
        raise CannotLower(str(error)) from error
    except QuantkitError as error:
        raise error if isinstance(error, CannotLower) else CannotLower(str(error)) from error
    except CANNOT_RUN as error:
        raise CannotLower(f"recording a decode step failed: {type(error).__name__}: {error}") from error
    return_freed_memory()
    return tape


def compare(tape: Tape, model: PreTrainedModel, predict: Callable[[Tensor, int], Tensor], start: int) -> None:
    """Compare logits with the model's own for a few tokens.

    In 16 bits, rounding changes the choice between experts of similar probability here and there; the better half of the
    tokens counts for a mixture.

    Args:
        tape: the tape that is tested.
        model: the model.
        predict: returns logits (T, V) of tokens (T,) from a position on, of which nothing was seen before.
        start: position of the first token.

    Raises:
        CannotWatch: they differ.
    """
    words, device = input_table(model)
    ids = torch.randint(0, words, (TOKENS,), generator=torch.Generator().manual_seed(1)).to(device)
    where = {"position_ids": start + torch.arange(TOKENS, device=device)[None]} if start else {}
    with torch.inference_mode():
        want = model(input_ids=ids[None], use_cache=False, return_dict=True, **where).logits[0]
    dtype, want = want.dtype, want.float()
    errors = (predict(ids, start).to(device) - want).norm(dim=1) / want.norm(dim=1).clamp_min(1e-30)
    chosen = model.dtype != torch.float32 and any(isinstance(step, Mixture) for step in tape.body.steps)
    error = float(errors.median() if chosen else errors.max())
    if not error < _TOLERANCE.get(model.dtype, _TOLERANCE.get(dtype, 0.1)):
        raise CannotWatch(f"logits from position {start} on differ from the model's by {error:.2g} of their norm")


def record_step(model: PreTrainedModel) -> Tape:
    """Return the tape of one decode step, which is not yet proven to be right for any other.

    Raises:
        CannotWatch: naming what a tape cannot say.
    """
    watched = _Watched(model)
    try:
        return watched.record()
    except _OwnAttention:
        return _Watched(model, own=True).record()


class _OwnAttention(Exception):
    """The model asks its cache for keys and values, but attends to them itself."""


class _Watched:
    """A model whose decode step is recorded."""

    def __init__(self, model: PreTrainedModel, own: bool = False) -> None:
        self.model, self.recorder = model, Recorder(handle)
        self.own = own  # whether the model attends itself
        config: Any = model.config.get_text_config(decoder=True)
        windows = [size for name, size in vars(config).items() if "window" in name and isinstance(size, int) and size > 1]
        # A mask that the model makes itself is known as far as it is seen: beyond the window that the config names.
        self.sees_windows = bool(windows) and max(windows) <= _LONGEST
        self.before = max(windows) + 3 if own and self.sees_windows else _BEFORE
        self.updates, self.mask_value = 0, _NOTHING
        self.asked = False  # whether transformers' attention interface was called
        self.past: list[Past] = []
        self.accepted = inspect.signature(model.forward).parameters
        self.argument = cache_argument(model, self.accepted)
        self.masks = MaskReader()
        self.caches: list[Cache] = []
        self.kept: list[tuple[Ids, Ids]] = []
        self.states: list[int] = []
        self.places: list[tuple[Any, Any]] = []  # container and key of every state
        self.constant: dict[int, tuple[Tensor, int]] = {}  # what modules held before they read anything

    def record(self) -> Tape:
        """Take a step and return its tape."""
        words, device = input_table(self.model)
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(0, words, (TOKENS, self.before + 1), generator=generator).to(device)
        with ExitStack() as cleanup, torch.no_grad():
            cache = self.prefill(ids[:, : self.before], cleanup)
            self.hook(cleanup, cache)
            try:
                logits = self.step(ids[:, self.before :].clone(), cache)
            except (CannotWatch, *CANNOT_RUN):
                if self.updates and not self.asked and not self.own:
                    raise _OwnAttention from None
                raise
        if self.updates and not self.asked and not self.own:
            raise _OwnAttention
        for number, past in enumerate(self.past):
            self.caches.append(Cache(past.k.shape[0], past.k.shape[1], past.v.shape[1]))
            find(
                self.recorder,
                past,
                None if self.mask_value == _NOTHING else self.mask_value,
                self.masks,
                number,
                self.sees_windows,
            )
        return self.tape(logits, words)

    def prefill(self, ids: Tensor, cleanup: ExitStack) -> Any:
        for holder in attributes(self.model):  # the model is left as it was
            for container, key, x in states_in([holder], 1):
                cleanup.callback(container.__setitem__, key, x)
                self.constant[id(x)] = (x, x._version)
            for key in [key for key, held in holder.items() if held is None and not key.startswith("_")]:
                cleanup.callback(holder.__setitem__, key, None)
        if self.argument is not None:
            cache: Any = DynamicCache(config=self.model.config.get_text_config(decoder=True))
            self.model(input_ids=ids, use_cache=True, return_dict=True, **{self.argument: cache})
            return cache
        output = self.model(input_ids=ids, use_cache=True, return_dict=True)
        for self.argument in ("cache", "past_key_values", "cache_params", "state"):
            if self.argument in self.accepted and (cache := getattr(output, self.argument, None)) is not None:
                return cache
        raise CannotWatch("it has no cache")

    def hook(self, cleanup: ExitStack, cache: Any) -> None:
        interpose(self.model, self.attention, self.masks, cleanup)
        for _, module in self.model.named_modules():
            if isinstance(module, QuantLinear):
                self._replace(module, self._quant_linear, cleanup)
            elif isinstance(module, QuantEmbedding):
                self._replace(module, self._quant_embedding, cleanup)
            elif uses_experts_interface(module):
                self._replace(module, self._experts, cleanup)
            if hasattr(module, "warn_if_padding_and_no_attention_mask"):  # looks at ids
                module.warn_if_padding_and_no_attention_mask = lambda *args: None
                cleanup.callback(module.__dict__.pop, "warn_if_padding_and_no_attention_mask", None)
        if hasattr(cache, "update"):
            cache.update = self._update
        if self.own:
            self.masks.made = self._mask

    def _replace(self, module: Any, by: Any, cleanup: ExitStack) -> None:
        own = module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            first = next((one for one in (*args, *kwargs.values()) if isinstance(one, Tensor)), None)
            if first is None or not self.recorder.tracks(first):
                return own(*args, **kwargs)
            with _disable_current_modes():
                out = own(*args, **kwargs)
            return by(module, out, *args, **kwargs)

        module.forward = forward
        cleanup.callback(module.__dict__.pop, "forward", None)

    # -- the step

    def step(self, ids: Tensor, cache: Any) -> Tensor:
        recorder = self.recorder
        positions = self.before + torch.arange(TOKENS, device=ids.device)[:, None]
        for number, x in ((TOKEN, ids), (POSITION, positions)):
            assert recorder.value(1) == number
            recorder.track(x, recorder.elements(number), 0)
        where = {"position_ids": positions} if "position_ids" in self.accepted else {}
        own = [state for holder in attributes(self.model) for state in states_in([holder], 1)]
        for container, key, x in (*states_in([cache]), *own):
            if recorder.tracks(x) or self.constant.get(id(x), (x, None))[1] == x._version:
                continue
            size = x[0].numel()
            out = recorder.value(size)
            recorder.steps.append(Load(len(self.states), out))
            self.states.append(size)
            self.places.append((container, key))
            recorder.track(x, recorder.elements(out).reshape(x.shape[1:]), 0)
        assert self.argument is not None
        with recorder:
            output = self.model(input_ids=ids, use_cache=True, return_dict=True, **{self.argument: cache}, **where)
        logits: Tensor | None = getattr(output, "logits", None)
        if logits is None or not recorder.tracks(logits):
            raise CannotWatch("the model returns no logits")
        for number, (container, key) in enumerate(self.places):
            x = container[key]
            if not isinstance(x, Tensor) or not recorder.tracks(x) or x[0].numel() != self.states[number]:
                raise CannotWatch("a state is not computed from what came before, or changes its size")
            ids_now = recorder.ids(x)[0]
            recorder.steps.append(Store(number, (recorder.run(ids_now),)))
        return logits

    def tape(self, logits: Tensor, words: int) -> Tape:
        config: Any = self.model.config.get_text_config(decoder=True)
        recorder = self.recorder
        head = tidy.split_head(recorder, recorder.ids(logits)[0].reshape(-1))
        steps, states = tidy.needed(norms.fuse(recorder.steps, head.read), head.read, self.states)
        return Tape(
            name=type(self.model).__name__,
            body=Steps(tuple(steps), recorder.widths, head.read),
            head=head.linear,
            caches=tuple(self.caches),
            states=tuple(states),
            tokens=words,
            logit_scale=head.scale,
            logit_softcap=head.softcap,
            max_tokens=getattr(config, "max_position_embeddings", None),
        )

    # -- what is more than arithmetic

    def _update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Stand in for the cache's update."""
        self.updates += 1
        if not self.own:
            return keys, values
        recorder, tokens = self.recorder, self.before + 1
        found = []
        for part in (keys, values):
            with _disable_current_modes():
                many = part.expand(-1, -1, tokens, -1).contiguous()
            number = recorder.value(many[0].numel())
            found.append((recorder.track(many, recorder.elements(number, many.shape[1:]), 0), number))
        k, v = (recorder.ids(part)[0].squeeze(1) for part in (keys, values))
        self.past.append(Past(k, v, found[0][1], found[1][1], tokens))
        return found[0][0], found[1][0]

    def _mask(self, mask: Tensor) -> Tensor:
        """Let a mask be a value, so that what is done with it shows."""
        with _disable_current_modes():
            mask = mask.expand(TOKENS, -1, -1, -1).contiguous()
        if self.mask_value == _NOTHING:
            self.mask_value = self.recorder.value(mask.shape[-1])
        return self.recorder.track(mask, self.recorder.elements(self.mask_value).reshape(1, 1, -1), 0)

    def attention(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
    ) -> tuple[Tensor, None]:
        recorder, self.asked = self.recorder, True
        if not all(recorder.tracks(part) for part in (query, key, value)):
            raise CannotWatch("attention reads constants")
        if any(part.shape[2] != 1 for part in (query, key, value)):
            raise CannotWatch("attention reads keys other than those of its tokens")
        known = {"scaling", "dropout", "sliding_window", "position_ids", "softcap", "s_aux", "logits_to_keep"}
        extra = [k for k, v in options.items() if k not in known and v is not None and not isinstance(v, bool | int | str)]
        if extra:
            raise CannotWatch(f"attention has unknown options: {', '.join(sorted(extra))}")
        window, chunk = self.masks.read(attention_mask)
        q, k, v = (recorder.ids(part)[0].squeeze(1) for part in (query, key, value))  # (heads, dim)
        heads, kv_heads = q.shape[0], k.shape[0]
        if v.shape[0] != kv_heads or q.shape[1] != k.shape[1] or heads % kv_heads:
            raise CannotWatch("queries, keys and values do not fit together")
        scale, sinks = options.get("scaling"), options.get("s_aux")
        with _disable_current_modes():
            repeated = value.repeat_interleave(heads // kv_heads, 1).transpose(1, 2).contiguous()
        cache, append = self._cache(k, v)
        out = recorder.value(heads * v.shape[1])
        recorder.steps.append(
            Attend(
                (recorder.run(q), recorder.run(k), recorder.run(v)),
                out,
                heads,
                kv_heads,
                k.shape[1],
                v.shape[1],
                cache,
                append,
                query.shape[-1] ** -0.5 if scale is None else float(scale),
                window,
                chunk,
                options.get("softcap"),
                None if sinks is None else sinks.detach().float().flatten(),
            )
        )
        return recorder.track(repeated, recorder.elements(out).reshape(1, heads, v.shape[1]), 0), None

    def _cache(self, k: Ids, v: Ids) -> tuple[int, bool]:
        """Return the number of what keeps these keys and values, and whether they are new."""
        for number, (keys, values) in enumerate(self.kept):
            if keys.shape == k.shape and (keys == k).all() and values.shape == v.shape and (values == v).all():
                return number, False
        self.kept.append((k, v))
        self.caches.append(Cache(k.shape[0], k.shape[1], v.shape[1]))
        return len(self.caches) - 1, True

    def _quant_linear(self, module: QuantLinear, out: Tensor, x: Tensor) -> Tensor:
        ids, axis, many = self.recorder.ids(x)
        if many != 1 or ids.size != x.shape[-1]:
            raise CannotWatch("a quantized layer runs on several rows of a token")
        made = linear(self.recorder, ids.reshape(-1), module, module.bias)
        return self.recorder.track(out, made.reshape(*ids.shape[:-1], -1), axis)

    def _quant_embedding(self, module: QuantEmbedding, out: Tensor, index: Tensor) -> Tensor:
        return lookup(self.recorder, module, index, out)

    def _experts(self, module: Any, out: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        recorder = self.recorder
        x, index, weights = [one for one in (*args, *kwargs.values()) if isinstance(one, Tensor)][:3]
        if not all(recorder.tracks(part) for part in (x, index, weights)):
            raise CannotWatch("experts read constants")
        reads = tuple(recorder.run(recorder.ids(part)[0].reshape(-1)) for part in (x, index, weights))
        experts = tuple(experts_of(module))
        inner = inside(module._apply_gate if module.has_gate else module.act_fn, experts[0].up.shape[0], x)
        outer = None
        if getattr(module, "has_post_expert_norm", False):
            outer = inside(module.post_expert_norm, experts[0].down.shape[0], x)
        number = recorder.value(out.shape[-1])
        recorder.steps.append(Mixture(experts, reads, number, inner, outer))  # type: ignore[arg-type]
        ids, axis, _ = recorder.ids(x)
        return recorder.track(out, recorder.elements(number).reshape(*ids.shape[:-1], -1), axis)
