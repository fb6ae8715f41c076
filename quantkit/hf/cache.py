"""Run a transformers model on transformers' own cache, for one sequence. The only file that uses the cache API.

The cache is a ``DynamicCache`` built from the model's config, so sliding-window, hybrid and recurrent layers each get the kind
of state they need. There are three cases:

* usually only the new tokens are run;
* LongRoPE (``rope_type`` "longrope", whose frequencies change beyond a certain length): when the sequence grows past that
  length, the cached keys have the wrong frequencies, so the whole sequence is run again, once;
* models whose state is not a transformers ``Cache``: the whole sequence is run again at every step. This is correct but slow,
  and is logged once per model class.
"""

import functools
import inspect
import logging
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from quantkit.errors import QuantkitError

logger = logging.getLogger(__name__)


class TransformersStep:
    """Run a causal language model one step at a time, for one sequence.

    The model is not changed (dtype, device, train/eval mode); all state is in the cache of this object. Steps run under
    ``torch.inference_mode``, so logits cannot be used for training.

    Args:
        model: a causal language model.

    Attributes:
        cached: whether a cache is used; False if every step runs the whole sequence.

    Raises:
        QuantkitError: an encoder-decoder model, or (at the first call) one that returns no logits.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        require_decoder(model)
        self._name, self._model = type(model).__name__, model
        accepted = inspect.signature(model.forward).parameters
        self._options: dict[str, Any] = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}
        self._options["return_dict"] = True
        self._cache_argument = _cache_argument(model, accepted)
        self.cached = self._cache_argument is not None
        if not self.cached:
            _warn_uncached(self._name)
        self._rope_switch = _rope_switch(model.config)
        self.reset()

    def reset(self) -> None:
        """Start a new sequence."""
        self._cache: DynamicCache | None = None
        self._seen: list[Tensor] = []
        self._tokens = 0

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
        self._tokens += ids.shape[1]
        switching = self._rope_switch is not None and position <= self._rope_switch < self._tokens
        if not self.cached or self._rope_switch is not None:
            self._seen.append(ids)
        if not self.cached or switching:
            ids = torch.cat(self._seen, dim=1)
        with torch.inference_mode():
            if self.cached and (self._cache is None or switching):
                self._cache = DynamicCache(config=self._model.config.get_text_config(decoder=True))
            return self._forward(ids)[:, -1].clone()  # a view could keep the logits of the whole prompt alive

    def _forward(self, ids: Tensor) -> Tensor:
        memory = (
            {"use_cache": False} if self._cache_argument is None else {"use_cache": True, self._cache_argument: self._cache}
        )
        output = self._model(input_ids=ids, **memory, **self._options)
        logits: Tensor | None = getattr(output, "logits", None)
        if logits is None:
            raise QuantkitError(
                f"{self._name} returns no logits; load the model with its language-modelling head (AutoModelForCausalLM)"
            )
        return logits


@functools.cache  # once per class
def _warn_uncached(name: str) -> None:
    logger.warning("%s has no cache that quantkit can use: every new token runs the whole sequence again, which is slow", name)


def _cache_argument(model: PreTrainedModel, accepted: Any) -> str | None:
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
