"""Weights that are tied: what a config says and what a model does.

A config says ``tie_word_embeddings`` and a model's head is or is not the embedding's own table. Where they disagree, somebody
has trained the head apart or flipped the flag, and who believes the flag loses the head. What the model does is what counts:
the flag is set to it, and the checkpoint says so.
"""

import logging
from typing import Any

from torch import nn
from transformers import PretrainedConfig

from quantkit.nn.linear import QuantModule

log = logging.getLogger(__name__)


def settle_ties(model: nn.Module, config: PretrainedConfig) -> None:
    """Let ``config`` say whether the head of ``model`` is tied to its input embedding, as it is.

    Args:
        model: float or quantized. One without a head, or without an embedding, says nothing.
        config: changed in place: the model's own, or a copy.
    """
    tied = head_is_tied(model)
    if tied is None:
        return
    for one in {id(part): part for part in (config, config.get_text_config())}.values():
        if getattr(one, "tie_word_embeddings", tied) != tied:
            if one is config:
                log.warning(
                    "config.json says tie_word_embeddings=%s, but the output head is %s; the model counts, and its config is "
                    "changed",
                    not tied,
                    "the embedding's own table" if tied else "a matrix of its own, different from the embedding's",
                )
            one.tie_word_embeddings = tied


def head_is_tied(model: Any) -> bool | None:
    """Say whether the output head is the input embedding's own table; None for a model that lacks one of them."""
    try:
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    except (AttributeError, NotImplementedError):
        return None
    if embedding is None or head is None:
        return None
    if isinstance(head, QuantModule) or isinstance(embedding, QuantModule):
        return isinstance(head, QuantModule) and head.tied_to is not None
    weight = getattr(head, "weight", None)
    return None if weight is None else weight is getattr(embedding, "weight", None)
