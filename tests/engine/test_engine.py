"""The engine on a toy backend whose answers can be worked out by hand, and whose memory notices every mistake."""

import itertools
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from quantkit.engine.backend import LAST_SAMPLED
from quantkit.engine.engine import TokenEngine
from quantkit.engine.request import Limits, QueueFull
from quantkit.engine.sampling import Sampling, choose
from quantkit.errors import QuantkitError

VOCAB, SIZE = 10, 4


class SumBackend:
    """Predicts (sum of everything read) mod 10, read from pages; fails and breaks on demand."""

    device, context_tokens, shares_pages, rewinds, notice = torch.device("cpu"), 200, True, True, None
    engine = "toy"

    def __init__(self) -> None:
        self.calls: list[list[tuple[int, int]]] = []
        self.fail_at: int | None = None
        self.broken: set[int] = set()  # after reading these sums the logits are not finite
        self.spread = 1.0

    def reserve(self, memory) -> None:
        self.memory = torch.full((memory.pages, memory.page_tokens), -1000)

    def bytes_for(self, memory) -> int:
        return memory.pages * memory.page_tokens * 8

    def step(self, spans, copies=()):
        self.calls.append([(span.start, len(span.ids)) for span in spans])
        if len(self.calls) == self.fail_at:
            raise MemoryError("too much")
        for source, target, tokens in copies:
            self.memory[target, :tokens] = self.memory[source, :tokens]
        rows = []
        for span in spans:
            for i, token in enumerate(span.ids):
                self.memory[span.table[(span.start + i) // SIZE], (span.start + i) % SIZE] = token
            end = span.start + len(span.ids)
            read = self.memory[list(span.table)].flatten()
            for count in range(end - span.num_logits + 1, end + 1):
                total = int(read[:count].sum())
                row = torch.nn.functional.one_hot(torch.tensor(total % VOCAB), VOCAB).float() * 5 * self.spread
                rows.append(row * math.nan if total in self.broken else row)
        return torch.stack(rows) if rows else torch.zeros(0, VOCAB)


class AheadBackend(SumBackend):
    """The same, choosing tokens itself: what it is asked to go on from is known to it alone."""

    def launch(self, spans, copies, picks):
        known = getattr(self, "newest", {})
        spans = [replace(s, ids=[known[s.slot]]) if list(s.ids) == [LAST_SAMPLED] else s for s in spans]
        logits = self.step(spans, copies)
        positions = [s.start + len(s.ids) - s.num_logits + i for s in spans for i in range(s.num_logits)]
        tokens = choose(logits, [pick.sampling for pick in picks], [pick.seed for pick in picks], positions)
        rows = itertools.accumulate(span.num_logits for span in spans)
        self.newest = known | {s.slot: tokens[row - 1] for s, row in zip(spans, rows, strict=True) if s.num_logits}
        return SimpleNamespace(tokens=lambda: tokens, logits=lambda: logits)


@pytest.fixture(params=["waits for tokens", "runs ahead of them"], autouse=True)
def ahead(request, monkeypatch):
    if "ahead" in request.param:
        monkeypatch.setitem(globals(), "SumBackend", AheadBackend)
    return "ahead" in request.param


def follow(prompt: list[int], count: int) -> list[int]:
    sequence = list(prompt)
    for _ in range(count):
        sequence.append(sum(sequence) % VOCAB)
    return sequence[len(prompt) :]


def engine_on(backend=None, **limits) -> TokenEngine:
    limits = {"running": 3, "step_tokens": 8, "page_tokens": SIZE, "kv_tokens": 120, **limits}
    return TokenEngine(backend or SumBackend(), VOCAB, limits=Limits(**limits))


def finish(engine: TokenEngine) -> list:
    return list(engine.run())


PROMPT = [1, 2, 4]


def test_one_request_reads_every_token_once():
    engine = engine_on()
    request = engine.submit(PROMPT, max_new_tokens=6)
    events = finish(engine)
    assert request.ids == [event.token for event in events] == follow(PROMPT, 6)
    assert [event.finish for event in events] == [None] * 5 + ["length"]
    assert engine.backend.calls == [[(0, 3)], [(3, 1)], [(4, 1)], [(5, 1)], [(6, 1)], [(7, 1)]]  # the last is not read
    assert request.finish_reason == "length"
    assert request.submitted_s <= request.token_s[0] <= request.token_s[-1]
    assert not engine.busy
    assert engine.scheduler.pages.used == 0


@pytest.mark.parametrize("step_tokens", [3, 4, 50])
def test_many_requests_come_and_go(step_tokens):
    engine = engine_on(step_tokens=step_tokens, kv_tokens=64)
    prompts = [[i % 7, 3, 1] * (1 + i % 4) for i in range(12)]
    wanted = {engine.submit(p, max_new_tokens=1 + 3 * i): follow(p, 1 + 3 * i) for i, p in enumerate(prompts[:6])}
    events = [event for _ in range(3) for event in engine.step()]
    wanted |= {engine.submit(p, max_new_tokens=9): follow(p, 9) for p in prompts[6:]}
    events += finish(engine)
    for request, ids in wanted.items():
        assert request.ids == ids
        assert [e.token for e in events if e.request is request] == ids
    assert engine.scheduler.pages.used == 0


def test_stop_tokens_end_an_answer_and_can_be_held_back():
    engine = engine_on()
    answer = follow(PROMPT, 6)
    assert answer[2] not in answer[:2]
    stopped = engine.submit(PROMPT, max_new_tokens=6, stop_tokens=[answer[2]])
    last = engine.submit(PROMPT, max_new_tokens=3, stop_tokens=[answer[2]])
    held = engine.submit(PROMPT, max_new_tokens=6, min_new_tokens=4, stop_tokens=[answer[2]])
    finish(engine)
    assert (stopped.ids, stopped.finish_reason) == (answer[:3], "stop")
    assert (last.ids, last.finish_reason) == (answer[:3], "stop")  # stop wins over length
    assert held.ids[:2] == answer[:2]
    assert held.ids[2] != answer[2]
    assert len(held.ids) >= 4


def test_a_watcher_sees_every_token_once_and_can_stop():
    engine, seen = engine_on(), []
    all_of_it = engine.submit(PROMPT, max_new_tokens=5, watch=seen.append)
    one = engine.submit(PROMPT, max_new_tokens=5, watch=lambda token: True)
    finish(engine)
    assert seen == all_of_it.ids == follow(PROMPT, 5)
    assert (one.ids, one.finish_reason) == (follow(PROMPT, 1), "stop")


def test_cancelling_frees_pages_at_once():
    engine = engine_on()
    running, other, waiting = (engine.submit([1] * 9, max_new_tokens=50) for _ in range(3))
    engine.step()
    engine.cancel(waiting)
    engine.cancel(running)
    assert engine.scheduler.pages.used == len(other.sequence.table)
    engine.cancel(other)
    assert engine.scheduler.pages.used == 0
    events = finish(engine)
    assert [(e.request, e.finish) for e in events] == [(r, "cancelled") for r in (waiting, running, other)]
    engine.cancel(running)
    assert not engine.busy


def test_when_the_model_fails_everybody_is_computed_again():
    backend = SumBackend()
    engine, backend.fail_at = engine_on(backend), 4
    requests = [engine.submit(PROMPT, max_new_tokens=8), engine.submit([5, 5], max_new_tokens=8)]
    with pytest.raises(MemoryError):
        finish(engine)
    finish(engine)
    assert [request.ids for request in requests] == [follow(PROMPT, 8), follow([5, 5], 8)]
    assert engine.scheduler.pages.used == 0


def test_a_watcher_that_raises_ends_its_own_request_only():
    engine = engine_on()

    def interrupt(token: int) -> None:
        raise KeyboardInterrupt

    first, bad, last = (engine.submit(PROMPT, max_new_tokens=5, watch=w) for w in (None, interrupt, None))
    events = []
    with pytest.raises(KeyboardInterrupt):
        events.extend(engine.step())
    events += finish(engine)
    assert first.ids == last.ids == follow(PROMPT, 5)
    assert [e.token for e in events if e.request is first] == first.ids
    assert (bad.finish_reason, bad.ids) == ("error", follow(PROMPT, 1))
    assert "KeyboardInterrupt" in str(bad.error)


def test_logits_that_are_not_finite_end_their_own_request_only():
    backend = SumBackend()
    backend.broken = {14, 28}  # after [1, 2, 4] comes 7, the sum is then 14
    engine = engine_on(backend)
    bad, good = engine.submit(PROMPT, max_new_tokens=8), engine.submit([5, 5, 5], max_new_tokens=8)
    finish(engine)
    assert (bad.ids, bad.finish_reason) == ([7], "error")
    assert "largest logit is NaN or infinite" in str(bad.error)
    assert good.ids == follow([5, 5, 5], 8)


def test_sampling_does_not_depend_on_companions_or_preemption():
    def answers(prompts, **limits):
        backend = SumBackend()
        backend.spread = 0.3
        engine = engine_on(backend, **limits)
        samplings = [Sampling(1.0 + i % 2, seed=i, top_k=8 if i % 3 else None) for i in range(len(prompts))]
        requests = [engine.submit(p, max_new_tokens=20, sampling=s) for p, s in zip(prompts, samplings, strict=True)]
        finish(engine)
        return [request.ids for request in requests], engine

    prompts = [[i, i + 1] for i in range(6)]
    together, _ = answers(prompts)
    pressed, engine = answers(prompts, kv_tokens=32)
    assert engine.scheduler.preemptions > 0
    assert together == pressed
    alone, _ = answers(prompts, running=1)
    assert together == alone
    assert len({tuple(ids) for ids in together}) == 6


def test_logprobs_are_the_models_own():
    engine = engine_on()
    request = engine.submit(PROMPT, max_new_tokens=2, logprobs=3, sampling=Sampling(9.0, seed=1))
    finish(engine)
    likely, other = 5 - math.log(math.exp(5) + 9), -math.log(math.exp(5) + 9)
    for token, best, found in zip(
        request.ids, [7, (14 if request.ids[0] == 7 else 7 + request.ids[0]) % 10], request.logprob, strict=True
    ):
        assert found.logprob == pytest.approx(likely if token == best else other, abs=1e-5)
        assert found.top[0] == (best, pytest.approx(likely, abs=1e-5))
        assert len(found.top) == 3
    assert engine_on().submit(PROMPT, max_new_tokens=1).logprob == []


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ([], {}, "at least one token"),
        ([10], {}, "token ids from 10 to 10, the model knows 0 to 9"),
        ([1], {"max_new_tokens": 0}, "max_new_tokens=0"),
        ([1], {"min_new_tokens": 3}, "want 0 to max_new_tokens=2"),
        ([1], {"min_new_tokens": 1}, "there are none"),
        ([1], {"logprobs": -1}, "logprobs=-1"),
        ([1] * 30, {"max_new_tokens": 99}, "30 prompt tokens and max_new_tokens=99 make 129.*the limit of 120.*at most 90 new"),
    ],
)
def test_bad_requests_are_refused_when_they_are_made(prompt, options, message):
    engine = engine_on()
    with pytest.raises(QuantkitError, match=message):
        engine.submit(prompt, **{"max_new_tokens": 2, **options})
    assert not engine.busy


