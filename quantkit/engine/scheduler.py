"""Decide which tokens run in the next step: continuous batching, chunked prefill, preemption. No tensors are involved.

Every step has room for ``step_tokens`` tokens. Sequences that are decoding take one each (plus their drafts); prompts fill the
rest, split into chunks, so a long prompt delays the others by at most one step (Orca: Yu et al., OSDI 2022; chunked prefill:
Agrawal et al. 2023, arXiv 2308.16369). Waiting sequences are admitted first come first served, as soon as a slot and pages for
all their tokens so far are free; further pages are allocated one by one as a sequence grows.

If a running sequence needs a page and none is left, the youngest running sequence is preempted: its pages are released and it
waits again, keeping its tokens, from which its keys and values are recomputed later (many are usually still cached). The oldest
sequence can take every page, and a request that could not finish even alone is refused at submission, so every accepted request
finishes.
"""

import bisect
from dataclasses import dataclass, field
from typing import Literal

from quantkit.engine.backend import Copy, Span
from quantkit.engine.pages import ROOT, PageAllocator
from quantkit.errors import QuantkitError

Batching = Literal["continuous", "static"]


@dataclass(eq=False, slots=True)
class Sequence:
    """The tokens of one request and the state that the scheduler keeps for it.

    Attributes:
        number: order of arrival.
        ids: prompt and answer so far.
        computed: number of tokens of ``ids`` whose keys and values are in memory.
        drafts: guesses for the tokens after ``ids``, to be verified by the next step.
        table: block table, the pages of the sequence in order.
        slot: index among the running sequences; None while it waits.
        cached_tokens: tokens found in published pages when it was last admitted.
        preemptions: how often it was preempted.
        fresh: whether it has not run yet in its slot.
        node, published: tree node of its published prefix, and how many of its pages that prefix has.
        scored: number of tokens at the start after which logits are wanted too, to compare them with what follows; they are
            all computed, even if their keys and values are known from another sequence.
    """

    number: int
    ids: list[int]
    computed: int = 0
    drafts: list[int] = field(default_factory=list)
    table: list[int] = field(default_factory=list)
    slot: int | None = None
    cached_tokens: int = 0
    preemptions: int = 0
    fresh: bool = True
    node: int = ROOT
    published: int = 0
    scored: int = 0

    @property
    def decoding(self) -> bool:
        """Whether a single token is left to compute, so that the next step produces a new token."""
        return len(self.ids) - self.computed == 1


@dataclass(frozen=True, slots=True)
class Step:
    """What to run next.

    Attributes:
        spans: the tokens to run.
        sequences: the sequence of each span.
        copies: pages to copy first.
    """

    spans: list[Span]
    sequences: list[Sequence]
    copies: list[Copy]


