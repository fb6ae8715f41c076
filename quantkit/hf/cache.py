"""Run a transformers model on transformers' own cache, for one sequence. The only file that uses the cache API.

The cache is a ``DynamicCache`` built from the model's config, so sliding-window, hybrid and recurrent layers each get the kind
of state they need. Models differ in what they want to be told: some restart at position 0 unless they are given positions,
some count positions in a way of their own, some take one token at a time once they have begun, the state of some is no
transformers ``Cache``, and some keep theirs in their modules, for one sequence at a time. So nothing is assumed: the first
time a model is used, every :class:`_Way` of running it is tried on a few tokens, and the one whose logits are those of plain
forwards is taken. There is always a last one, to run the whole sequence again at every step, which is correct but slow, and is
logged once per model class.

LongRoPE (``rope_type`` "longrope", whose frequencies change beyond a certain length) is a case of its own: when the sequence
grows past that length, the cached keys have the wrong frequencies, so the whole sequence is run again, once.
"""

import functools
import inspect
import itertools
import logging
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from quantkit.errors import QuantkitError
from quantkit.nn.block_calls import CANNOT_RUN, running_alone
from quantkit.nn.embedding import input_table
from quantkit.nn.install import float_activations

logger = logging.getLogger(__name__)

LENGTH_DEPENDENT_ROPE = {"longrope", "dynamic"}
"""Kinds of rotary embedding whose frequencies change with the length of a sequence."""

_PIECES = (5, 1, 1, 3, 2)
"""Numbers of tokens per step that a way of running a model is tried on: a prompt, single tokens, and several at once."""


@dataclass(frozen=True, slots=True)
class _Way:
    """How a model is run step by step.

    Attributes:
        cached: on transformers' cache; else the whole sequence is run at every step.
        positions: positions are given.
        single: after the first step, tokens are run one at a time.
    """

    cached: bool = True
    positions: bool = False
    single: bool = False


class TransformersStep:
    """Run a causal language model one step at a time, for one sequence.

    The model is not changed (dtype, device, train/eval mode); all state is in the cache of this object. Steps run under
    ``torch.inference_mode``, so logits cannot be used for training.

    Args:
        model: a causal language model.
        way: how to run it; None finds out.

    Attributes:
        name: of the model's class.

    Raises:
        QuantkitError: an encoder-decoder model, one that returns no logits, or one whose predictions depend on later tokens.
    """

    def __init__(self, model: PreTrainedModel, way: _Way | None = None) -> None:
        require_decoder(model)
        self.name, self._model = type(model).__name__, model
        self._way = way or _way_of(model)
        accepted = inspect.signature(model.forward).parameters
        self._options: dict[str, Any] = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}
        self._options["return_dict"] = True
        self._cache_argument = cache_argument(model, accepted) if self._way.cached else None
        self._rope_switch = _rope_switch(model.config)
        self.reset()

    @property
    def cached(self) -> bool:
        """Whether a cache is used; False if every step runs the whole sequence."""
        return self._way.cached

    def reset(self) -> None:
        """Start a new sequence."""
        self._cache: DynamicCache | None = None
        self._seen: list[Tensor] = []
        self._tokens = 0

    def restarted(self, ids: Tensor) -> Tensor:
        """Start a new sequence with ``ids`` (1, T) and return the logits (1, V) after them."""
        self.reset()
        return self(ids, 0)

    def __call__(self, ids: Tensor, position: int) -> Tensor:
        """Run tokens and return the logits after the last one.

        Args:
            ids: int64 (1, T).
            position: position of the first token, equal to the number of tokens run so far.

        Returns:
            (1, V) in the model's dtype.

        Raises:
            QuantkitError: another shape or position, or a model without logits.
        """
        if ids.ndim != 2 or ids.shape[0] != 1 or not ids.shape[1]:
            raise QuantkitError(
                f"ids: shape {tuple(ids.shape)}, want (1, T) with T >= 1; there is one sequence per step object"
            )
        if position != self._tokens:
            raise QuantkitError(
                f"position {position}: want {self._tokens}, the number of tokens run so far, or call reset() first"
            )
        if self._way.single and position and ids.shape[1] > 1:
            return [self(one, position + i) for i, one in enumerate(ids.split(1, dim=1))][-1]
        self._tokens += ids.shape[1]
        switching = self._rope_switch is not None and position <= self._rope_switch < self._tokens
        if not self.cached or self._rope_switch is not None:
            self._seen.append(ids)
        if not self.cached or switching:
            ids, position = torch.cat(self._seen, dim=1), 0
        with torch.inference_mode():
            if self.cached and (self._cache is None or switching):
                self._cache = DynamicCache(config=self._model.config.get_text_config(decoder=True))
            return self._forward(ids, position)[:, -1].clone()  # a view could keep the logits of the whole prompt alive

    def _forward(self, ids: Tensor, position: int) -> Tensor:
        options = dict(self._options)
        if self._cache_argument is None:
            options["use_cache"] = False
        else:
            options |= {"use_cache": True, self._cache_argument: self._cache}
        if self._way.positions:
            options["position_ids"] = torch.arange(position, position + ids.shape[1], device=ids.device)[None]
        logits: Tensor | None = getattr(self._model(input_ids=ids, **options), "logits", None)
        if logits is None:
            raise QuantkitError(
                f"{self.name} returns no logits; load the model with its language-modelling head (AutoModelForCausalLM)"
            )
        return logits


