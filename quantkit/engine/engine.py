"""Generate text as token ids, one at a time, with a key/value cache behind the model.

    logits = prefill(prompt)                     one pass over the whole prompt fills the cache
    repeat:  token = sample(logits)
             logits = decode_one_token(token)    one pass over one token reads the cache

The model is a :class:`Step`: a function from new token ids and their position to the logits of the last of them, which
remembers what it has seen. Prefill is limited by arithmetic, decode by reading all weights once per token, so the two
are timed apart.
"""

import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from quantkit.engine.sampling import Sampling, sample
from quantkit.errors import QuantkitError

FinishReason = Literal["stop", "length"]


class Step(Protocol):
    """A causal language model with memory, for one sequence."""

    def __call__(self, ids: Tensor, position: int) -> Tensor:
        """Read ``ids`` (1, T) int64, the first of which stands at ``position``; return logits (1, V) after the last.

        ``position`` must be the number of tokens read since the last reset.
        """
        ...

    def reset(self) -> None:
        """Forget everything read."""
        ...


class Token(NamedTuple):
    """One generated token.

    Attributes:
        id: the token.
        ms: milliseconds from asking for it to having it; the first includes the prefill. The consumer's time is not in it.
        finish: why this is the last one (``"stop"``: it is a stop token; ``"length"``: no more were allowed), else None.
    """

    id: int
    ms: float
    finish: FinishReason | None


@dataclass(frozen=True, slots=True)
class GeneratedIds:
    """A finished generation.

    Attributes:
        ids: the new tokens, the stop token that ended it included.
        finish_reason: ``"stop"`` (a stop token, or the callback asked for it) or ``"length"`` (max_new_tokens reached).
        prefill_ms: time to the first token.
        token_ms: time of each later token; one shorter than ``ids``.
    """

    ids: list[int]
    finish_reason: FinishReason
    prefill_ms: float
    token_ms: list[float] = field(repr=False)


def prefill(step: Step, prompt_ids: Tensor, *, chunk: int | None = None) -> Tensor:
    """Read the prompt (T,) int64 and return the logits (1, V) after it.

    Args:
        chunk: read at most this many tokens per pass, which bounds the memory of activations; None reads all at once.
    """
    size = len(prompt_ids) if chunk is None else chunk
    for start in range(0, len(prompt_ids), size):
        logits = step(prompt_ids[None, start : start + size], start)
    return logits


def decode_one_token(step: Step, token: Tensor, position: int) -> Tensor:
    """Read one token (1,) int64 standing at ``position`` and return the logits (1, V) after it."""
    return step(token[:, None], position)


def stream_ids(
    step: Step,
    prompt_ids: Tensor,
    *,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    stop_tokens: Collection[int] = (),
    chunk: int | None = None,
) -> Iterator[Token]:
    """Yield the tokens that follow ``prompt_ids``, each as soon as it is known.

    Nothing runs between two ``next``: a consumer may stop at any time, and the step is reset before its next use.

    Args:
        step: the model; it is reset first.
        prompt_ids: (T,) int64 on the step's device, T >= 1.
        max_new_tokens: at most this many tokens, >= 1.
        sampling: how to choose; None is greedy.
        stop_tokens: a token among these ends the generation; it is yielded.
        chunk: see :func:`prefill`.

    Raises:
        QuantkitError: an empty or wrongly shaped prompt, no token allowed, a chunk below 1, logits that are not finite.
    """
    _check_request(prompt_ids, max_new_tokens, chunk)
    return _stream(step, prompt_ids, max_new_tokens, sampling or Sampling(), frozenset(stop_tokens), chunk)


def _stream(
    step: Step, prompt_ids: Tensor, max_new_tokens: int, sampling: Sampling, stop_tokens: frozenset[int], chunk: int | None
) -> Iterator[Token]:
    generator = None if sampling.greedy else sampling.generator(prompt_ids.device)
    prompt_tokens = len(prompt_ids)
    history = torch.cat([prompt_ids, prompt_ids.new_empty(max_new_tokens)])
    step.reset()
    start = time.perf_counter()
    logits = prefill(step, prompt_ids, chunk=chunk)
    for position in range(prompt_tokens, prompt_tokens + max_new_tokens):
        token = sample(logits, sampling, generator, history[None, :position])
        history[position] = token[0]
        token_id = int(token)  # waits for the device, so the clock below is honest
        ms = (time.perf_counter() - start) * 1000
        last = position + 1 == prompt_tokens + max_new_tokens
        finish: FinishReason | None = "stop" if token_id in stop_tokens else "length" if last else None
        yield Token(token_id, ms, finish)
        if finish:
            return
        start = time.perf_counter()
        logits = decode_one_token(step, token, position)


def generate_ids(
    step: Step,
    prompt_ids: Tensor,
    *,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    stop_tokens: Collection[int] = (),
    callback: Callable[[int], bool | None] | None = None,
    chunk: int | None = None,
) -> GeneratedIds:
    """Generate the tokens that follow ``prompt_ids``; see :func:`stream_ids` for the arguments they share.

    Args:
        callback: called with every token, once and in order; returning True ends the generation after it (``"stop"``).
            What it raises passes through and leaves the step ready for its next use.
    """
    tokens: list[Token] = []
    reason: FinishReason = "length"
    for token in stream_ids(
        step, prompt_ids, max_new_tokens=max_new_tokens, sampling=sampling, stop_tokens=stop_tokens, chunk=chunk
    ):
        tokens.append(token)
        asked_to_stop = callback is not None and callback(token.id)
        if token.finish or asked_to_stop:
            reason = "stop" if asked_to_stop or token.finish == "stop" else "length"
            break
    return GeneratedIds([token.id for token in tokens], reason, tokens[0].ms, [token.ms for token in tokens[1:]])


def _check_request(prompt_ids: Tensor, max_new_tokens: int, chunk: int | None) -> None:
    if prompt_ids.ndim != 1 or prompt_ids.dtype != torch.int64 or not len(prompt_ids):
        raise QuantkitError(
            f"prompt: {prompt_ids.dtype} {tuple(prompt_ids.shape)}, want int64 (T,) with at least one token; "
            "an empty prompt can start from the model's beginning-of-sequence token"
        )
    if max_new_tokens < 1:
        raise QuantkitError(f"max_new_tokens={max_new_tokens}: want at least 1")
    if chunk is not None and chunk < 1:
        raise QuantkitError(f"chunk={chunk}: want at least 1 token per prefill pass, or None for all at once")