class Scheduler:
    """Choose the tokens of each step.

    Args:
        pages: the page allocator, used by this scheduler alone.
        slots: sequences that run at the same time.
        step_tokens: tokens per step, at least ``slots``.
        batching: ``"static"`` admits sequences only when none is running; it serves as a baseline.
        share: whether sequences with equal prefixes share pages.

    Attributes:
        running, waiting: sequences in order of arrival.
        preemptions: number of preemptions so far.

    Raises:
        QuantkitError: fewer tokens per step than slots, or no slot.
    """

    def __init__(
        self, pages: PageAllocator, slots: int, *, step_tokens: int, batching: Batching = "continuous", share: bool = True
    ) -> None:
        if slots < 1 or step_tokens < slots:
            raise QuantkitError(
                f"{slots} running sequences and {step_tokens} tokens per step: want at least one token for each"
            )
        self.pages, self.step_tokens, self.share = pages, step_tokens, share
        self.running: list[Sequence] = []
        self.waiting: list[Sequence] = []
        self.preemptions = 0
        self._static = batching == "static"
        self._slots = list(range(slots - 1, -1, -1))

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence. The caller has checked that it could finish if it ran alone."""
        bisect.insort(self.waiting, sequence, key=_arrival)

    @property
    def can_admit(self) -> bool:
        """Whether a sequence is waiting and a slot is free."""
        return bool(self.waiting and self._slots)

    def schedule(self) -> Step:
        """Return the next step; it is empty if there is nothing to run."""
        budget, planned, copies = self.step_tokens, dict[Sequence, int](), list[Copy]()
        admitting, preempted = not (self._static and self.running), self.preemptions
        decoding = [sequence for sequence in self.running if sequence.decoding]
        spare = budget - len(self.running)  # tokens that drafts may use without delaying another sequence
        for sequence in decoding:
            if sequence.slot is None:  # preempted by an earlier iteration
                continue
            drafts = min(len(sequence.drafts), max(spare, 0))
            count = self._grow(sequence, 1 + drafts, planned)
            if count:
                planned[sequence] = count
                spare -= count - 1
        budget -= sum(planned.values())
        for sequence in [s for s in self.running if s not in planned and not s.decoding]:
            budget -= self._prefill(sequence, budget, planned)
        while admitting and budget > 0 and self.waiting and self._slots and self.preemptions == preempted:
            sequence = self.waiting[0]
            if not self._admit(sequence, copies):
                break
            budget -= self._prefill(sequence, budget, planned)
        chosen = [sequence for sequence in self.running if sequence in planned]
        return Step([_span(sequence, planned[sequence]) for sequence in chosen], chosen, copies)

    def advance(self, sequence: Sequence, computed: int) -> None:
        """Record that the first ``computed`` tokens of ``sequence.ids`` are in memory, and publish its full pages."""
        sequence.computed, sequence.drafts, sequence.fresh = computed, [], False
        size = self.pages.page_tokens
        while self.share and (sequence.published + 1) * size <= computed:
            start = sequence.published * size
            tokens = sequence.ids[start : start + size]
            sequence.node = self.pages.publish(sequence.table[sequence.published], sequence.node, tokens)
            sequence.published += 1

    def reserve(self, sequence: Sequence, tokens: int) -> int:
        """Allocate pages for up to ``tokens`` more tokens, without preempting; return for how many tokens there is room."""
        while len(sequence.table) < self.pages.pages_for(sequence.computed + tokens):
            page = self.pages.allocate()
            if page is None:
                break
            sequence.table.append(page)
        return min(len(sequence.table) * self.pages.page_tokens - sequence.computed, tokens)

    def remove(self, sequence: Sequence) -> None:
        """Remove a sequence, running or waiting, and release its pages."""
        if sequence.slot is None:
            self.waiting.remove(sequence)
        else:
            self._evict(sequence)

    def preempt(self, sequence: Sequence) -> None:
        """Release the pages and the slot of a running sequence and queue it again."""
        self._evict(sequence)
        sequence.preemptions += 1
        self.preemptions += 1
        self.add(sequence)

    def _evict(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self.pages.release(sequence.table)
        assert sequence.slot is not None
        self._slots.append(sequence.slot)
        sequence.slot, sequence.table, sequence.drafts = None, [], []
        sequence.computed = sequence.published = 0
        sequence.node, sequence.fresh = ROOT, True

    def _grow(self, sequence: Sequence, tokens: int, planned: dict[Sequence, int]) -> int:
        """Allocate pages for ``tokens`` more tokens, preempting younger sequences if none is free.

        Returns:
            For how many tokens there is room; 0 if the sequence itself was preempted.
        """
        while len(sequence.table) < self.pages.pages_for(sequence.computed + tokens):
            page = self.pages.allocate()
            if page is not None:
                sequence.table.append(page)
                continue
            room = len(sequence.table) * self.pages.page_tokens - sequence.computed
            if room > 0:  # run part of a chunk, or fewer drafts, rather than preempt
                return min(room, tokens)
            youngest = self.running[-1]
            planned.pop(youngest, None)
            self.preempt(youngest)
            if youngest is sequence:
                return 0
        return tokens

    def _prefill(self, sequence: Sequence, budget: int, planned: dict[Sequence, int]) -> int:
        """Plan the next chunk of a prompt; return how many tokens of the budget it takes."""
        if sequence.slot is None or budget < 1:
            return 0
        before = sum(planned.values())
        count = self._grow(sequence, min(len(sequence.ids) - sequence.computed, budget), planned)
        if count:
            planned[sequence] = count
        return sum(planned.values()) - before  # preempting others may have given tokens back

    def _admit(self, sequence: Sequence, copies: list[Copy]) -> bool:
        """Move the first waiting sequence to the running ones if its tokens fit beside what those will need soon."""
        pages, limit = self.pages, len(sequence.ids) - 1  # the last token is always computed, because its logits are needed
        match = pages.match(sequence.ids, limit) if self.share and not sequence.scored else None
        shared = match.pages if match is not None else []
        headroom = pages.page_tokens  # one more page for each running sequence; otherwise they would soon preempt this one
        owed = sum(max(pages.pages_for(len(s.ids) + headroom) - len(s.table), 0) for s in self.running)
        revived = sum(pages.references(page) == 0 for page in shared)
        if pages.pages_for(len(sequence.ids)) - len(shared) > pages.available - revived - owed:
            return False
        for page in shared:
            pages.retain(page)
        sequence.table = list(shared)
        sequence.computed = len(shared) * pages.page_tokens
        sequence.published = len(shared)
        if match is not None:
            sequence.node = match.node
            if match.partial is not None:
                own = pages.allocate()
                assert own is not None, "counted above"
                sequence.table.append(own)
                sequence.computed += match.partial_tokens
                copies.append(Copy(match.partial, own, match.partial_tokens))
        sequence.cached_tokens = sequence.computed
        pages.hit_tokens += sequence.computed
        sequence.slot = self._slots.pop()
        self.waiting.pop(0)
        bisect.insort(self.running, sequence, key=_arrival)
        return True


def _arrival(sequence: Sequence) -> int:
    return sequence.number


def _span(sequence: Sequence, count: int) -> Span:
    """Return the next ``count`` tokens of a sequence, its drafts included."""
    end, known = sequence.computed + count, len(sequence.ids)
    tokens = sequence.ids[sequence.computed : end] + sequence.drafts[: max(end - known, 0)]
    choices = max(end - known + 1, 0)
    scored = count - choices if sequence.computed < sequence.scored else 0
    assert sequence.slot is not None
    return Span(sequence.slot, sequence.computed, tokens, sequence.table, choices + scored, sequence.fresh, scored)
