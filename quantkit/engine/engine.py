"""The engine: run many requests on one model, one step at a time.

    request = engine.submit(ids, max_new_tokens=100)
    while engine.busy:
        for event in engine.step(): ...

A step asks the drafter for guesses (:mod:`.drafters`), lets the scheduler choose which tokens to run (:mod:`.scheduler`), runs
them on the backend (:mod:`.backend`), chooses the next token of every sequence that was run to its end (:mod:`.select_tokens`)
and reports it. Requests can be submitted and cancelled between steps. A single request runs through the same code.

If the backend samples on its device, the engine launches the following step before it knows the tokens of the current one,
provided that step is the same for all outcomes, namely one more token per sequence. The host then reports tokens while the
device computes.

An engine must be used from a single thread.
"""

import collections.abc as abc
import secrets
import time
from collections import Counter

from torch import Tensor

from quantkit.engine.backend import LAST_SAMPLED, Backend, Memory, SamplingBackend, Span
from quantkit.engine.constraint import Constraint
from quantkit.engine.drafters.base import Drafter, DraftRequest
from quantkit.engine.drafters.length import DraftCosts, DraftLength
from quantkit.engine.pages import PageAllocator
from quantkit.engine.pending import PendingStep
from quantkit.engine.request import (
    Event,
    FinishReason,
    Limits,
    Logprob,
    QueueFull,
    Request,
    check_choice,
    check_tokens,
    resolve_limits,
)
from quantkit.engine.sampling import Sampling
from quantkit.engine.scheduler import Scheduler, Sequence, Step
from quantkit.engine.select_tokens import TokenRequest, logprobs_of
from quantkit.errors import QuantkitError


