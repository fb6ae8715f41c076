"""Run a transformers model on paged keys and values: packed rows of any sequences through its own modules.

transformers allows attention functions to be registered, and calls the selected one in every layer with that layer's queries,
keys and values. The one registered here writes keys and values to our own pages and attends to them, so the model can run any
mix of rows of any sequences as one packed batch, without transformers' cache.

This is correct for a model whose layers have no state other than keys and values, and whose attention depends on positions and
windows only. The config must not indicate anything else. Layers of *indexed attention* (DeepSeek V3.2, GLM-5) also keep keys by
which they choose the tokens that a query sees: on pages as well (:mod:`~quantkit.hf.indexed`). The result is then *verified*: a
few tokens are run on pages, in chunks and together with another sequence, and their logits are compared with those of a plain
forward pass.
"""

import contextlib
import contextvars
import inspect
import re
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from quantkit.engine.attention import Layout, attend, by_length
from quantkit.engine.backend import Copy, Memory, Span
from quantkit.engine.kvstore import Pool, make_pool, pool_bytes
from quantkit.errors import QuantkitError
from quantkit.hf.cache import LENGTH_DEPENDENT_ROPE, rope_types
from quantkit.hf.indexed import INDEXED, IndexKeys, IndexPages, model_options
from quantkit.hf.structure import towers
from quantkit.nn.block_calls import running_alone
from quantkit.nn.embedding import input_table
from quantkit.nn.install import float_activations
from quantkit.spec import KVScheme
from quantkit.system.turns import turn

_ATTENTION = "quantkit"
_POSITIONS = re.compile(r"(^|\.)(wpe|pos_emb\w*|position_emb\w*|embed_positions)$")
_KNOWN_LAYERS = {"full_attention", "sliding_attention", INDEXED}


class _CannotPage(Exception):
    """The model cannot run on pages; the message is the reason."""


class _Memory(Protocol):
    """The key/value memory that the attention function uses during one forward pass; ``index`` where layers have indexers."""

    @property
    def index(self) -> IndexKeys | None: ...

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float, options: dict[str, Any]) -> Tensor: ...


