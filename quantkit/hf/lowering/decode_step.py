"""Write the tape of a model: watch one decode step, and prove that the tape predicts what the model does.

The model first reads a few tokens of :data:`~quantkit.hf.lowering.trace.TOKENS` sequences, so that its cache is as it is in
decoding. Then it takes one step under a :class:`~quantkit.hf.lowering.record.Recorder`, with hooks wherever something is more
than arithmetic on a token: attention (transformers' registry of attention functions), experts, quantized layers, and the cache,
whose keys and values the tape keeps itself and whose other tensors are states that the step reads and writes.

What one step shows may be wrong for others: :func:`write_tape` compares the tape's logits with the model's own for a text from
its beginning on, and at the last positions that the model supports.
"""

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes
from transformers import DynamicCache, PreTrainedModel

from quantkit.hf.cache import cache_argument
from quantkit.hf.experts import expert_parameters, uses_experts_interface
from quantkit.hf.lowering import tidy
from quantkit.hf.lowering.operations import linear, lookup
from quantkit.hf.lowering.record import Ids, Recorder
from quantkit.hf.lowering.trace import TOKENS, CannotWatch, MaskReader, interpose
from quantkit.kernels.program.definition import Cache, Linear
from quantkit.kernels.program.tape import (
    POSITION,
    TOKEN,
    Attend,
    Expert,
    Load,
    Mixture,
    Steps,
    Store,
    Tape,
)
from quantkit.nn.embedding import QuantEmbedding, input_table
from quantkit.nn.linear import QuantLinear, QuantWeight

_BEFORE = 4
"""Tokens that the model has read before the step."""


def record_step(model: PreTrainedModel) -> Tape:
    """Return the tape of one decode step, which is not yet proven to be right for any other.

    Raises:
        CannotWatch: naming what a tape cannot say.
    """
    words, device = input_table(model)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, words, (TOKENS, _BEFORE + 1), generator=generator).to(device)
    watched = _Watched(model)
    with ExitStack() as cleanup, torch.no_grad():
        cache = watched.prefill(ids[:, :_BEFORE], cleanup)
        watched.hook(cleanup, cache)
        logits = watched.step(ids[:, _BEFORE:].clone(), cache)
    return watched.tape(logits, words)


class _Watched:
    """A model whose decode step is recorded."""

    def __init__(self, model: PreTrainedModel) -> None:
        import inspect

        self.model, self.recorder = model, Recorder()
        self.accepted = inspect.signature(model.forward).parameters
        self.argument = cache_argument(model, self.accepted)
        self.masks = MaskReader()
        self.caches: list[Cache] = []
        self.kept: list[tuple[Ids, Ids]] = []
        self.states: list[int] = []
        self.places: list[tuple[Any, Any]] = []  # container and key of every state

    def prefill(self, ids: Tensor, cleanup: ExitStack) -> Any:
        if self.argument is None:
            raise CannotWatch("its cache is none of transformers'")
        cache = DynamicCache(config=self.model.config.get_text_config(decoder=True))
        self.model(input_ids=ids, use_cache=True, return_dict=True, **{self.argument: cache})
        return cache

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
        cache.update = lambda keys, values, *args, **kwargs: (keys, values)

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
        positions = _BEFORE + torch.arange(TOKENS, device=ids.device)[:, None]
        for number, x in ((TOKEN, ids), (POSITION, positions)):
            assert recorder.value(1) == number
            recorder.track(x, recorder.elements(number), 0)
        where = {"position_ids": positions} if "position_ids" in self.accepted else {}
        for container, key, x in _states(cache):
            if x.shape[:1] != (TOKENS,):
                raise CannotWatch(f"a state of its cache has shape {tuple(x.shape)}")
            size = x[0].numel()
            out = recorder.value(size)
            recorder.steps.append(Load(len(self.states), out))
            self.states.append(size)
            self.places.append((container, key))
            recorder.track(x, recorder.elements(out).reshape(x.shape[1:]), 0)
        with recorder:
            output = self.model(input_ids=ids, use_cache=True, return_dict=True, **{self.argument: cache}, **where)
        logits = getattr(output, "logits", None)
        if logits is None or not recorder.tracks(logits):
            raise CannotWatch("the model returns no logits")
        for number, (container, key) in enumerate(self.places):
            x = container[key]
            if not recorder.tracks(x):
                raise CannotWatch("a state is not computed from what came before")
            ids_now = recorder.ids(x)[0]
            recorder.steps.append(Store(number, (recorder.run(ids_now),)))
        return logits

    def tape(self, logits: Tensor, words: int) -> Tape:
        config: Any = self.model.config.get_text_config(decoder=True)
        recorder = self.recorder
        head = tidy.split_head(recorder, recorder.ids(logits)[0].reshape(-1))
        steps, states = tidy.needed(recorder.steps, head.read, self.states)
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

    def attention(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
    ) -> tuple[Tensor, None]:
        recorder = self.recorder
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
        if many > 1 or ids.size != x.shape[-1]:
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
        experts = tuple(_experts(module))
        inner = _inside(module._apply_gate if module.has_gate else module.act_fn, experts[0].up.shape[0], x)
        outer = None
        if getattr(module, "has_post_expert_norm", False):
            outer = _inside(module.post_expert_norm, experts[0].down.shape[0], x)
        number = recorder.value(out.shape[-1])
        recorder.steps.append(Mixture(experts, reads, number, inner, outer))  # type: ignore[arg-type]
        ids, axis, _ = recorder.ids(x)
        return recorder.track(out, recorder.elements(number).reshape(*ids.shape[:-1], -1), axis)


def _inside(function: Any, width: int, like: Tensor) -> Steps:
    """Return the steps that a function takes on a vector of ``width`` elements."""
    recorder = Recorder()
    first = recorder.value(width)
    x = torch.randn(TOKENS, width, generator=torch.Generator().manual_seed(0)).to(like)
    recorder.track(x, recorder.elements(first), 0)
    with _disable_current_modes(), recorder:
        y = function(x)
    result = recorder.run(recorder.ids(y)[0].reshape(-1))
    steps, _ = tidy.needed(recorder.steps, result, [])
    return Steps(tuple(steps), recorder.widths, result)


def _experts(module: Any) -> Iterator[Expert]:
    """Yield every expert of a module."""
    names = expert_parameters(module)
    stacks = [getattr(module, name) for name in names]
    biases = [getattr(module, f"{name}_bias").detach() if module.has_bias else None for name in names]
    for expert in range(stacks[0].shape[0]):
        parts = []
        for stack, bias in zip(stacks, biases, strict=True):
            own = None if bias is None else bias[expert]
            if isinstance(stack, QuantWeight):
                parts.append(Linear(stack, (stack.shape[1], stack.shape[2]), own, expert=expert))
            else:
                weight = stack.detach()[expert]
                weight = weight.T if module.is_transposed else weight
                parts.append(Linear(weight, (weight.shape[0], weight.shape[1]), own))
        yield Expert(*parts)


def _states(cache: Any) -> Iterator[tuple[Any, Any, Tensor]]:
    """Yield container, key and tensor of everything that a cache holds besides keys and values."""
    for layer in cache.layers:
        for name in ("conv_states", "recurrent_states"):
            held = getattr(layer, name, None)
            if isinstance(held, Tensor):
                yield vars(layer), name, held
            elif held is not None:
                for key, x in list(held.items() if isinstance(held, dict) else enumerate(held)):
                    if isinstance(x, Tensor):
                        yield held, key, x
