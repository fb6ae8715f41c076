"""Keyword options shared by :func:`quantkit.generate`, :class:`quantkit.Engine` and the server, typed for editors and mypy.

Defaults are those of the functions that use the options: :class:`~quantkit.engine.sampling.Sampling`,
:func:`~quantkit.hf.backend.make_backend` and :class:`~quantkit.engine.engine.TokenEngine`.
"""

from collections.abc import Callable, Sequence
from typing import TypedDict

from torch import nn

from quantkit.engine.drafters import Drafter
from quantkit.spec import KVScheme

DrafterChoice = str | nn.Module | tuple[str, nn.Module] | Drafter | None
"""What selects a drafter: a registered name; a smaller model; a name and a model; a drafter object; None for no drafting."""


class EngineOptions(TypedDict, total=False):
    """How a model runs; see :class:`quantkit.Engine`."""

    kv: str | KVScheme
    engine: str
    compute: str
    batch_invariant: bool


class SamplingOptions(TypedDict, total=False):
    """How tokens are chosen; see :class:`quantkit.Sampling`."""

    temperature: float
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float
    seed: int | None


class GenerationOptions(EngineOptions, SamplingOptions, total=False):
    """All keyword options of :func:`quantkit.generate`, which documents them."""

    max_new_tokens: int
    min_new_tokens: int
    stop: str | int | Sequence[str | int]
    stream: Callable[[str], None] | None
    logprobs: int | None
    drafter: DrafterChoice
    batch_size: int
