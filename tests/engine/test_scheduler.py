"""Pages and scheduling, driven at random against a memory that remembers which prefix every entry was computed from."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from quantkit.engine.pages import ROOT, Match, PageAllocator
from quantkit.engine.scheduler import Scheduler, Sequence
from quantkit.errors import QuantkitError

SIZE, SLOTS, BUDGET, VOCAB = 4, 3, 8, 3


def true_next(ids: list[int]) -> int:
    """The toy model: the next token depends on every token before it."""
    return hash(tuple(ids)) % VOCAB


class Memory:
    """What a backend stores: for every page and offset, the whole prefix that the entry was computed from."""

    def __init__(self, budget: int = BUDGET) -> None:
        self.entries: dict[tuple[int, int], tuple[int, ...]] = {}
        self.budget = budget

    def run(self, step) -> dict[Sequence, list[int]]:
        """Write and read as attention does; return the model's choice after each wanted token."""
        assert step.spans or not step.copies
        for copy in step.copies:
            for offset in range(copy.tokens):
                self.entries[copy.target, offset] = self.entries[copy.source, offset]
        answers = {}
        for span, sequence in zip(step.spans, step.sequences, strict=True):
            assert len(span.table) >= -(-(span.start + len(span.ids)) // SIZE)
            before = sequence.ids[: span.start]
            for t in range(span.start):
                assert self.entries[span.table[t // SIZE], t % SIZE] == tuple(before[: t + 1])
            read = [*before, *span.ids]
            for t in range(span.start, len(read)):
                self.entries[span.table[t // SIZE], t % SIZE] = tuple(read[: t + 1])
            ends = range(len(read) - span.num_logits + 1, len(read) + 1)
            answers[sequence] = [true_next(read[:end]) for end in ends]
        slots = [span.slot for span in step.spans]
        assert len(set(slots)) == len(slots)
        assert all(0 <= slot < SLOTS for slot in slots)
        assert sum(len(span.ids) for span in step.spans) <= self.budget
        return answers


class Serving(RuleBasedStateMachine):
    """Submit, cancel, preempt, step, fail: nothing is lost, doubled or leaked, and everybody gets the right tokens."""

    PAGES = 9

    def __init__(self) -> None:
        super().__init__()
        self.pages, self.memory, self.number = PageAllocator(self.PAGES, SIZE), Memory(), 0
        self.scheduler = Scheduler(self.pages, SLOTS, step_tokens=BUDGET)
        self.wanted: dict[Sequence, tuple[int, int]] = {}  # prompt length, final length

    @rule(prompt=st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=20), new=st.integers(1, 16))
    def submit(self, prompt, new):
        sequence = Sequence(self.number, list(prompt))
        self.number += 1
        self.wanted[sequence] = len(prompt), len(prompt) + new
        self.scheduler.add(sequence)

    @precondition(lambda self: self.wanted)
    @rule(data=st.data())
    def cancel(self, data):
        sequence = data.draw(st.sampled_from(sorted(self.wanted, key=lambda s: s.number)))
        self.scheduler.remove(sequence)
        del self.wanted[sequence]

    @precondition(lambda self: self.scheduler.running)
    @rule(data=st.data())
    def preempt(self, data):
        self.scheduler.preempt(data.draw(st.sampled_from(self.scheduler.running)))

    @rule(drafts=st.lists(st.integers(0, VOCAB - 1), max_size=5), times=st.integers(1, 6))
    def step(self, drafts, times):
        for _ in range(times):
            self.one_step(drafts)

    def one_step(self, drafts):
        for sequence in self.scheduler.running:
            if sequence.decoding:
                room = self.wanted[sequence][1] - len(sequence.ids) - 1
                sequence.drafts = drafts[:room]
        step = self.scheduler.schedule()
        assert step.spans or not self.wanted, "somebody waits for ever"
        answers = self.memory.run(step)
        for span, sequence in zip(step.spans, step.sequences, strict=True):
            guesses = list(span.ids[len(sequence.ids) - span.start :])
            accepted = []
            for token, guess in zip(answers[sequence], [*guesses, None], strict=False):
                accepted.append(token)
                if token != guess:
                    break
            computed = min(span.start + len(span.ids), len(sequence.ids) + len(accepted) - 1) if accepted else None
            sequence.ids.extend(accepted)
            self.scheduler.advance(sequence, computed or span.start + len(span.ids))
            if len(sequence.ids) == self.wanted[sequence][1]:
                self.finish(sequence)

    def finish(self, sequence):
        prompt, total = self.wanted.pop(sequence)
        expected = sequence.ids[:prompt]
        while len(expected) < total:
            expected.append(true_next(expected))
        assert sequence.ids == expected
        self.scheduler.remove(sequence)

    @rule()
    def a_step_fails(self):
        """What the engine does when the model raises: everybody who was in the step starts again."""
        for sequence in self.scheduler.schedule().sequences:
            self.scheduler.preempt(sequence)

    @invariant()
    def every_page_is_in_one_place(self):
        tables = [page for sequence in self.scheduler.running for page in sequence.table]
        assert all(self.pages.references(page) == tables.count(page) for page in range(self.PAGES))
        assert self.pages.used == len(set(tables))
        assert self.pages.available == self.PAGES - len(set(tables))
        assert 0 <= self.pages.cached <= self.pages.available
        assert all(len(set(sequence.table)) == len(sequence.table) for sequence in self.scheduler.running)

    @invariant()
    def every_sequence_is_in_one_queue(self):
        queued = [*self.scheduler.running, *self.scheduler.waiting]
        assert sorted(s.number for s in queued) == sorted(s.number for s in self.wanted)
        slots = [s.slot for s in self.scheduler.running]
        assert len(set(slots)) == len(slots)
        assert set(slots) <= set(range(SLOTS))
        assert self.scheduler.can_admit == bool(self.scheduler.waiting and len(slots) < SLOTS)
        for queue in (self.scheduler.running, self.scheduler.waiting):
            assert [s.number for s in queue] == sorted(s.number for s in queue)

    def teardown(self):
        for _ in range(2000):
            if not self.wanted:
                break
            self.one_step([0, 1])
        assert not self.wanted
        assert self.pages.used == 0
        assert not self.scheduler.running
        allocated = [self.pages.allocate() for _ in range(self.PAGES)]
        assert sorted(allocated) == list(range(self.PAGES))
        assert self.pages.allocate() is None
        assert self.pages.cached == 0
        assert all(self.pages.match([token] * SIZE, SIZE) == Match() for token in range(VOCAB))


TestServing = Serving.TestCase
TestServing.settings = settings(max_examples=120, stateful_step_count=30, deadline=None)


def drain(scheduler: Scheduler, wanted: dict[Sequence, int]) -> int:
    """Run until everybody has as many tokens as wanted; return the steps."""
    memory, steps = Memory(scheduler.step_tokens), 0
    while wanted:
        step = scheduler.schedule()
        answers = memory.run(step)
        steps += 1
        for span, sequence in zip(step.spans, step.sequences, strict=True):
            sequence.ids.extend(answers[sequence])
            scheduler.advance(sequence, span.start + len(span.ids))
            if len(sequence.ids) == wanted[sequence]:
                scheduler.remove(sequence)
                del wanted[sequence]
    return steps


def test_a_long_prompt_is_cut_and_does_not_delay_those_who_decode():
    scheduler = Scheduler(PageAllocator(32, SIZE), SLOTS, step_tokens=BUDGET)
    short, long = Sequence(0, [1]), Sequence(1, [0, 1, 2] * 10)
    scheduler.add(short)
    memory = Memory()
    first = scheduler.schedule()
    short.ids.extend(memory.run(first)[short])
    scheduler.advance(short, 1)
    scheduler.add(long)
    chunks = []
    while long.computed < 30:
        step = scheduler.schedule()
        answers = memory.run(step)
        assert short in step.sequences
        chunks.append(len(step.spans[step.sequences.index(long)].ids))
        for span, sequence in zip(step.spans, step.sequences, strict=True):
            sequence.ids.extend(answers[sequence])
            scheduler.advance(sequence, span.start + len(span.ids))
    assert chunks == [7, 7, 7, 7, 2]


def test_equal_prompts_share_full_pages_and_copy_the_one_that_differs():
    pages = PageAllocator(32, SIZE)
    scheduler = Scheduler(pages, SLOTS, step_tokens=64)
    prompt = [0, 1, 2, 0, 1, 1, 2, 2, 0, 1, 0]
    drain(scheduler, {_queued(scheduler, 0, prompt): 16})
    same, other = _queued(scheduler, 1, prompt), _queued(scheduler, 2, [*prompt[:6], 0, 0, 0])
    step = scheduler.schedule()
    assert same.cached_tokens == 10  # two full pages and two tokens of the third; the last token is always computed
    assert other.cached_tokens == 6
    assert same.table[:2] != other.table[:2]
    assert same.table[0] == other.table[0]
    assert pages.references(same.table[0]) == 2
    assert len(step.copies) == 2
    assert pages.hit_tokens == 16


def _queued(scheduler: Scheduler, number: int, ids: list[int]) -> Sequence:
    sequence = Sequence(number, list(ids))
    scheduler.add(sequence)
    return sequence


def test_static_batching_admits_nobody_until_all_are_done():
    steps = {}
    for batching in ("static", "continuous"):
        scheduler = Scheduler(PageAllocator(64, SIZE), SLOTS, step_tokens=BUDGET, batching=batching)
        steps[batching] = drain(scheduler, {_queued(scheduler, i, [i % 3]): 1 + n for i, n in enumerate([2, 30, 2, 30, 2, 30])})
    assert steps["continuous"] < steps["static"] == 60


def test_under_pressure_the_youngest_gives_way_and_loses_nothing():
    scheduler = Scheduler(PageAllocator(6, SIZE), 2, step_tokens=BUDGET)
    a, b = _queued(scheduler, 0, [0, 1, 2]), _queued(scheduler, 1, [2, 2, 1])
    drain(scheduler, {a: 20, b: 20})
    assert scheduler.preemptions == b.preemptions > 0 == a.preemptions
    assert scheduler.pages.used == 0


def test_the_least_recently_used_cached_page_goes_first():
    pages = PageAllocator(2, 1)
    first, second = pages.allocate(), pages.allocate()
    pages.publish(first, ROOT, [7])
    pages.publish(second, ROOT, [8])
    pages.release([second])
    pages.release([first])
    assert (pages.available, pages.cached, pages.used) == (2, 2, 0)
    assert pages.allocate() == second
    assert pages.evictions == 1
    assert pages.match([8], 1).pages == []
    assert pages.match([7], 1).pages == [first]
    assert pages.allocate() == first
    assert pages.allocate() is None


def test_misuse_is_named():
    pages = PageAllocator(2, 4)
    with pytest.raises(QuantkitError, match="page 1 is released, but it is not in use"):
        pages.release([1])
    with pytest.raises(QuantkitError, match="published with 3 tokens; want a full page of 4"):
        pages.publish(0, ROOT, [1, 2, 3])
    with pytest.raises(QuantkitError, match="0 pages"):
        PageAllocator(0, 4)
    with pytest.raises(QuantkitError, match="at least one token for each"):
        Scheduler(pages, 4, step_tokens=3)