_current: contextvars.ContextVar[_Memory] = contextvars.ContextVar("quantkit_memory")


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attend over the memory of the current step: query (1, heads, M, dim), result (1, M, heads, dim)."""
    memory = _current.get(None)
    own = memory is not None and memory.index is not None and attention_mask is memory.index.mask
    if (attention_mask is not None and not own) or options.get("position_bias") is not None:
        raise _CannotPage("its attention uses a mask or a bias that does not follow from positions")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    queries, keys, values = (tensor[0].transpose(0, 1) for tensor in (query, key, value))  # (M, heads, dim)
    # contiguous, as transformers' own functions return it: models view it in other shapes
    if memory is None:
        raise QuantkitError(
            "another thread generates with this model, whose attention is replaced meanwhile; run the model afterwards, or "
            "generate with one quantkit.Engine for all requests"
        )
    return memory.attend(queries, keys, values, scale, options)[None].contiguous(), None


ALL_ATTENTION_FUNCTIONS.register(_ATTENTION, _attention)


@dataclass(frozen=True, slots=True)
class LayerShape:
    """Shape of one layer's keys and values per token.

    Attributes:
        kv_heads: number of keys, and of values.
        key_dim, value_dim: channels of a key and of a value.
        dtype: dtype of both.
        index_dim: channels of the key by which an indexer chooses tokens; 0 if there is none.
    """

    kv_heads: int
    key_dim: int
    value_dim: int
    dtype: torch.dtype
    index_dim: int = 0


class _Shapes:
    """A memory that stores nothing and records the shapes and the sliding window of each layer."""

    def __init__(self, index: IndexKeys | None) -> None:
        self.layers: list[LayerShape] = []
        self.windows: list[int | None] = []
        self.index = index

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float, options: dict[str, Any]) -> Tensor:
        index_dim = self.index.take_dim() if self.index is not None else 0
        self.layers.append(LayerShape(key.shape[1], key.shape[2], value.shape[2], key.dtype, index_dim))
        self.windows.append(options.get("sliding_window"))
        return query.new_zeros(*query.shape[:2], value.shape[2])


class PagedBackend:
    """Run packed rows of several sequences through a model's modules, with keys and values in our own pages.

    The model is not changed (dtype, device, mode), except that its attention function is replaced while a step runs.

    Args:
        model: a causal language model.
        scheme: how keys and values are stored.
        layers: shapes of each layer's keys and values, from :func:`describe_layers`.
    """

    shares_pages = rewinds = True
    notice = None
    engine = "modules"

    def __init__(self, model: PreTrainedModel, scheme: KVScheme, layers: Sequence[LayerShape]) -> None:
        self._model, self.scheme, self.layers = model, scheme, tuple(layers)
        self.device = input_table(model)[1]
        self.context_tokens = context_tokens(model)
        self._configs = _attention_configs(model)
        accepted = inspect.signature(model.forward).parameters
        self._slices_logits = "logits_to_keep" in accepted
        self._pools: list[tuple[Pool, Pool]] = []
        self.index = IndexPages([layer.index_dim for layer in layers]) if any(layer.index_dim for layer in layers) else None
        self._page_tokens = self._layer = 0
        self._layout: Layout | None = None

    def reserve(self, memory: Memory) -> None:
        """Allocate the pages of all layers."""
        self._pools, scheme = [], self.scheme
        self._page_tokens = memory.page_tokens
        for layer in self.layers:
            keys = make_pool(memory, (layer.kv_heads, layer.key_dim), layer.dtype, self.device, scheme.key, scheme)
            values = make_pool(memory, (layer.kv_heads, layer.value_dim), layer.dtype, self.device, scheme.value, scheme)
            self._pools.append((keys, values))
        if self.index is not None:
            self.index.reserve(memory, self.layers[0].dtype, self.device)

    def bytes_for(self, memory: Memory) -> int:
        """Return the number of bytes that :meth:`reserve` allocates for ``memory``."""
        scheme, total = self.scheme, 0
        for layer in self.layers:
            for spec, dim in ((scheme.key, layer.key_dim), (scheme.value, layer.value_dim)):
                total += pool_bytes(memory, (layer.kv_heads, dim), layer.dtype, spec, scheme.recent)
        return total + (self.index.bytes_for(memory, self.layers[0].dtype) if self.index is not None else 0)

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values that are allocated now."""
        own = sum(pool.nbytes for pools in self._pools for pool in pools)
        return own + (self.index.nbytes if self.index is not None else 0)

    @torch.inference_mode()
    def step(self, spans: Sequence[Span], copies: Sequence[Copy] = ()) -> Tensor:
        """Run ``spans``; see :class:`~quantkit.engine.backend.Backend`. Threads that share the model take turns."""
        with turn(self._model):
            return self._step(spans, copies)

    def _step(self, spans: Sequence[Span], copies: Sequence[Copy]) -> Tensor:
        for pool in (pool for pools in self._pools for pool in pools):
            pool.copy(copies)
        ordered = [spans[i] for i in by_length(spans)]
        self._layout, self._layer = Layout(ordered, self._page_tokens, self.device), 0
        if self.index is not None:
            self.index.start(self._layout, copies)
        ends: dict[int, int] = {}
        row = 0
        for span in ordered:
            row += len(span.ids)
            ends[span.slot] = row
        logit_rows = [ends[span.slot] - back for span in spans for back in range(span.num_logits, 0, -1)]
        ids = torch.tensor([[token for span in ordered for token in span.ids]], device=self.device)
        keep = torch.tensor(logit_rows or [row - 1], device=self.device)
        logits = _forward(self._model, self._configs, self, ids, self._layout.rows.positions[None], self._slices_logits, keep)
        if self._layer != len(self.layers):
            raise QuantkitError(
                f"attention ran in {self._layer} layers, want {len(self.layers)}; the model has changed, make a new engine"
            )
        return logits if logit_rows else logits[:0]

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float, options: dict[str, Any]) -> Tensor:
        """Store one layer's keys and values (M, kv_heads, dim) and return the attention of its queries (M, heads, dim)."""
        assert self._layout is not None
        keys, values = self._pools[self._layer]
        self._layer += 1
        indices = options.get("indices")
        keys.write(self._layout.rows, key)
        values.write(self._layout.rows, value)
        return attend(
            query,
            keys,
            values,
            self._layout,
            scale=scale,
            window=options.get("sliding_window"),
            softcap=options.get("softcap"),
            sinks=options.get("s_aux"),
            chosen=None if indices is None or self.index is None else self.index.chosen(indices[0]),
        )


_described: weakref.WeakKeyDictionary[PreTrainedModel, tuple[LayerShape, ...] | str] = weakref.WeakKeyDictionary()


def describe_layers(model: PreTrainedModel) -> tuple[LayerShape, ...] | str:
    """Return the shapes of each layer's keys and values, or a sentence that says why the model cannot run on pages.

    The check runs once per model.
    """
    if model not in _described:
        _described[model] = _describe(model)
    return _described[model]


def _describe(model: PreTrainedModel) -> tuple[LayerShape, ...] | str:
    name = type(model).__name__
    try:
        config = model.config.get_text_config(decoder=True)
        if types := rope_types(config) & LENGTH_DEPENDENT_ROPE:
            raise _CannotPage(f"its rotary frequencies change with the length of a sequence ({', '.join(types)})")
        kinds = list(getattr(config, "layer_types", None) or [])
        if unknown := set(kinds) - _KNOWN_LAYERS:
            raise _CannotPage(f"it has layers of kind {', '.join(sorted(unknown))}")
        if "position_ids" not in inspect.signature(model.forward).parameters:
            raise _CannotPage("it takes no position_ids")
        with float_activations(model):
            return _verify(model, kinds)
    except _CannotPage as reason:
        return f"{name}: {reason}"