class TokenEngine:
    """Continuous batching on a backend, from token ids to token ids. :class:`quantkit.Engine` builds one for a model.

    Args:
        backend: the model; its key/value memory is allocated here.
        vocabulary: number of token ids.
        limits: how much work to accept; None for the defaults.

    Attributes:
        limits: the limits, with every None replaced by a number.
        stats: counters since the engine was made: requests, steps, rows, tokens, drafted, accepted, busy_us (microseconds spent
            in steps), and requests finished by reason.
        launches_ahead: whether a step is launched before the tokens of the step before it are known, where that is possible;
            set it to False for comparisons.
    """

    def __init__(self, backend: Backend, vocabulary: int, *, limits: Limits | None = None) -> None:
        self.limits = limits = resolve_limits(limits or Limits(), backend)
        assert limits.kv_tokens is not None
        pages = PageAllocator(limits.kv_tokens // limits.page_tokens, limits.page_tokens)
        self.memory = Memory(pages.count, limits.page_tokens, limits.running)
        self.scheduler = Scheduler(
            pages, limits.running, step_tokens=limits.step_tokens, batching=limits.batching, share=backend.shares_pages
        )
        self.backend, self.vocabulary = backend, vocabulary
        backend.reserve(self.memory)
        self.stats: Counter[str] = Counter()
        self.launches_ahead = True
        self._drafter: Drafter | None = None
        self._lengths: dict[Request, DraftLength] = {}
        self._costs, self._acceptance = DraftCosts(), DraftLength.START
        self._requests: dict[Sequence, Request] = {}
        self._events: list[Event] = []
        self._next_number = 0
        self._sampling_backend = backend if isinstance(backend, SamplingBackend) else None
        self._pending_step: PendingStep | None = None
        self._idle_since_s = 0.0

    def use_drafter(self, drafter: Drafter | None) -> None:
        """Use ``drafter`` from the next step on; None decodes one token per sequence and step.

        Raises:
            QuantkitError: the backend cannot verify drafts.
        """
        if drafter is not None and not self.backend.rewinds:
            why = self.backend.notice or "the model has a state that cannot go back to an earlier token"
            raise QuantkitError(f"drafts cannot be verified: {why}; leave the drafter out")
        self._drafter = drafter

    @property
    def busy(self) -> bool:
        """Whether there are unfinished requests or unreported events."""
        return bool(self._requests or self._events)

    def submit(
        self,
        prompt: abc.Sequence[int],
        *,
        max_new_tokens: int,
        sampling: Sampling | None = None,
        min_new_tokens: int = 0,
        stop_tokens: abc.Collection[int] = (),
        watch: abc.Callable[[int], object] | None = None,
        logprobs: int | None = None,
        scores_prompt: bool = False,
        constraint: Constraint | None = None,
    ) -> Request:
        """Queue a prompt. Its answer arrives as events of later steps.

        Args:
            prompt: token ids, at least one.
            max_new_tokens: longest answer in tokens.
            sampling: how tokens are chosen; None is greedy decoding.
            min_new_tokens: stop tokens are not chosen before the answer has this many tokens.
            stop_tokens: token ids that end the answer; the stop token is part of the answer.
            watch: called once with every token, in order, before the token is reported. A true result ends the answer. An
                exception ends the request with reason ``"error"`` and is raised again by :meth:`step`.
            logprobs: report the log probability of each token, and of this many most likely tokens; None for none.
            scores_prompt: also report those of the prompt's tokens.
            constraint: restricts the tokens of the answer, which ends when it is complete; None for any.

        Returns:
            The request, which is updated by later steps.

        Raises:
            QuantkitError: an argument out of range, a token id outside the vocabulary, or a request longer than the limits.
            QueueFull: too many requests are waiting.
        """
        ids, sampling = [int(token) for token in prompt], sampling or Sampling()
        check_tokens(ids, max_new_tokens, min_new_tokens, stop_tokens, logprobs)
        check_choice(sampling, self.vocabulary, logprobs, min_new_tokens, scores_prompt, constraint)
        if min(ids) < 0 or max(ids) >= self.vocabulary:
            raise QuantkitError(
                f"the prompt has token ids from {min(ids)} to {max(ids)}, the model knows 0 to {self.vocabulary - 1}; "
                "use the tokenizer that belongs to the model"
            )
        self._check_fits(len(ids), max_new_tokens)
        if len(self.scheduler.waiting) >= self.limits.waiting:
            raise QueueFull(f"{self.limits.waiting} requests are waiting already; try again later, or raise Limits.waiting")
        request = Request(
            self._next_number,
            ids,
            sampling,
            max_new_tokens,
            min_new_tokens,
            frozenset(stop_tokens),
            watch,
            logprobs,
            constraint,
            secrets.randbits(63) if sampling.seed is None else sampling.seed,
            Sequence(self._next_number, list(ids), scored=len(ids) - 1 if scores_prompt else 0),
        )
        self._next_number += 1
        self._requests[request.sequence] = request
        self.scheduler.add(request.sequence)
        self.stats["requests"] += 1
        return request

    def cancel(self, request: Request) -> None:
        """Cancel a running or waiting request and release its pages at once. A finished request is not changed."""
        if request.sequence in self._requests:
            self._finish(request, "cancelled")
            self._events.append(Event(request, None, "cancelled"))

    def run(self) -> abc.Iterator[Event]:
        """Step until no request is left, and yield all events. Requests may be submitted and cancelled meanwhile."""
        while self.busy:
            yield from self.step()

    def step(self) -> list[Event]:
        """Run one step and return its events in order.

        Every sequence that was run to its end gets at least one token. Exceptions of the model or of a ``watch`` function are
        raised to the caller. The sequences of that step are then preempted and recomputed, so the engine remains usable.
        """
        events, self._events = self._events, []
        step, self._pending_step = self._pending_step or self._plan_step(), None
        if step is None:
            return events
        try:
            if step.launched is None:
                self._launch(step)
            self._pending_step = self._launch_next(step)
            self._deliver(step, events)
        except BaseException:
            for sequence in step.plan.sequences:
                if sequence.slot is not None:
                    self.scheduler.preempt(sequence)
            self._pending_step, self._events = None, events  # tokens that were accepted before the error
            raise
        if self._pending_step is not None and not any(
            row.request.sequence in self._requests for row in self._pending_step.rows
        ):
            self._pending_step = None
        now = time.perf_counter()
        step_s, self._idle_since_s = now - max(step.started_s, self._idle_since_s), now
        spans = step.plan.spans
        self.stats["steps"] += 1
        self.stats["rows"] += sum(len(span.ids) for span in spans)
        self.stats["busy_us"] += int((step.drafting_s + step_s) * 1e6)
        drafts = [span.choices - 1 for span in spans if span.choices == len(span.ids)]
        if self._drafter is not None and len(drafts) == len(spans):
            self._costs.observe(len(drafts), sum(drafts), max(drafts), step.drafting_s, step_s)
        return events

    def _plan_step(self) -> PendingStep | None:
        """Propose drafts and plan the next step; None if there is nothing to run."""
        started = time.perf_counter()
        self._propose_drafts()
        drafting_s = time.perf_counter() - started
        plan = self.scheduler.schedule()
        return PendingStep.of(plan, self._requests, drafting_s) if plan.spans else None

    def _launch(self, step: PendingStep) -> None:
        """Start a step on the backend."""
        step.started_s = time.perf_counter()
        step.launch(self.backend, self._sampling_backend)

    def _launch_next(self, step: PendingStep) -> PendingStep | None:
        """Launch the step that follows ``step`` before the tokens of ``step`` are known, if it does not depend on them.

        A sequence that turns out to have ended with ``step`` still runs in the launched step. This is harmless: it writes to
        pages that no other sequence reads, and the next owner of these pages overwrites them later on the same stream.
        """
        others = self._drafter is not None or self.scheduler.can_admit or len(self.scheduler.running) > len(step.plan.sequences)
        others = others or not self.launches_ahead
        if isinstance(step.launched, Tensor) or others or any(row.request.logprobs is not None for row in step.rows):
            return None
        spans, sequences, rows = list[Span](), list[Sequence](), list[TokenRequest]()
        for span, sequence in zip(step.plan.spans, step.plan.sequences, strict=True):
            request, count = self._requests.get(sequence), len(span.ids)
            if request is None or (span.num_logits and request.remaining == 1):
                continue  # has ended, or ends with this token
            row = TokenRequest(request, 1)
            if span.num_logits != 1 or row.row_sampling is None or self.scheduler.reserve(sequence, count + 1) <= count:
                return None
            spans.append(Span(span.slot, span.start + count, [LAST_SAMPLED], sequence.table, 1))
            sequences.append(sequence)
            rows.append(row)
        if not spans:
            return None
        following = PendingStep(Step(spans, sequences, []), rows, 0.0)
        self._launch(following)
        return following

    def _check_fits(self, prompt: int, new: int) -> None:
        longest = self.limits.context_tokens
        assert longest is not None
        if prompt + new > longest:
            raise QuantkitError(
                f"{prompt} prompt tokens and max_new_tokens={new} make {prompt + new}, more than the limit of {longest}; "
                f"shorten the prompt, or ask for at most {max(longest - prompt, 0)} new tokens"
            )

    def _propose_drafts(self) -> None:
        """Let the drafter propose tokens for the sequences that decode."""
        if self._drafter is None:
            return
        longest = min(self.limits.draft_tokens, self.limits.page_tokens)
        costs = self._costs.curve(sum(sequence.decoding for sequence in self.scheduler.running), longest)
        if costs is None:
            return
        drafter, requests = self._drafter, list[DraftRequest]()
        for sequence in self.scheduler.running:
            request = self._requests[sequence]
            count = 0
            if sequence.decoding and request.remaining > 1:
                length = self._lengths.setdefault(request, DraftLength(longest, self._acceptance))
                count = min(length.choose(costs), request.remaining - 1)
            if count and drafter.shares_memory:
                count = min(count, self.scheduler.reserve(sequence, count + 1))
            if count:
                assert sequence.slot is not None
                known = request.number, sequence.slot, sequence.ids, count, request.sampling, request.seed
                table = sequence.table if drafter.shares_memory else ()
                requests.append(DraftRequest(*known, table, len(request.prompt)))
        proposed = drafter.propose(requests) if requests else []
        drafts = dict(zip((one.number for one in requests), proposed, strict=True))
        for sequence in self.scheduler.running:
            found, constraint = drafts.get(sequence.number, []), self._requests[sequence].constraint
            sequence.drafts = found if constraint is None or not found else found[: constraint.fitting(found)]

    def _deliver(self, step: PendingStep, events: list[Event]) -> None:
        """Append the tokens of a finished step to their answers, drafts as far as they are confirmed."""
        plan = step.plan
        chosen, logits = step.outcome()
        logprobs = {} if logits is None else logprobs_of(step.rows, logits, chosen)
        row = 0
        for span, sequence in zip(plan.spans, plan.sequences, strict=True):
            request, known = self._requests.get(sequence), len(sequence.ids)
            if request is None:  # has ended since the launch
                row += span.choices
                continue
            if not span.choices:
                self.scheduler.advance(sequence, span.start + len(span.ids))
                continue
            drafts = list(span.ids)[len(span.ids) - span.choices + 1 :]
            finish: FinishReason | None = None
            for i in range(row, row + span.choices):
                if chosen[i] < 0:
                    finish, request.error = "error", request.no_token()
                    events.append(Event(request, None, finish))
                else:
                    finish = self._append_token(request, chosen[i], logprobs.get(i), events)
                if finish or request.finish_reason or i - row == len(drafts) or chosen[i] != drafts[i - row]:
                    break
            row += span.choices
            if request.finish_reason:  # cancelled by its own watch function
                continue
            accepted = max(len(sequence.ids) - known - 1, 0)
            self._record_acceptance(request, len(drafts), accepted)
            self.scheduler.advance(sequence, known + accepted)
            if finish:
                self._finish(request, finish)

    def _append_token(self, request: Request, token: int, logprob: Logprob | None, events: list[Event]) -> FinishReason | None:
        """Add a token to an answer and to the events; return why the answer ends with it, or None if it continues."""
        request.sequence.ids.append(token)
        request.token_s.append(time.perf_counter())
        if logprob is not None:
            request.logprob.append(logprob)
        self.stats["tokens"] += 1
        finish: FinishReason | None = "stop" if token in request.stop_tokens else None if request.remaining else "length"
        try:
            if request.constraint is not None and request.constraint.accept(token):
                finish = "stop"
            if request.watch is not None and request.watch(token):
                finish = "stop"
        except BaseException as error:
            events += [Event(request, token, None, logprob), Event(request, None, "error")]
            request.error = QuantkitError(f"its watch function raised {type(error).__name__}: {error}")
            self._finish(request, "error")
            raise
        finish = None if request.finish_reason else finish
        events.append(Event(request, token, finish, logprob))
        return finish

    def _record_acceptance(self, request: Request, drafted: int, accepted: int) -> None:
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
