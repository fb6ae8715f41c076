"""The engine: many requests, one model, one step at a time.

    request = engine.submit(ids, max_new_tokens=100)
    while engine.busy:
        for event in engine.step(): ...

A step asks the drafter for guesses, lets the scheduler choose tokens (:mod:`.scheduler`), runs them through the backend
(:mod:`.step`), chooses what follows wherever a sequence has come to its end (:mod:`.choosing`), and reports it. Requests come
and go between two steps. A single request is the same code with a batch of one.

A backend that chooses tokens itself is given the next step before the tokens of this one are known, wherever it is the same for
all of them: one token more for every sequence. Reporting, and whatever callers do, happens while it computes.

An engine is used from one thread.
"""

import secrets
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from quantkit.engine.backend import CHOSEN, Backend, Chooser, Flight, Memory, Span
from quantkit.engine.drafters import Ask, Costs, Drafter, DraftLength
from quantkit.engine.pages import Pages
from quantkit.engine.request import Event, FinishReason, Limits, Logprob, QueueFull, Request, check_tokens
from quantkit.engine.sampling import Sampling, not_finite
from quantkit.engine.scheduler import Running, Scheduler, Step
from quantkit.engine.select_tokens import Owner, choose_tokens, logprobs_of, picks_of
from quantkit.errors import QuantkitError

KV_BUDGET_BYTES = 1 << 30
"""Key/value memory when the limits do not say."""
UNKNOWN_CONTEXT_TOKENS = 4096
"""Longest sequence when neither the limits nor the model say."""


@dataclass(slots=True)
class _Flight:
    """A step that is planned, then under way.

    Attributes:
        plan: what runs.
        owners: of its rows of logits.
        drafting_s: what its drafts took.
        going: logits, or the backend's step on its way; None before it is launched.
        started_s: when that was.
    """

    plan: Step
    owners: list[Owner]
    drafting_s: float
    going: Tensor | Flight | None = None
    started_s: float = 0.0

    def outcome(self) -> tuple[list[int], Tensor | None]:
        """Wait for the tokens; return logits too if somebody asked for probabilities."""
        assert self.going is not None
        if isinstance(self.going, Tensor):
            return choose_tokens(self.owners, self.going), self.going
        asked = any(owner.request.logprobs is not None for owner in self.owners)
        return self.going.tokens(), self.going.logits() if asked else None


