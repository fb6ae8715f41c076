"""What the engine asks of a model: run these tokens of these sequences, remember their keys and values, return logits.

    logits = backend.step(spans, copies)

A :class:`Span` is a run of tokens of one sequence with consecutive positions: a chunk of a prompt, one decoded token, or one
decoded token and the draft tokens to verify after it. One call takes spans of several sequences, so its rows are M pairs of
(sequence, position) whatever they are for. Keys and values are addressed through each span's block table (:mod:`.pages`);
writing one position twice overwrites it, and positions past the end of what the engine has accepted may hold rubbish.

Two backends exist for models of transformers (``quantkit/hf/backend.py``): pages filled by a registered attention function, and
transformers' own cache for models whose memory is not keys and values. A third one, native, needs only this file.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from quantkit.engine.sampling import Sampling


@dataclass(frozen=True, slots=True)
class Span:
    """Consecutive tokens of one sequence.

    Attributes:
        slot: a small number that this sequence keeps while it runs, for what a backend stores per running sequence.
        start: position of the first token; everything before it has been stepped.
        ids: the tokens, at least one.
        table: pages of the sequence, enough for ``start + len(ids)`` tokens.
        wanted: for how many of the last tokens logits are wanted; 0 inside a prompt.
        fresh: the first span since the sequence got its slot: what the slot held belongs to somebody else.
    """

    slot: int
    start: int
    ids: Sequence[int]
    table: Sequence[int]
    wanted: int
    fresh: bool = False


CHOSEN = -1
"""A token of a span: the one that the last launch has chosen in its slot, wherever that is."""


class Pick(NamedTuple):
    """How the token after a row is chosen: by ``sampling``, but with the noise of ``seed``; without a repetition penalty."""

    sampling: Sampling
    seed: int


class Copy(NamedTuple):
    """The first ``tokens`` tokens of page ``source`` are needed in page ``target`` too."""

    source: int
    target: int
    tokens: int


@dataclass(frozen=True, slots=True)
class Memory:
    """The key/value memory a backend is asked to hold.

    Attributes:
        pages: number of pages.
        page_tokens: tokens in a page.
        slots: sequences that run at once.
    """

    pages: int
    page_tokens: int
    slots: int


class Backend(Protocol):
    """A causal language model with paged memory."""

    @property
    def device(self) -> torch.device:
        """Where logits come from."""
        ...

    @property
    def context_tokens(self) -> int | None:
        """Longest sequence the model reads; None if it does not say."""
        ...

    @property
    def shares_pages(self) -> bool:
        """Whether equal prefixes may share pages, and pages may be copied."""
        ...

    @property
    def rewinds(self) -> bool:
        """Whether a position may be stepped again, as verification of drafts needs."""
        ...

    @property
    def notice(self) -> str | None:
        """Why this is not the fast way, for people; None if it is."""
        ...

    @property
    def engine(self) -> str:
        """What runs a step, for reports."""
        ...

    def reserve(self, memory: Memory) -> None:
        """Allocate the memory; what was there before is gone."""
        ...

    def bytes_for(self, memory: Memory) -> int:
        """Return how many bytes :meth:`reserve` allocates for ``memory``."""
        ...

    def step(self, spans: Sequence[Span], copies: Sequence[Copy] = ()) -> Tensor:
        """Carry out ``copies`` in order, then run ``spans``, each of another sequence.

        Returns:
            Logits (R, V) in the model's dtype, where R is the sum of ``wanted``, in the order of the spans.
        """
        ...


class Flight(Protocol):
    """A step on its way."""

    def tokens(self) -> list[int]:
        """Wait for the tokens chosen, one per row of logits; -1 where logits are not numbers one can choose from."""
        ...

    def logits(self) -> Tensor:
        """Return what :meth:`Backend.step` does; only until the next launch."""
        ...


@runtime_checkable
class Chooser(Protocol):
    """What a backend does besides if it chooses tokens where it computes them, so that nobody waits between two steps."""

    def launch(self, spans: Sequence[Span], copies: Sequence[Copy], picks: Sequence[Pick]) -> Flight:
        """Begin a step of ``spans`` and choose a token for every row of logits; like :meth:`Backend.step` for the rest.

        A span of the single token :data:`CHOSEN` goes on where the launch before left its slot.
        """
        ...


class OneSequence:
    """A backend for a single sequence, a call at a time: what timing a model needs.

    Args:
        backend: the model; its memory is reserved here.
        tokens: longest sequence.
    """

    PAGE_TOKENS = 32

    def __init__(self, backend: Backend, tokens: int) -> None:
        pages = -(-tokens // self.PAGE_TOKENS)
        self._backend, self._table = backend, range(pages)
        self.engine = backend.engine
        backend.reserve(Memory(pages, self.PAGE_TOKENS, 1))

    def __call__(self, ids: Sequence[int], position: int) -> Tensor:
        """Read ``ids``, the first of which stands at ``position``; return logits (1, V) after the last. 0 starts over."""
        return self._backend.step([Span(0, position, ids, self._table, 1, fresh=position == 0)])
