"""The engine: many requests, one model, one step at a time.

    request = engine.submit(ids, max_new_tokens=100)
    while engine.busy:
        for event in engine.step(): ...

A step asks the drafter for guesses, lets the scheduler choose tokens (:mod:`.scheduler`), runs them through the backend
(:mod:`.step`), chooses what follows wherever a sequence has come to its end (:mod:`.sampling`), and reports it. Nothing runs
between two steps, so requests come and go at any time. A single request is the same code with a batch of one.

An engine is used from one thread.
"""

import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from quantkit.engine.drafters import Ask, Costs, Drafter, DraftLength
from quantkit.engine.pages import Pages
from quantkit.engine.request import Event, FinishReason, Limits, Logprob, QueueFull, Request, check_tokens
from quantkit.engine.sampling import Noise, Sampling, choose, not_finite, shape_logits
from quantkit.engine.scheduler import Running, Scheduler, Step
from quantkit.engine.step import Backend, Memory
from quantkit.errors import QuantkitError

KV_BUDGET_BYTES = 1 << 30
"""Key/value memory when the limits do not say."""
UNKNOWN_CONTEXT_TOKENS = 4096
"""Longest sequence when neither the limits nor the model say."""


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
            Noise(sampling, self.backend.device),
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
        asked = time.perf_counter()
        self._draft()
        drafting_s = time.perf_counter() - asked
        plan = self.scheduler.schedule()
        if not plan.spans:
            return events
        try:
            started = time.perf_counter()
            self._take(plan, self.backend.step(plan.spans, plan.copies), events)
        except BaseException:
            for sequence in plan.sequences:
                if sequence.slot is not None:
                    self.scheduler.preempt(sequence)
            self._pending = events  # what was certain is reported by the next step
            raise
        self.stats["steps"] += 1
        self.stats["rows"] += sum(len(span.ids) for span in plan.spans)
        step_s = time.perf_counter() - started
        self.stats["busy_us"] += int((drafting_s + step_s) * 1e6)
        drafts = [span.wanted - 1 for span in plan.spans if span.wanted == len(span.ids)]
        if self._drafter is not None and len(drafts) == len(plan.spans):
            self._costs.observe(len(drafts), sum(drafts), max(drafts), drafting_s, step_s)
        return events

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
                told = request.number, sequence.slot, sequence.ids, count, request.sampling, request.noise
                asks.append(Ask(*told, sequence.table if self._drafter.shares_memory else ()))
        drafts = dict(zip((ask.number for ask in asks), self._drafter.propose(asks) if asks else [], strict=True))
        for sequence in self.scheduler.running:
            sequence.drafts = drafts.get(sequence.number, [])

    def _take(self, plan: Step, logits: Tensor, events: list[Event]) -> None:
        """Choose a token for every row of logits and give each sequence those that follow from each other."""
        owners = [
            (self._requests[s], ahead)
            for span, s in zip(plan.spans, plan.sequences, strict=True)
            for ahead in range(span.wanted)
        ]
        chosen, shaped, logprobs = self._choose(owners, logits)
        row = 0
        for span, sequence in zip(plan.spans, plan.sequences, strict=True):
            end = span.start + len(span.ids)
            if not span.wanted:
                self.scheduler.advance(sequence, end)
                continue
            request, known, guesses = (
                self._requests[sequence],
                len(sequence.ids),
                list(span.ids)[len(span.ids) - span.wanted + 1 :],
            )
            finish: FinishReason | None = None
            for i in range(row, row + span.wanted):
                if chosen[i] < 0:
                    finish, request.error = "error", not_finite(shaped[i])
                    events.append(Event(request, None, finish))
                else:
                    finish = self._give(request, chosen[i], logprobs.get(i), events)
                if finish or i - row == len(guesses) or chosen[i] != guesses[i - row]:
                    break
            row += span.wanted
            right = max(len(sequence.ids) - known - 1, 0)
            self._learn(request, len(guesses), right)
            self.scheduler.advance(sequence, known + right)
            if finish:
                self._finish(request, finish)

    @torch.inference_mode()
    def _choose(self, owners: list[tuple[Request, int]], logits: Tensor) -> tuple[list[int], Tensor, dict[int, Logprob]]:
        """Choose for each row; return tokens (-1 where there is none), shaped logits, and log probabilities asked for."""
        if not owners:
            return [], logits, {}
        held_back = [
            (row, token)
            for row, (request, ahead) in enumerate(owners)
            if request.answered + ahead < request.min_new_tokens
            for token in request.stop_tokens
            if 0 <= token < logits.shape[-1]
        ]
        raw = logits
        if held_back:
            raw = logits.clone()
            raw[[row for row, _ in held_back], [token for _, token in held_back]] = float("-inf")
        histories = [
            [*request.sequence.ids, *request.sequence.drafts[:ahead]] if request.sampling.repetition_penalty != 1 else []
            for request, ahead in owners
        ]
        kept = raw is logits and any(request.logprobs is not None for request, _ in owners)
        shaped = shape_logits(raw, [request.sampling for request, _ in owners], histories, copy=kept)
        tokens, usable = choose(shaped, [request.noise.row(ahead, logits.shape[-1]) for request, ahead in owners])
        chosen = torch.where(usable, tokens, -1).tolist()  # one word from the device
        return chosen, shaped, _logprobs(logits, chosen, [request.logprobs for request, _ in owners])

    def _give(self, request: Request, token: int, logprob: Logprob | None, events: list[Event]) -> FinishReason | None:
        """Add one token to an answer and to the events; return why the answer ends with it, if it does."""
        request.sequence.ids.append(token)
        request.noise.use()
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


def _logprobs(logits: Tensor, chosen: list[int], wanted: Sequence[int | None]) -> dict[int, Logprob]:
    """Return the log probabilities of the rows that want them, under the model's own distribution."""
    rows = [i for i, count in enumerate(wanted) if count is not None and chosen[i] >= 0]
    if not rows:
        return {}
    logs = logits[rows].float().log_softmax(-1)
    most = min(max(wanted[i] or 0 for i in rows), logs.shape[-1])
    top = torch.topk(logs, most, dim=-1)
    values, ids = top.values.tolist(), top.indices.tolist()
    of_chosen = logs.gather(-1, torch.tensor([[chosen[i]] for i in rows], device=logs.device))[:, 0].tolist()
    return {i: Logprob(of_chosen[n], list(zip(ids[n], values[n], strict=True))[: wanted[i]]) for n, i in enumerate(rows)}


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