class TokenEngine:
    """Continuous batching over a backend, token ids in and out. :class:`quantkit.Engine` is this for a model.

    Args:
        backend: the model; its memory is reserved here.
        vocabulary: token ids it knows.
        limits: how much to take on.

    Attributes:
        limits: with everything that was None filled in.
        stats: counts of steps, rows, and what became of them, over the engine's life.

    Raises:
        QuantkitError: limits that contradict each other.
    """

    def __init__(
        self,
        backend: Backend,
        vocabulary: int,
        *,
        limits: Limits | None = None,
    ) -> None:
        self.limits = limits = _resolve(limits or Limits(), backend)
        assert limits.kv_tokens is not None
        pages = Pages(limits.kv_tokens // limits.page_tokens, limits.page_tokens)
        self.memory = Memory(pages.count, limits.page_tokens, limits.running)
        self.scheduler = Scheduler(
            pages, limits.running, step_tokens=limits.step_tokens, batching=limits.batching, share=backend.shares_pages
        )
        self.backend, self.vocabulary = backend, vocabulary
        backend.reserve(self.memory)
        self.stats: Counter[str] = Counter()
        self._drafter: Drafter | None = None
        self._lengths: dict[Request, DraftLength] = {}
        self._costs, self._acceptance = Costs(), DraftLength.START
        self._requests: dict[Running, Request] = {}
        self._pending: list[Event] = []
        self._next_number = 0
        self._chooser = backend if isinstance(backend, Chooser) else None
        self._flight: _Flight | None = None
        self._free_s = 0.0

    def use_drafter(self, drafter: Drafter | None) -> None:
        """Guess ahead with ``drafter`` from the next step on; None decodes one token per sequence and step.

        Raises:
            QuantkitError: the backend cannot verify guesses.
        """
        if drafter is not None and not self.backend.rewinds:
            raise QuantkitError(f"drafts cannot be verified: {self.backend.notice}; leave the drafter out")
        self._drafter = drafter

    @property
    def busy(self) -> bool:
        """Whether a request is unfinished, or an event unreported."""
        return bool(self._requests or self._pending)

    def submit(
        self,
        prompt: Sequence[int],
        *,
        max_new_tokens: int,
        sampling: Sampling | None = None,
        min_new_tokens: int = 0,
        stop_tokens: Collection[int] = (),
        watch: Callable[[int], object] | None = None,
        logprobs: int | None = None,
    ) -> Request:
        """Queue a prompt; its tokens come as events of later steps.

        Args:
            prompt: token ids, at least one.
            max_new_tokens: at most so many tokens.
            sampling: how to choose; None is greedy.
            min_new_tokens: before so many, stop tokens are not chosen.
            stop_tokens: a token among these ends the answer; it is part of it.
            watch: called with every token, once and in order, before it is reported; a true result ends the answer
                after it. What it raises ends the request (``"error"``) and passes through :meth:`step`.
            logprobs: report each token's log probability, and of so many most likely ones.

        Raises:
            QuantkitError: a number out of range, an id outside the vocabulary, or a request that could never finish.
            QueueFull: too many wait.
        """
        ids = [int(token) for token in prompt]
        check_tokens(ids, max_new_tokens, min_new_tokens, stop_tokens, logprobs)
        if min(ids) < 0 or max(ids) >= self.vocabulary:
            raise QuantkitError(
                f"prompt ids reach from {min(ids)} to {max(ids)}, the model knows 0 to {self.vocabulary - 1}; "
                "is this its tokenizer?"
            )
        self._check_fits(len(ids), max_new_tokens)
        if len(self.scheduler.waiting) >= self.limits.waiting:
            raise QueueFull(f"{self.limits.waiting} requests wait already; try again later, or raise the limit")
        sampling = sampling or Sampling()
        request = Request(
            self._next_number,
            ids,
            sampling,
            max_new_tokens,
            min_new_tokens,
            frozenset(stop_tokens),
            watch,
            logprobs,
            secrets.randbits(63) if sampling.seed is None else sampling.seed,
            Running(self._next_number, list(ids)),
        )
        self._next_number += 1
        self._requests[request.sequence] = request
        self.scheduler.add(request.sequence)
        self.stats["requests"] += 1
        return request

    def cancel(self, request: Request) -> None:
        """Take a request back, running or waiting; its pages are free at once. A finished one is left as it is."""
        if request.sequence in self._requests:
            self._finish(request, "cancelled")
            self._pending.append(Event(request, None, "cancelled"))

    def run(self) -> Iterator[Event]:
        """Step until nothing is left to do; requests may be submitted and cancelled meanwhile."""
        while self.busy:
            yield from self.step()

    def step(self) -> list[Event]:
        """Do one step and return what happened, in order; every sequence at its end gets one token or more.

        What the model or a watcher raises passes through; the sequences of the step are then computed again from their
        tokens, so the engine can go on.
        """
        events, self._pending = self._pending, []
        flight, self._flight = self._flight or self._begin(), None
        if flight is None:
            return events
        try:
            if flight.going is None:
                self._launch(flight)
            self._flight = self._run_ahead(flight)
            self._take(flight, events)
        except BaseException:
            for sequence in flight.plan.sequences:
                if sequence.slot is not None:
                    self.scheduler.preempt(sequence)
            self._flight, self._pending = None, events  # what was certain is reported by the next step
            raise
        if self._flight is not None and not any(owner.request.sequence in self._requests for owner in self._flight.owners):
            self._flight = None
        now = time.perf_counter()
        step_s, self._free_s = now - max(flight.started_s, self._free_s), now
        spans = flight.plan.spans
        self.stats["steps"] += 1
        self.stats["rows"] += sum(len(span.ids) for span in spans)
        self.stats["busy_us"] += int((flight.drafting_s + step_s) * 1e6)
        drafts = [span.wanted - 1 for span in spans if span.wanted == len(span.ids)]
        if self._drafter is not None and len(drafts) == len(spans):
            self._costs.observe(len(drafts), sum(drafts), max(drafts), flight.drafting_s, step_s)
        return events

    def _begin(self) -> "_Flight | None":
        """Ask for drafts and decide on the next step; None if there is nothing to do."""
        asked = time.perf_counter()
        self._draft()
        drafting_s = time.perf_counter() - asked
        plan = self.scheduler.schedule()
        return _Flight(plan, self._owners(plan), drafting_s) if plan.spans else None

    def _owners(self, plan: Step) -> list[Owner]:
        pairs = zip(plan.spans, plan.sequences, strict=True)
        return [Owner(self._requests[sequence], ahead) for span, sequence in pairs for ahead in range(span.wanted)]

    def _launch(self, flight: "_Flight") -> None:
        """Let the backend run a step, and choose the tokens if it can."""
        flight.started_s, plan = time.perf_counter(), flight.plan
        picks = picks_of(flight.owners)
        if self._chooser is not None and picks:
            flight.going = self._chooser.launch(plan.spans, plan.copies, picks)
        else:
            flight.going = self.backend.step(plan.spans, plan.copies)

    def _run_ahead(self, flight: "_Flight") -> "_Flight | None":
        """Launch the step after one whose tokens nobody knows yet, if it is the same whatever they are.

        A sequence that ends meanwhile takes part all the same: what it writes lies in pages that nobody reads, and whoever gets
        them next writes after it.
        """
        others = self._drafter is not None or self.scheduler.admits or len(self.scheduler.running) > len(flight.plan.sequences)
        if isinstance(flight.going, Tensor) or others or any(owner.request.logprobs is not None for owner in flight.owners):
            return None
        spans, sequences, owners = list[Span](), list[Running](), list[Owner]()
        for span, sequence in zip(flight.plan.spans, flight.plan.sequences, strict=True):
            request, count = self._requests.get(sequence), len(span.ids)
            if request is None or (span.wanted and request.remaining == 1):
                continue  # has ended, or ends with this token
            after = Owner(request, 1)
            if span.wanted != 1 or after.pick is None or self.scheduler.reserve(sequence, count + 1) <= count:
                return None
            spans.append(Span(span.slot, span.start + count, [CHOSEN], sequence.table, 1))
            sequences.append(sequence)
            owners.append(after)
        if not spans:
            return None
        ahead = _Flight(Step(spans, sequences, []), owners, 0.0)
        self._launch(ahead)
        return ahead

    def _check_fits(self, prompt: int, new: int) -> None:
        longest = self.limits.context_tokens
        assert longest is not None
        if prompt + new > longest:
            raise QuantkitError(
                f"{prompt} prompt tokens and max_new_tokens={new} make {prompt + new}, the model reads at most {longest} here; "
                f"shorten the prompt, or ask for at most {max(longest - prompt, 0)} new tokens"
            )

    def _draft(self) -> None:
        """Ask the drafter for guesses for every sequence that decodes."""
        if self._drafter is None:
            return
        longest = min(self.limits.draft_tokens, self.limits.page_tokens)
        costs = self._costs.curve(sum(sequence.decoding for sequence in self.scheduler.running), longest)
        if costs is None:
            return
        asks = []
        for sequence in self.scheduler.running:
            request = self._requests[sequence]
            count = 0
            if sequence.decoding and request.remaining > 1:
                length = self._lengths.setdefault(request, DraftLength(longest, self._acceptance))
                count = min(length.ask(costs), request.remaining - 1)
            if count and self._drafter.shares_memory:
                count = min(count, self.scheduler.reserve(sequence, count + 1))
            if count:
                assert sequence.slot is not None
                told = request.number, sequence.slot, sequence.ids, count, request.sampling, request.seed
                asks.append(Ask(*told, sequence.table if self._drafter.shares_memory else ()))
        drafts = dict(zip((ask.number for ask in asks), self._drafter.propose(asks) if asks else [], strict=True))
        for sequence in self.scheduler.running:
            sequence.drafts = drafts.get(sequence.number, [])

    def _take(self, flight: "_Flight", events: list[Event]) -> None:
        """Give each sequence those tokens that follow from each other."""
        plan = flight.plan
        chosen, logits = flight.outcome()
        logprobs = {} if logits is None else logprobs_of(flight.owners, logits, chosen)
        row = 0
        for span, sequence in zip(plan.spans, plan.sequences, strict=True):
            request, known = self._requests.get(sequence), len(sequence.ids)
            if request is None:  # has ended since this was launched
                row += span.wanted
                continue
            if not span.wanted:
                self.scheduler.advance(sequence, span.start + len(span.ids))
                continue
            guesses = list(span.ids)[len(span.ids) - span.wanted + 1 :]
            finish: FinishReason | None = None
            for i in range(row, row + span.wanted):
                if chosen[i] < 0:
                    finish, request.error = "error", not_finite()
                    events.append(Event(request, None, finish))
                else:
                    finish = self._give(request, chosen[i], logprobs.get(i), events)
                if finish or request.finish_reason or i - row == len(guesses) or chosen[i] != guesses[i - row]:
                    break
            row += span.wanted
            if request.finish_reason:  # its own watcher has taken it back
                continue
            right = max(len(sequence.ids) - known - 1, 0)
            self._learn(request, len(guesses), right)
            self.scheduler.advance(sequence, known + right)
            if finish:
                self._finish(request, finish)

    def _give(self, request: Request, token: int, logprob: Logprob | None, events: list[Event]) -> FinishReason | None:
        """Add one token to an answer and to the events; return why the answer ends with it, if it does."""
        request.sequence.ids.append(token)
        request.token_s.append(time.perf_counter())
        if logprob is not None:
            request.logprob.append(logprob)
        self.stats["tokens"] += 1
        finish: FinishReason | None = "stop" if token in request.stop_tokens else None if request.remaining else "length"
        try:
            if request.watch is not None and request.watch(token):
                finish = "stop"
        except BaseException as error:
            events += [Event(request, token, None, logprob), Event(request, None, "error")]
            request.error = QuantkitError(f"its watcher raised {type(error).__name__}: {error}")
            self._finish(request, "error")
            raise
        finish = None if request.finish_reason else finish
        events.append(Event(request, token, finish, logprob))
        return finish

    def _learn(self, request: Request, drafted: int, accepted: int) -> None:
        if drafted:
            request.drafted += drafted
            request.accepted += accepted
            self.stats["drafted"] += drafted
            self.stats["accepted"] += accepted
            length = self._lengths[request]
            length.observe(drafted, accepted)
            self._acceptance = length.acceptance

    def _finish(self, request: Request, reason: FinishReason) -> None:
        request.finish_reason = reason
        del self._requests[request.sequence]
        self.scheduler.remove(request.sequence)
        self._lengths.pop(request, None)
        if self._drafter is not None:
            self._drafter.forget(request.number)
        self.stats[reason] += 1


def _resolve(limits: Limits, backend: Backend) -> Limits:
    """Fill in what the limits leave open, from what the backend can do."""
    context = limits.context_tokens or backend.context_tokens or UNKNOWN_CONTEXT_TOKENS
    context = min(context, backend.context_tokens or context)
    size = limits.page_tokens
    pages = -(-context // size) * limits.running
    if limits.kv_tokens is not None:
        pages = max(limits.kv_tokens // size, 1)
    else:
        empty = backend.bytes_for(Memory(0, size, limits.running))
        page_bytes = backend.bytes_for(Memory(1, size, limits.running)) - empty
        if page_bytes:
            pages = max(min(pages, (KV_BUDGET_BYTES - empty) // page_bytes), 1)
    step_tokens = max(limits.step_tokens, limits.running)
    return replace(limits, kv_tokens=pages * size, context_tokens=min(context, pages * size), step_tokens=step_tokens)
