"""Which tokens run in the next step: continuous batching, chunked prefill, preemption. Knows no tensor.

Every step has room for ``step_tokens`` tokens. Sequences that are decoding take one each (and drafts), then prompts fill the
rest, cut into chunks, so a long prompt delays nobody by more than one step (Orca: Yu et al., OSDI 2022; chunked prefill:
Agrawal et al. 2023, arXiv 2308.16369). A waiting sequence is admitted, first come first served, as soon as a place is free
and pages for all of its tokens so far are; the rest of its pages come one by one as it grows.

When a running sequence needs a page and none is left, the youngest one is preempted: its pages are released and it waits
again, with all its tokens, from which everything is recomputed when there is room (much of it is usually still cached). The
oldest sequence can take every page, and a request that could not finish even alone is refused when it is submitted, so
every accepted request finishes.
"""

import bisect
from dataclasses import dataclass, field
from typing import Literal

from quantkit.engine.backend import Copy, Span
from quantkit.engine.pages import ROOT, Pages
from quantkit.errors import QuantkitError

Batching = Literal["continuous", "static"]


@dataclass(eq=False, slots=True)
class Running:
    """A sequence as the scheduler sees it.

    Attributes:
        number: order of arrival.
        ids: prompt and answer so far.
        computed: how many of ``ids`` are in the key/value memory.
        drafts: guesses for what follows ``ids``, to be verified by the next step.
        table: its pages.
        slot: its place among the running; None while it waits.
        cached_tokens: tokens found in published pages when it was last admitted.
        preemptions: how often it had to give its pages back.
        fresh: it has not been stepped in its slot.
        node, published: how far its pages are in the tree of published prefixes.
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

    @property
    def decoding(self) -> bool:
        """Whether one token is left to compute, so that the next step samples."""
        return len(self.ids) - self.computed == 1


@dataclass(frozen=True, slots=True)
class Step:
    """What to run next: spans, the sequence of each, and pages to copy before."""

    spans: list[Span]
    sequences: list[Running]
    copies: list[Copy]


class Scheduler:
    """Decide what runs.

    Args:
        pages: the page allocator; this object is its only user.
        slots: sequences that run at once.
        step_tokens: tokens per step, at least ``slots``.
        batching: ``"static"`` admits only when nothing runs, as simple servers do; it exists to be compared with.
        share: whether equal prefixes share pages.
    """

    def __init__(
        self, pages: Pages, slots: int, *, step_tokens: int, batching: Batching = "continuous", share: bool = True
    ) -> None:
        if slots < 1 or step_tokens < slots:
            raise QuantkitError(f"{slots} running sequences and {step_tokens} tokens a step: want at least one token for each")
        self.pages, self.step_tokens, self.share = pages, step_tokens, share
        self.running: list[Running] = []  # in order of arrival
        self.waiting: list[Running] = []  # in order of arrival
        self.preemptions = 0
        self._static = batching == "static"
        self._slots = list(range(slots - 1, -1, -1))

    def add(self, sequence: Running) -> None:
        """Queue a sequence; the caller has checked that it can finish alone."""
        bisect.insort(self.waiting, sequence, key=_arrival)

    @property
    def admits(self) -> bool:
        """Whether somebody waits and there is a place."""
        return bool(self.waiting and self._slots)

    def schedule(self) -> Step:
        """Choose the next step; empty when nothing is left to run."""
        budget, planned, copies = self.step_tokens, dict[Running, int](), list[Copy]()
        admitting, preempted = not (self._static and self.running), self.preemptions
        decoding = [sequence for sequence in self.running if sequence.decoding]
        spare = budget - len(self.running)  # what drafts may use without taking a token from somebody else
        for sequence in decoding:
            if sequence.slot is None:  # preempted a moment ago
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

    def advance(self, sequence: Running, computed: int) -> None:
        """Record that the first ``computed`` tokens of ``sequence.ids`` are in memory, and publish pages that are full."""
        sequence.computed, sequence.drafts, sequence.fresh = computed, [], False
        size = self.pages.page_tokens
        while self.share and (sequence.published + 1) * size <= computed:
            start = sequence.published * size
            tokens = sequence.ids[start : start + size]
            sequence.node = self.pages.publish(sequence.table[sequence.published], sequence.node, tokens)
            sequence.published += 1

    def reserve(self, sequence: Running, tokens: int) -> int:
        """Get pages for up to ``tokens`` more tokens, nobody else's; return for how many there are."""
        while len(sequence.table) < self.pages.pages_for(sequence.computed + tokens):
            page = self.pages.allocate()
            if page is None:
                break
            sequence.table.append(page)
        return min(len(sequence.table) * self.pages.page_tokens - sequence.computed, tokens)

    def remove(self, sequence: Running) -> None:
        """Forget a sequence, running or waiting; its pages are released."""
        if sequence.slot is None:
            self.waiting.remove(sequence)
        else:
            self._evict(sequence)

    def preempt(self, sequence: Running) -> None:
        """Take everything from a running sequence and let it wait."""
        self._evict(sequence)
        sequence.preemptions += 1
        self.preemptions += 1
        self.add(sequence)

    def _evict(self, sequence: Running) -> None:
        self.running.remove(sequence)
        self.pages.release(sequence.table)
        assert sequence.slot is not None
        self._slots.append(sequence.slot)
        sequence.slot, sequence.table, sequence.drafts = None, [], []
        sequence.computed = sequence.published = 0
        sequence.node, sequence.fresh = ROOT, True

    def _grow(self, sequence: Running, tokens: int, planned: dict[Running, int]) -> int:
        """Get pages for ``tokens`` more tokens; return for how many there are. 0: the sequence itself was preempted."""
        while len(sequence.table) < self.pages.pages_for(sequence.computed + tokens):
            page = self.pages.allocate()
            if page is not None:
                sequence.table.append(page)
                continue
            room = len(sequence.table) * self.pages.page_tokens - sequence.computed
            if room > 0:  # part of a chunk, or fewer drafts, rather than somebody else's pages
                return min(room, tokens)
            youngest = self.running[-1]
            planned.pop(youngest, None)
            self.preempt(youngest)
            if youngest is sequence:
                return 0
        return tokens

    def _prefill(self, sequence: Running, budget: int, planned: dict[Running, int]) -> int:
        """Plan the next chunk of a prompt; return its tokens."""
        if sequence.slot is None or budget < 1:
            return 0
        before = sum(planned.values())
        count = self._grow(sequence, min(len(sequence.ids) - sequence.computed, budget), planned)
        if count:
            planned[sequence] = count
        return sum(planned.values()) - before  # preempting others may have given tokens back

    def _admit(self, sequence: Running, copies: list[Copy]) -> bool:
        """Let the first waiting sequence run if all of its tokens fit beside what the running ones still need."""
        pages, limit = self.pages, len(sequence.ids) - 1  # the last token is always computed: its logits are wanted
        match = pages.match(sequence.ids, limit) if self.share else None
        shared = match.pages if match is not None else []
        headroom = pages.page_tokens  # a page more for each running sequence, or it would soon take this one's away again
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
        pages.hits_tokens += sequence.computed
        sequence.slot = self._slots.pop()
        self.waiting.pop(0)
        bisect.insort(self.running, sequence, key=_arrival)
        return True


def _arrival(sequence: Running) -> int:
    return sequence.number


def _span(sequence: Running, count: int) -> Span:
    end, known = sequence.computed + count, len(sequence.ids)
    tokens = sequence.ids[sequence.computed : end] + sequence.drafts[: max(end - known, 0)]
    wanted = max(end - known + 1, 0)
    assert sequence.slot is not None
    return Span(sequence.slot, sequence.computed, tokens, sequence.table, wanted, sequence.fresh)
