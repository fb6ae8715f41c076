"""The interface of drafters: what they are asked, what they return, and how one is made from its name."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from quantkit.engine.backend import Backend
from quantkit.engine.request import Limits
from quantkit.engine.sampling import History, Sampling, choose
from quantkit.registry import Registry


@dataclass(frozen=True, slots=True)
class DraftRequest:
    """A request for draft tokens for one sequence.

    Attributes:
        number: number of the sequence, unique while it is running.
        slot: index among the running sequences; reused after the sequence has ended.
        ids: prompt and answer so far.
        count: largest useful number of draft tokens, >= 1.
        sampling: how the engine chooses tokens.
        seed: seed of the noise with which the engine chooses.
        table: for a drafter with :attr:`Drafter.shares_memory`, the sequence's pages, with room for ``count`` tokens after the
            last one of ``ids``; that last token has not been run yet. Otherwise empty.
        prompt_tokens: how many of ``ids`` are the prompt.
    """

    number: int
    slot: int
    ids: Sequence[int]
    count: int
    sampling: Sampling
    seed: int
    table: Sequence[int] = ()
    prompt_tokens: int = 0


class Drafter(Protocol):
    """Proposes draft tokens.

    Attributes:
        shares_memory: whether it reads the target's keys and values, and writes those of its drafts to the positions that the
            verification overwrites.
    """

    shares_memory: bool

    def propose(self, requests: Sequence[DraftRequest]) -> list[list[int]]:
        """Return, for each request, at most ``count`` tokens that may follow its ``ids``; an empty list for no good guess."""
        ...

    def forget(self, number: int) -> None:
        """Drop the state kept for a sequence, which has ended."""
        ...


@dataclass(frozen=True, slots=True)
class DraftModel:
    """A second, smaller model that drafts.

    Attributes:
        backend: the model; its key/value memory has not been allocated.
        vocabulary: number of token ids that it knows.
    """

    backend: Backend
    vocabulary: int


@dataclass(frozen=True, slots=True)
class DrafterContext:
    """What a drafter can be made from.

    Attributes:
        backend: the target model, its key/value memory allocated.
        limits: the engine's limits, all of them resolved.
        vocabulary: number of token ids that the target knows.
        draft_model: the second model, for a drafter with ``needs_model``; else None.
    """

    backend: Backend
    limits: Limits
    vocabulary: int
    draft_model: DraftModel | None = None


class DrafterFactory(Protocol):
    """What is registered in :data:`DRAFTERS`: usually the drafter's class.

    Attributes:
        needs_model: whether a second model must be given.
    """

    @property
    def needs_model(self) -> bool:
        """Whether :attr:`DrafterContext.draft_model` must be given."""
        ...

    def make(self, context: DrafterContext) -> Drafter:
        """Return a drafter for one engine.

        Raises:
            QuantkitError: the drafter cannot work with this engine.
        """
        ...


DRAFTERS: Registry[DrafterFactory] = Registry("drafter", package="quantkit.engine.drafters")
"""Drafters by name."""

MODEL_DRAFTER = "model"
"""Name of the drafter that is used when a caller gives a second model without a name."""


def choose_drafts(requests: Sequence[DraftRequest], written: dict[int, list[int]], logits: Tensor) -> list[int | None]:
    """Choose the next draft token of each request as the engine would: with its sampling parameters and noise.

    Args:
        requests: the sequences.
        written: draft tokens so far, by sequence number.
        logits: floating (requests, V).

    Returns:
        A token for each request; None where the largest logit is NaN or infinite.
    """
    histories = None
    if any(request.sampling.remembers for request in requests):
        histories = [History([*request.ids, *written[request.number]], request.prompt_tokens) for request in requests]
    positions = [len(request.ids) + len(written[request.number]) - 1 for request in requests]
    samplings, seeds = [request.sampling for request in requests], [request.seed for request in requests]
    tokens = choose(logits, samplings, seeds, positions, histories)
    return [token if token >= 0 else None for token in tokens]
