"""What callers give to the engine and get from it: limits, requests, events."""

import collections.abc as abc
import time
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

from quantkit.engine.backend import Backend, Memory
from quantkit.engine.constraint import Constraint
from quantkit.engine.sampling import Sampling, not_finite
from quantkit.engine.scheduler import Batching, Sequence
from quantkit.errors import QuantkitError

FinishReason = Literal["stop", "length", "cancelled", "error"]
"""Why a request ended: a stop token or its ``watch`` function; the token limit; :meth:`cancel`; an error of this request."""


KV_BUDGET_BYTES = 1 << 30
"""Upper bound of the key/value memory if the limits do not give one."""
UNKNOWN_CONTEXT_TOKENS = 4096
"""Longest sequence if neither the limits nor the model give one."""


class QueueFull(QuantkitError):
    """The queue of waiting requests is full; try again later."""


@dataclass(frozen=True, slots=True)
class Limits:
    """How much work an engine accepts.

    Attributes:
        running: sequences that run at the same time.
        step_tokens: tokens per step. Longer prompts are split into chunks; this also bounds the memory of activations.
        page_tokens: tokens per page of key/value memory.
        kv_tokens: tokens that the key/value memory holds, over all sequences. None uses at most 1 GiB, and no more than
            ``running`` sequences of the longest length need.
        context_tokens: longest prompt and answer together; None for the model's own limit. Never more than that limit.
        waiting: requests that may wait.
        draft_tokens: draft tokens per sequence and step, and never more than a page. The default is 7 because the CPU kernels
            read a weight once for up to 8 rows.
        batching: ``"continuous"``, or ``"static"``, which admits new requests only when none is running, for comparison.

    Raises:
        QuantkitError: a number below 1, or an unknown kind of batching.
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
    """Log probability of a token under the model, before temperature and filters.

    Attributes:
        logprob: natural logarithm of the token's probability.
        top: the most likely tokens and their log probabilities, most likely first.
    """

    logprob: float
    top: list[tuple[int, float]]


@dataclass(eq=False, slots=True)
class Request:
    """A prompt and its answer so far. Created by :meth:`~quantkit.engine.engine.TokenEngine.submit`; treat it as read-only.

    Attributes:
        number: number of the request, in order of arrival.
        prompt: token ids.
        sampling, max_new_tokens, min_new_tokens, stop_tokens, watch, logprobs, constraint: as submitted.
        seed: seed of the sampling noise: the one in ``sampling``, or a random one.
        sequence: the scheduler's view of the request.
        finish_reason: None until the request is finished.
        error: the error, if the reason is ``"error"``.
        logprob: one entry per token of the answer, if requested.
        prompt_logprob: one entry per token of the prompt but the first, if requested; complete with the first event.
        submitted_s, token_s: ``time.perf_counter()`` at submission and at each token.
        drafted, accepted: draft tokens verified, and how many of them were accepted.
    """

    number: int
    prompt: list[int]
    sampling: Sampling
    max_new_tokens: int
    min_new_tokens: int
    stop_tokens: frozenset[int]
    watch: abc.Callable[[int], object] | None
    logprobs: int | None
    constraint: Constraint | None
    seed: int
    sequence: Sequence
    finish_reason: FinishReason | None = None
    error: QuantkitError | None = None
    logprob: list[Logprob] = field(default_factory=list)
    prompt_logprob: list[Logprob] = field(default_factory=list)
    submitted_s: float = field(default_factory=time.perf_counter)
    token_s: list[float] = field(default_factory=list)
    drafted: int = 0
    accepted: int = 0

    @property
    def ids(self) -> list[int]:
        """Tokens of the answer so far, including a stop token that ended it."""
        return self.sequence.ids[len(self.prompt) :]

    @property
    def answered(self) -> int:
        """Number of tokens of the answer so far."""
        return len(self.sequence.ids) - len(self.prompt)

    @property
    def remaining(self) -> int:
        """Number of tokens that the answer may still get."""
        return self.max_new_tokens - self.answered

    def no_token(self) -> QuantkitError:
        """Return the error of a row of logits from which no token can be chosen."""
        return (None if self.constraint is None else self.constraint.error) or not_finite()


class Event(NamedTuple):
    """Something that happened to a request.

    Attributes:
        request: the request.
        token: the new token; None if the request ended without one (cancelled, or an error).
        finish: why the request is finished; None if it continues.
        logprob: log probability of the token, if requested.
    """

    request: Request
    token: int | None
    finish: FinishReason | None
    logprob: Logprob | None = None


def check_tokens(
    prompt: abc.Sequence[int],
    max_new_tokens: int,
    min_new_tokens: int,
    stop_tokens: abc.Collection[int],
    logprobs: int | None,
) -> None:
    """Refuse arguments of a request that are invalid for every model.

    Raises:
        QuantkitError: naming the argument and the values it may have.
    """
    if not prompt:
        raise QuantkitError("the prompt is empty: give at least one token, for instance the beginning-of-sequence token")
    if max_new_tokens < 1:
        raise QuantkitError(f"max_new_tokens={max_new_tokens}: want at least 1")
    if not 0 <= min_new_tokens <= max_new_tokens:
        raise QuantkitError(f"min_new_tokens={min_new_tokens}: want 0 to max_new_tokens={max_new_tokens}")
    if min_new_tokens and not stop_tokens:
        raise QuantkitError(f"min_new_tokens={min_new_tokens} delays stop tokens, but there are none; leave it out")
    if logprobs is not None and logprobs < 0:
        raise QuantkitError(f"logprobs={logprobs}: want the number of alternatives to report, 0 or more, or None")


def check_choice(
    sampling: Sampling,
    vocabulary: int,
    logprobs: int | None,
    min_new_tokens: int,
    scores_prompt: bool,
    constraint: Constraint | None,
) -> None:
    """Refuse a choice of tokens that this model, or the rest of a request, does not allow.

    Raises:
        QuantkitError: naming the argument and the values it may have.
    """
    beyond = [token for token in sampling.logit_bias if token >= vocabulary]
    if beyond:
        raise QuantkitError(f"logit_bias has token {max(beyond)}, the model knows 0 to {vocabulary - 1}")
    if scores_prompt and logprobs is None:
        raise QuantkitError("scores_prompt reports log probabilities, and logprobs is None; give their number")
    if constraint is not None and min_new_tokens:
        raise QuantkitError(f"min_new_tokens={min_new_tokens}: a constraint says when the answer may end; leave it out")


def resolve_limits(limits: Limits, backend: Backend) -> Limits:
    """Return ``limits`` with every None replaced, according to the backend."""
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