def _verify(model: PreTrainedModel, kinds: list[str]) -> tuple[LayerShape, ...]:
    """Return the shapes of the layers after comparing logits on pages with those of a plain forward pass.

    Raises:
        _CannotPage: attention is not called as expected, or the logits differ.
    """
    size, device = input_table(model)
    ids = (torch.arange(11, device=device) * 7919 + 3) % size
    with torch.inference_mode(), running_alone(model):
        plain = model(input_ids=ids[None], use_cache=False, return_dict=True)
    if getattr(plain, "logits", None) is None:
        raise QuantkitError(
            f"{type(model).__name__} returns no logits; load it with its language-modelling head (AutoModelForCausalLM)"
        )
    positions = torch.arange(len(ids), device=device)[None]
    shapes = _Shapes(IndexKeys(len(ids), device) if INDEXED in kinds else None)
    with torch.inference_mode(), _model_errors_as_reasons():
        _forward(model, _attention_configs(model), shapes, ids[None], positions, False, positions[0])
    config = model.config.get_text_config(decoder=True)
    layers = config.num_hidden_layers
    if len(shapes.layers) != layers:
        raise _CannotPage(f"{layers - len(shapes.layers)} of its {layers} layers do not use the registered attention function")
    sliding = [kind == "sliding_attention" for kind in kinds]
    if kinds and any(want and not window for want, window in zip(sliding, shapes.windows, strict=True)):
        raise _CannotPage("its sliding layers do not pass their window to the attention function")
    slides = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    if not kinds and slides and not any(shapes.windows):
        raise _CannotPage("its sliding window is not passed to the attention function")
    backend = PagedBackend(model, KVScheme(), shapes.layers)
    backend.reserve(Memory(8, 4, 2))
    tokens = ids.tolist()
    with _model_errors_as_reasons():
        backend.step([Span(0, 0, tokens[:5], [3, 5], 0), Span(1, 0, tokens[4:9], [0, 6], 1)])
        got = [backend.step([Span(1, 5, tokens[:1], [0, 6], 1), Span(0, 5, tokens[5:10], [3, 5, 1], 5)])[1:]]
        got.append(backend.step([Span(0, 10, tokens[10:], [3, 5, 1], 1)]))
    found, want = torch.cat(got).float(), plain.logits[0, 5:].float()
    error = ((found - want).abs().max() / want.abs().max().clamp(min=1e-6)).item()
    if not error <= (2e-3 if plain.logits.dtype == torch.float32 else 0.1):
        raise _CannotPage(f"its logits on pages differ from a plain forward pass (by {error:.1e} of the largest)")
    return tuple(shapes.layers)


@contextlib.contextmanager
def _model_errors_as_reasons() -> Iterator[None]:
    """Convert exceptions of a model that cannot run packed rows to :class:`_CannotPage`."""
    try:
        yield
    except (RuntimeError, ValueError, TypeError, KeyError, AttributeError, IndexError, LookupError) as error:
        raise _CannotPage(f"it does not run on packed rows ({type(error).__name__}: {error})") from error


def _forward(
    model: PreTrainedModel,
    configs: Sequence[Any],
    memory: _Memory,
    ids: Tensor,
    positions: Tensor,
    slices_logits: bool,
    keep: Tensor,
) -> Tensor:
    """Run packed rows (1, M) on ``memory``; return the logits (R, V) of the rows ``keep`` (R,)."""
    before = [config._attn_implementation for config in configs]
    token = _current.set(memory)
    options: dict[str, Any] = {"logits_to_keep": keep} if slices_logits else {}
    if memory.index is not None:
        options |= model_options(model, memory.index)
    try:
        for config in configs:
            config._attn_implementation_internal = _ATTENTION
        output = model(input_ids=ids, position_ids=positions, use_cache=False, return_dict=True, **options)
    finally:
        for config, implementation in zip(configs, before, strict=True):
            config._attn_implementation_internal = implementation
        _current.reset(token)
    logits: Tensor = output.logits[0]
    return logits if slices_logits else logits[keep]


def _attention_configs(model: PreTrainedModel) -> list[Any]:
    """Return every config object from which a module of the model reads its attention function."""
    found = {id(config): config for m in model.modules() if (config := getattr(m, "config", None)) is not None}
    return [config for config in found.values() if hasattr(config, "_attn_implementation_internal")]


def context_tokens(model: PreTrainedModel) -> int | None:
    """Return the longest sequence that the model supports: what its config names, and no more than learned positions.

    Returns:
        None if the config names no length and no positions are learned.
    """
    named = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    others = tuple(towers(model))  # those of images and sound number patches and frames
    tables = [
        part.num_embeddings - getattr(part, "offset", 0)  # OPT and its like leave the first rows out
        for name, part in model.named_modules()
        if isinstance(part, nn.Embedding) and _POSITIONS.search(name) and not name.startswith(others)
    ]
    return min([*tables, *([named] if isinstance(named, int) and named > 0 else [])], default=None)
