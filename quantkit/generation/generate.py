"""Text in, text out: tokenizer, chat template, stop strings and streaming around the engine, and the engine for a model.

Streaming text is harder than streaming tokens. A character can take several tokens (an emoji is four bytes), and a token
can be the start of a stop string that must not be shown. So :class:`TextStream` holds back what later tokens could still
change, and what it has shown is never taken back: the pieces joined are exactly the final text.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, cast, overload

from torch import nn

from quantkit.engine.backend import Backend
from quantkit.engine.drafters import Drafter
from quantkit.engine.engine import TokenEngine
from quantkit.engine.request import FinishReason, Limits, Logprob, Request
from quantkit.engine.sampling import Sampling
from quantkit.errors import QuantkitError
from quantkit.generation.engine import make_drafter
from quantkit.generation.text import Prompt, TextStream, encode_prompt, is_several
from quantkit.hf.backend import make_backend
from quantkit.nn.embedding import input_table
from quantkit.spec import KVScheme


@dataclass(frozen=True, slots=True)
class Generation:
    """A finished answer.

    Attributes:
        text: the answer without special tokens, cut before a stop string; None without a tokenizer.
        ids: the new tokens, the stop token included; tokens of a stop string included.
        finish_reason: ``"stop"`` (a stop token, end-of-sequence token or stop string) or ``"length"``.
        prompt_tokens: number of tokens of the prompt.
        prefill_ms: time to the first token, including the wait for others of the same call.
        decode_ms: time from each token to the next; one shorter than ``ids``. Drafted tokens come several at once.
        logprobs: of each token, if asked for.
        drafted: guesses that were verified.
        accepted: how many of them were right.
    """

    text: str | None
    ids: list[int]
    finish_reason: FinishReason
    prompt_tokens: int
    prefill_ms: float
    decode_ms: list[float] = field(repr=False)
    logprobs: list[Logprob] | None = field(default=None, repr=False)
    drafted: int = 0
    accepted: int = 0


@overload
def generate(model: nn.Module, prompt: Prompt, tokenizer: Any = None, **options: Any) -> Generation: ...
@overload
def generate(model: nn.Module, prompt: Sequence[Prompt], tokenizer: Any = None, **options: Any) -> list[Generation]: ...
def generate(  # type: ignore[misc]  # the overloads leave the options to this signature
    model: nn.Module,
    prompt: Prompt | Sequence[Prompt],
    tokenizer: Any = None,
    *,
    max_new_tokens: int = 128,
    min_new_tokens: int = 0,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    stop: str | int | Sequence[str | int] = (),
    seed: int | None = None,
    stream: Callable[[str], None] | None = None,
    logprobs: int | None = None,
    kv: str | KVScheme = "float",
    drafter: str | nn.Module | Drafter | None = None,
    batch_size: int = 8,
    engine: str = "auto",
    compute: str = "float",
    batch_invariant: bool = False,
) -> Generation | list[Generation]:
    """Continue a prompt, or each of a list of prompts.

    Args:
        model: a causal language model of transformers, quantized or not; in eval mode meanwhile.
        prompt: text, token ids (list, or tensor (T,) or (1, T)), or chat messages (``[{"role": "user", "content": ...}]``,
            which go through the tokenizer's chat template); or a list of such prompts.
        tokenizer: a tokenizer of transformers; needed for text, messages, stop strings and ``stream``.
        max_new_tokens: at most this many tokens.
        min_new_tokens: end-of-sequence and stop tokens are not chosen before so many.
        temperature: see :class:`~quantkit.engine.sampling.Sampling`, as are the next five; 0 is greedy. Nothing is taken
            from the model's generation config except its end-of-sequence tokens. Each prompt of a list gets the answer it
            would get alone with this seed.
        stop: strings or token ids that also end the answer.
        stream: called with each piece of text as soon as it is certain; for a single prompt.
        logprobs: report each token's log probability, and those of so many most likely ones.
        kv: see :class:`Engine`, as is ``drafter``.
        batch_size: prompts that run at once.
        engine: see :class:`Engine`, as are ``compute`` and ``batch_invariant``.

    Returns:
        The answer and its timings; for a list of prompts, a list.

    Raises:
        QuantkitError: a prompt that is empty, too long or holds ids outside the vocabulary; a missing tokenizer; sampling
            parameters out of range; logits that are not finite.
    """
    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty, seed)
    stop_strings, stop_tokens = _split_stops([stop] if isinstance(stop, str | int) else list(stop))
    if tokenizer is None and (stop_strings or stream):
        raise QuantkitError(f"{'stream' if stream else 'a stop string'} needs text: give a tokenizer")
    several = is_several(prompt)
    if several and stream:
        raise QuantkitError("stream shows one answer; give one prompt, or take the events of quantkit.Engine")
    given = cast(Sequence[Prompt], prompt if several else [prompt])
    prompts = [encode_prompt(one, tokenizer).tolist() for one in given]
    with _evaluating(model):
        options: dict[str, Any] = {"engine": engine, "compute": compute, "batch_invariant": batch_invariant}
        backend = make_backend(model, kv, **options)  # type: ignore[arg-type]
        runner = TokenEngine(backend, input_table(model)[0], limits=_limits_for(backend, prompts, max_new_tokens, batch_size))
        runner.use_drafter(make_drafter(drafter, runner))
        texts = [None if tokenizer is None else TextStream(tokenizer, stop_strings, stream) for _ in prompts]
        requests = [
            runner.submit(
                ids,
                max_new_tokens=max_new_tokens,
                min_new_tokens=min_new_tokens,
                sampling=sampling,
                stop_tokens={*end_tokens(model), *stop_tokens},
                watch=None if text is None else text.add,
                logprobs=logprobs,
            )
            for ids, text in zip(prompts, texts, strict=True)
        ]
        for event in runner.run():
            if event.request.error is not None:
                raise event.request.error
    answers = [_generation(request, text) for request, text in zip(requests, texts, strict=True)]
    return answers if several else answers[0]


def _generation(request: Request, text: "TextStream | None") -> Generation:
    assert request.finish_reason is not None
    times = [request.submitted_s, *request.token_s]
    first, *later = [(after - before) * 1000 for before, after in itertools.pairwise(times)]
    return Generation(
        None if text is None else text.finish(),
        request.ids,
        request.finish_reason,
        len(request.prompt),
        first,
        later,
        None if request.logprobs is None else request.logprob,
        request.drafted,
        request.accepted,
    )


def _limits_for(backend: Backend, prompts: Sequence[Sequence[int]], new_tokens: int, batch_size: int) -> Limits:
    """Return limits under which all of a batch run at once and nobody is preempted."""
    if batch_size < 1:
        raise QuantkitError(f"batch_size={batch_size}: want at least 1")
    running = max(min(len(prompts), batch_size), 1)
    longest = max([len(prompt) for prompt in prompts], default=1) + max(new_tokens, 1)
    longest = min(longest, backend.context_tokens or longest)
    size = Limits().page_tokens
    return Limits(running=running, kv_tokens=running * -(-longest // size) * size, waiting=max(len(prompts), 1))


def end_tokens(model: nn.Module) -> list[int]:
    """Return the model's end-of-sequence token ids, from its generation config or else from its config."""
    for config in (getattr(model, "generation_config", None), getattr(model, "config", None)):
        ids = getattr(config, "eos_token_id", None)
        if ids is not None:
            return [ids] if isinstance(ids, int) else list(ids)
    return []


def _split_stops(stops: Sequence[str | int]) -> tuple[list[str], list[int]]:
    for stop in stops:
        if isinstance(stop, bool) or not isinstance(stop, str | int) or stop == "":
            raise QuantkitError(f"stop={stop!r}: want a non-empty string or a token id")
    return [stop for stop in stops if isinstance(stop, str)], [stop for stop in stops if isinstance(stop, int)]


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Switch dropout off, and put every module's mode back afterwards."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
