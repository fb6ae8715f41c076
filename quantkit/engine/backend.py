"""The interface between the engine and a model: run tokens of several sequences, store keys and values, return logits.

    logits = backend.step(spans, copies)

A :class:`Span` is a run of tokens of one sequence at consecutive positions: a chunk of a prompt, one decoded token, or one
decoded token followed by the draft tokens to verify. One call takes spans of several sequences, so a step is a batch of M
rows, each a pair (sequence, position). Keys and values are addressed through each span's block table (:mod:`.pages`). Writing a
position twice overwrites it, and positions beyond the tokens that the engine has accepted may hold arbitrary values.

Implementations: :class:`~quantkit.engine.native.NativeBackend` (CPU), :class:`~quantkit.engine.cuda.CudaBackend`, and the two
in ``quantkit/hf`` that run a transformers model through its own modules.
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
        slot: index of the sequence among the running ones, below :attr:`Memory.slots`; it keeps the slot while it runs.
        start: position of the first token. All earlier positions have been run before.
        ids: the tokens, at least one.
        table: page numbers of the sequence, enough for ``start + len(ids)`` tokens.
        num_logits: return logits after this many tokens at the end of the span; 0 inside a prompt.
        scored: how many of these, at their start, are only to be compared with the tokens of a prompt; no token is chosen
            after them. Backends need not look at it.
        fresh: whether this is the sequence's first span in its slot; what the slot held before belongs to another sequence.
    """

    slot: int
    start: int
    ids: Sequence[int]
    table: Sequence[int]
    num_logits: int
    fresh: bool = False
    scored: int = 0

    @property
    def choices(self) -> int:
        """Number of rows of logits after which a token is chosen."""
        return self.num_logits - self.scored


LAST_SAMPLED = -1
"""Placeholder for a token id: the token that the previous launch sampled in this slot, which the host may not know yet."""


class RowSampling(NamedTuple):
    """How a backend samples the token after one row of logits.

    Attributes:
        sampling: the parameters, without penalties and biases; the seed in it is not used.
        seed: seed of the noise.
    """

    sampling: Sampling
    seed: int


class Copy(NamedTuple):
    """Copy the first ``tokens`` tokens of page ``source`` to page ``target``."""

    source: int
    target: int
    tokens: int


@dataclass(frozen=True, slots=True)
class Memory:
    """Size of the key/value memory.

    Attributes:
        pages: number of pages.
        page_tokens: tokens per page.
        slots: sequences that run at the same time.
    """

    pages: int
    page_tokens: int
    slots: int


class Backend(Protocol):
    """A causal language model with paged keys and values."""

    @property
    def device(self) -> torch.device:
        """Device of the logits."""
        ...

    @property
    def context_tokens(self) -> int | None:
        """Longest sequence that the model supports; None if unknown."""
        ...

    @property
    def shares_pages(self) -> bool:
        """Whether sequences with equal prefixes may share pages, and pages may be copied."""
        ...

    @property
    def rewinds(self) -> bool:
        """Whether a position may be run again, which the verification of drafts needs."""
        ...

    @property
    def notice(self) -> str | None:
        """Why the model does not run on a faster backend, as a sentence for users; None for the fast ones."""
        ...

    @property
    def engine(self) -> str:
        """Name of the implementation, for reports."""
        ...

    def reserve(self, memory: Memory) -> None:
        """Allocate the key/value memory; the content of any earlier one is lost."""
        ...

    def bytes_for(self, memory: Memory) -> int:
        """Return the number of bytes that :meth:`reserve` allocates for ``memory``."""
        ...

    def step(self, spans: Sequence[Span], copies: Sequence[Copy] = ()) -> Tensor:
        """Carry out ``copies`` in order, then run ``spans``.

        Args:
            spans: one per sequence.
            copies: page copies to make first.

        Returns:
            Logits (R, V) in the model's dtype, in the order of the spans; R is the sum of their ``num_logits``.
        """
        ...


class LaunchedStep(Protocol):
    """A step that is running asynchronously on the device."""

    def tokens(self) -> list[int]:
        """Wait for the sampled tokens: one per row of logits, -1 where the largest logit is NaN or infinite."""
        ...

    def logits(self) -> Tensor:
        """Return the logits as :meth:`Backend.step` does; valid until the next launch."""
        ...


@runtime_checkable
class SamplingBackend(Protocol):
    """A backend that also samples on its device, so that the next step can start before the host knows the tokens."""

    def launch(self, spans: Sequence[Span], copies: Sequence[Copy], samplings: Sequence[RowSampling]) -> LaunchedStep:
        """Start a step and sample a token for every row of logits, without waiting for it.

        Args:
            spans: as in :meth:`Backend.step`. A span whose only token is :data:`LAST_SAMPLED` continues the sequence with the
                token that the previous launch sampled in its slot.
            copies: as in :meth:`Backend.step`.
            samplings: one per row of logits.
        """
        ...


@runtime_checkable
class SelfDraftingBackend(Protocol):
    """A backend that can also run a cheap approximation of its own model, on the same keys and values."""

    def prepare_drafts(self) -> bool:
        """Rearrange the weights so that :meth:`draft` reads fewer bytes. Return False if no weight allows it.

        The results of :meth:`Backend.step` do not change.
        """
        ...

    def draft(self, spans: Sequence[Span], *, argmax: bool = False) -> Tensor:
        """Run ``spans`` approximately; keys and values are written where :meth:`Backend.step` writes the exact ones later.

        Returns:
            Logits (R, V) as :meth:`Backend.step` returns them, or int32 (R,), the most likely tokens, with ``argmax``.
        """
        ...


class OneSequence:
    """Run a single sequence on a backend, one call at a time; used to time a model.

    Args:
        backend: the model; its key/value memory is allocated here.
        tokens: longest sequence.
    """

    PAGE_TOKENS = 32

    def __init__(self, backend: Backend, tokens: int) -> None:
        pages = -(-tokens // self.PAGE_TOKENS)
        self._backend, self._table = backend, range(pages)
        self.engine = backend.engine
        backend.reserve(Memory(pages, self.PAGE_TOKENS, 1))

    def __call__(self, ids: Sequence[int], position: int) -> Tensor:
        """Run ``ids`` from ``position`` on and return logits (1, V) after the last one. Position 0 starts a new sequence."""
        return self._backend.step([Span(0, position, ids, self._table, 1, fresh=position == 0)])