_ways: weakref.WeakKeyDictionary[PreTrainedModel, _Way] = weakref.WeakKeyDictionary()


def _way_of(model: PreTrainedModel) -> _Way:
    """Return how ``model`` runs step by step; it is tried once per model.

    Raises:
        QuantkitError: it returns no logits, or its predictions depend on later tokens.
    """
    if model not in _ways:
        with float_activations(model):
            _ways[model] = _find_way(model)
    return _ways[model]


def _find_way(model: PreTrainedModel) -> _Way:
    size, device = input_table(model)
    ids = (torch.arange(sum(_PIECES), device=device) * 7 + 3)[None] % size
    plain = _plain_logits(model, ids)
    scale = max(float(logits.abs().max()) for logits in plain.values()) or 1.0
    limit = (2e-3 if model.dtype == torch.float32 else 0.1) * scale
    accepted = inspect.signature(model.forward).parameters
    if cache_argument(model, accepted) is not None:
        told = (True, False) if "position_ids" in accepted else (False,)
        for single in (False, True):
            ways = [_Way(True, positions, single) for positions in told]
            errors = [_error(TransformersStep(model, way), ids, plain) for way in ways]
            if min(errors) <= limit:
                return ways[errors.index(min(errors))]
    warn_uncached(type(model).__name__)
    return _Way(cached=False)


def _plain_logits(model: PreTrainedModel, ids: Tensor) -> dict[int, Tensor]:
    """Return the logits (1, V) that plain forwards give after so many of ``ids`` (1, T), in float32.

    Raises:
        QuantkitError: the model returns no logits, or they depend on later tokens.
    """
    step = TransformersStep(model, _Way(cached=False))
    ends = list(itertools.accumulate(_PIECES))
    with running_alone(model):
        step.restarted(ids[:, :1])  # names a model without logits
    if rope_types(model.config.get_text_config(decoder=True)) & LENGTH_DEPENDENT_ROPE:
        return {end: step.restarted(ids[:, :end]).float() for end in ends}
    with torch.inference_mode():
        logits = model(input_ids=ids, use_cache=False, return_dict=True).logits[0].float()
    limit = (2e-3 if model.dtype == torch.float32 else 0.1) * float(logits.abs().max())
    for end in ends[:-1]:
        changed = float((logits[end - 1] - step.restarted(ids[:, :end]).float()).abs().max())
        if changed <= limit:  # once is enough: a choice among equals, as of keys, may fall otherwise in a longer sequence
            break
    else:
        raise QuantkitError(
            f"{type(model).__name__}: its logits after a token change by {changed:.2g} with the tokens that follow, so that it "
            "cannot continue a text token by token; use a causal language model (some encoders want is_decoder=True)"
        )
    return {end: logits[end - 1 : end] for end in ends}


def _error(step: TransformersStep, ids: Tensor, plain: dict[int, Tensor]) -> float:
    """Return how far the logits of steps are from those of plain forwards; infinite if the model cannot run so.

    Another sequence takes its steps between: some models keep their state in their modules, where one overwrites the other's.
    """
    worst, start = 0.0, 0
    other, backwards = TransformersStep(step._model, step._way), ids.flip(1)
    try:
        for end, want in plain.items():
            difference = float((step(ids[:, start:end], start).float() - want).abs().max())
            other(backwards[:, start:end], start)
            worst, start = max(worst, difference if difference == difference else float("inf")), end
    except CANNOT_RUN as error:
        logger.debug("%s cannot be run in this way: %s", step.name, error)
        return float("inf")
    return worst


@functools.cache  # once per class
def warn_uncached(name: str) -> None:
    """Say, the first time, that models of a class run the whole sequence at every step."""
    logger.warning("%s has no cache that quantkit can use: every new token runs the whole sequence again, which is slow", name)


def cache_argument(model: PreTrainedModel, accepted: Any) -> str | None:
    """Return the name of the argument of ``model.forward`` that takes a DynamicCache; None if there is none."""
    supports = getattr(model, "_supports_default_dynamic_cache", None)
    if supports is not None and not supports():
        return None
    return next((name for name in ("cache", "past_key_values", "cache_params") if name in accepted), None)


def require_decoder(model: PreTrainedModel) -> None:
    """Refuse encoder-decoder models.

    Raises:
        QuantkitError: the model is an encoder-decoder.
    """
    if getattr(model.config, "is_encoder_decoder", False):
        raise QuantkitError(f"{type(model).__name__} is an encoder-decoder model; quantkit generates with decoder-only models")


def rope_types(config: Any) -> set[str]:
    """Return the kinds of rotary embedding that a decoder's config names."""
    return {str(parameters["rope_type"]) for parameters in _rope_parameters(config) if parameters.get("rope_type")}


def _rope_switch(config: Any) -> int | None:
    """Return the length beyond which LongRoPE changes its frequencies; None for a model without LongRoPE."""
    for parameters in _rope_parameters(config.get_text_config(decoder=True)):
        if parameters.get("rope_type") == "longrope":
            return int(parameters["original_max_position_embeddings"])
    return None


def _rope_parameters(config: Any) -> list[dict[str, Any]]:
    rope = getattr(config, "rope_parameters", None) or {}
    return [rope, *(value for value in rope.values() if isinstance(value, dict))]  # one set, or one per layer type