def test_limits_are_stated_and_kept():
    engine = engine_on(waiting=2)
    for _ in range(2):
        engine.submit([1], max_new_tokens=1)
    with pytest.raises(QueueFull, match="2 requests are waiting already"):
        engine.submit([1], max_new_tokens=1)
    for name in ("running", "page_tokens", "kv_tokens"):
        with pytest.raises(QuantkitError, match=f"{name}=0"):
            Limits(**{name: 0})
    with pytest.raises(QuantkitError, match="batching='lazy'"):
        Limits(batching="lazy")
    found = TokenEngine(SumBackend(), VOCAB, limits=Limits(running=2)).limits
    assert (found.context_tokens, found.kv_tokens) == (200, 2 * 224)


@pytest.mark.parametrize("at", [1, 3, 6])
def test_a_watcher_may_take_its_own_request_back(at):
    engine = engine_on()
    before = engine.scheduler.pages.available
    request = engine.submit(
        [5] * 40, max_new_tokens=6, watch=lambda token: engine.cancel(request) if len(request.ids) == at else None
    )
    other = engine.submit([7, 8, 9], max_new_tokens=6)
    events = list(engine.run())
    assert (request.finish_reason, len(request.ids)) == ("cancelled", at)
    assert [event.finish for event in events if event.request is request] == [*[None] * at, "cancelled"]
    assert len(other.ids) == 6
    assert engine.scheduler.pages.available == before
