"""What is asked of the engine and what comes back: limits, requests, events."""

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from quantkit.engine.sampling import Sampling
from quantkit.engine.scheduler import Batching, Running
from quantkit.errors import QuantkitError

FinishReason = Literal["stop", "length", "cancelled", "error"]
"""Why an answer ended: a stop token or the watcher; no more tokens allowed; taken back; a failure of this request alone."""


class QueueFull(QuantkitError):
    """More requests wait than the limits allow; try again later."""


@dataclass(frozen=True, slots=True)
class Limits:
    """How much an engine takes on.

    Attributes:
        running: sequences that run at once.
        step_tokens: tokens per step: what a prompt is cut into, and what bounds the memory of activations.
        page_tokens: tokens in a page of the key/value memory.
        kv_tokens: tokens the key/value memory holds, for all sequences together; None for what fits into 1 GiB, or every
            running sequence at its longest if that is less.
        context_tokens: longest prompt and answer together; None for the model's own limit, and never beyond it.
        waiting: requests that may wait.
        draft_tokens: at most so many guesses of a drafter per sequence and step, and never more than a page; 7 because the
            CPU's kernels read a weight once for up to eight rows.
        batching: ``"continuous"``; ``"static"`` lets nobody join until all are done, for comparison.
    """

    running: int = 8
    step_tokens: int = 512
    page_tokens: int = 32
    kv_tokens: int | None = None
    context_tokens: int | None = None
    waiting: int = 4096
    draft_tokens: int = 7
    batching: Batching = "continuous"

    def __post_init__(self) -> None:
        for name in ("running", "step_tokens", "page_tokens", "kv_tokens", "context_tokens", "waiting", "draft_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise QuantkitError(f"limits: {name}={value}, want at least 1")
        if self.batching not in ("continuous", "static"):
            raise QuantkitError(f"limits: batching={self.batching!r}, want 'continuous' or 'static'")


class Logprob(NamedTuple):
    """How likely the model found a token, before temperature and filters.

    Attributes:
        logprob: natural logarithm of the token's probability.
        top: the most likely tokens and theirs, most likely first.
    """

    logprob: float
    top: list[tuple[int, float]]


@dataclass(eq=False, slots=True)
class Request:
    """One prompt and the answer to it so far. Made by ``submit``; read it, do not write it.

    Attributes:
        number: counts up; also the order of arrival.
        prompt: token ids.
        sampling, max_new_tokens, min_new_tokens, stop_tokens, logprobs: as submitted.
        seed: of its noise: the sampling's own, or a fresh one.
        finish_reason: None while it is not finished.
        error: what went wrong, when the reason is ``"error"``.
        logprob: one per token of the answer, if asked for.
        submitted_s, token_s: clock (``time.perf_counter``) when it was submitted and when each token was known.
        drafted, accepted: draft tokens verified, and how many of them were right.
        sequence: what the scheduler knows of it.
    """

    number: int
    prompt: list[int]
    sampling: Sampling
    max_new_tokens: int
    min_new_tokens: int
    stop_tokens: frozenset[int]
    watch: Callable[[int], object] | None
    logprobs: int | None
    seed: int
    sequence: Running
    finish_reason: FinishReason | None = None
    error: QuantkitError | None = None
    logprob: list[Logprob] = field(default_factory=list)
    submitted_s: float = field(default_factory=time.perf_counter)
    token_s: list[float] = field(default_factory=list)
    drafted: int = 0
    accepted: int = 0

    @property
    def ids(self) -> list[int]:
        """The answer so far, a stop token that ended it included."""
        return self.sequence.ids[len(self.prompt) :]

    @property
    def answered(self) -> int:
        """Number of tokens of the answer so far."""
        return len(self.sequence.ids) - len(self.prompt)

    @property
    def remaining(self) -> int:
        """Tokens it may still get."""
        return self.max_new_tokens - self.answered


class Event(NamedTuple):
    """Something that happened to a request.

    Attributes:
        request: whose.
        token: the new token; None if it ended without one (cancelled, or an error).
        finish: why the request is finished; None if it goes on.
        logprob: of the token, if asked for.
    """

    request: Request
    token: int | None
    finish: FinishReason | None
    logprob: Logprob | None = None


def check_tokens(
    prompt: Sequence[int], max_new_tokens: int, min_new_tokens: int, stop_tokens: Collection[int], logprobs: int | None
) -> None:
    """Refuse numbers that make no sense whatever the model.

    Raises:
        QuantkitError: naming the number and what was wanted.
    """
    if not prompt:
        raise QuantkitError("the prompt is empty: give at least one token, for instance the beginning-of-sequence token")
    if max_new_tokens < 1:
        raise QuantkitError(f"max_new_tokens={max_new_tokens}: want at least 1")
    if not 0 <= min_new_tokens <= max_new_tokens:
        raise QuantkitError(f"min_new_tokens={min_new_tokens}: want 0 to max_new_tokens={max_new_tokens}")
    if min_new_tokens and not stop_tokens:
        raise QuantkitError(f"min_new_tokens={min_new_tokens} holds stop tokens back, and there is none; leave it out")
    if logprobs is not None and logprobs < 0:
        raise QuantkitError(f"logprobs={logprobs}: want how many alternatives to report, 0 or more, or None")
