"""Generate text: tokenizer, chat template, stop strings and streaming around the engine, for one prompt or several."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Unpack, cast, overload

from torch import nn

from quantkit.engine.backend import Backend
from quantkit.engine.engine import TokenEngine
from quantkit.engine.request import FinishReason, Limits, Logprob, Request
from quantkit.engine.sampling import Sampling
from quantkit.errors import QuantkitError
from quantkit.generation.engine import make_drafter
from quantkit.generation.options import DrafterChoice, EngineOptions, GenerationOptions, SamplingOptions
from quantkit.generation.stops import check_stops
from quantkit.generation.text import Prompt, TextStream, encode_prompt, is_several
from quantkit.hf.backend import make_backend
from quantkit.nn.embedding import input_table
from quantkit.system.compute import evaluation_mode
from quantkit.system.keywords import check_names, take


@dataclass(frozen=True, slots=True)
class Generation:
    """A finished answer.

    Attributes:
        text: the answer without special tokens and without the stop string; None without a tokenizer.
        ids: the new tokens, including a stop token or the tokens of a stop string.
        finish_reason: ``"stop"`` (a stop token, end-of-sequence token or stop string) or ``"length"``.
        prompt_tokens: number of tokens of the prompt.
        prefill_ms: milliseconds to the first token, including the time spent waiting for other prompts of the call.
        decode_ms: milliseconds from each token to the next, one fewer than ``ids``. Accepted drafts arrive together.
        logprobs: log probabilities of each token, if requested.
        drafted: draft tokens that were verified.
        accepted: draft tokens that were accepted.
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
def generate(  # type: ignore[overload-overlap]  # a text is also a sequence of texts
    model: nn.Module, prompt: Prompt, tokenizer: Any = None, **options: Unpack[GenerationOptions]
) -> Generation: ...
@overload
def generate(
    model: nn.Module, prompt: Sequence[Prompt], tokenizer: Any = None, **options: Unpack[GenerationOptions]
) -> list[Generation]: ...
def generate(  # type: ignore[misc]  # callers see the overloads, whose options include the ones named here
    model: nn.Module,
    prompt: Prompt | Sequence[Prompt],
    tokenizer: Any = None,
    *,
    max_new_tokens: int = 128,
    stop: str | int | Sequence[str | int] = (),
    stream: Callable[[str], None] | None = None,
    drafter: DrafterChoice = None,
    batch_size: int = 8,
    **options: Any,
) -> Generation | list[Generation]:
    """Continue a prompt, or each prompt of a list.

    Args:
        model: a causal language model of transformers, quantized or not; it is in eval mode during the call.
        prompt: text, token ids (list, or tensor (T,) or (1, T)), or chat messages (``[{"role": "user", "content": ...}]``,
            which are formatted with the tokenizer's chat template); or a list of such prompts.
        tokenizer: a tokenizer of transformers; needed for text, messages, stop strings and ``stream``.
        max_new_tokens: longest answer in tokens.
        stop: strings or token ids that end the answer, in addition to the model's end-of-sequence tokens.
        stream: called with each piece of text as soon as it is final; for a single prompt only.
        drafter: see :class:`quantkit.Engine`.
        batch_size: prompts that run at the same time.
        **options: any of the following keyword arguments.
            ``temperature`` (0 is greedy decoding), ``top_k``, ``top_p``, ``min_p``, ``repetition_penalty``, ``seed``: see
            :class:`quantkit.Sampling`. The model's generation config is not used, except for its end-of-sequence tokens. Every
            prompt of a list gets the answer that it would get alone with the same seed.
            ``min_new_tokens``: end-of-sequence and stop tokens are not chosen before the answer has this many tokens.
            ``logprobs``: report the log probability of each token, and of this many most likely tokens.
            ``kv``, ``engine``, ``compute``, ``batch_invariant``: see :class:`quantkit.Engine`.

    Returns:
        The answer with its timings; a list of them for a list of prompts.

    Raises:
        QuantkitError: a prompt that is empty, too long or has ids outside the vocabulary; a missing tokenizer; an option out of
            range; logits that are not finite.
        TypeError: an unknown option.
    """
    check_names("generate", options, GenerationOptions.__optional_keys__)
    sampling = Sampling(**take(options, SamplingOptions.__optional_keys__))
    stop_strings, stop_tokens = _split_stops([stop] if isinstance(stop, str | int) else list(stop))
    if tokenizer is None and (stop_strings or stream):
        raise QuantkitError(f"{'stream' if stream else 'a stop string'} needs text: give a tokenizer")
    several = is_several(prompt)
    if several and stream:
        raise QuantkitError("stream shows one answer; give one prompt, or use the events of quantkit.Engine")
    given = cast(Sequence[Prompt], prompt if several else [prompt])
    prompts = [encode_prompt(one, tokenizer).tolist() for one in given]
    with evaluation_mode(model):
        backend = make_backend(model, **take(options, EngineOptions.__optional_keys__))  # type: ignore[arg-type]
        runner = TokenEngine(backend, input_table(model)[0], limits=_limits_for(backend, prompts, max_new_tokens, batch_size))
        runner.use_drafter(make_drafter(drafter, runner))
        texts = [None if tokenizer is None else TextStream(tokenizer, stop_strings, stream) for _ in prompts]
        requests = [
            runner.submit(
                ids,
                max_new_tokens=max_new_tokens,
                sampling=sampling,
                stop_tokens={*end_tokens(model), *stop_tokens},
                watch=None if text is None else text.add,
                **take(options, frozenset({"min_new_tokens", "logprobs"})),
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
    """Return limits under which ``batch_size`` prompts run at the same time and none is preempted."""
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
    """Return stop strings and stop tokens.

    Raises:
        QuantkitError: an element that is neither, or strings beyond the limits of :mod:`quantkit.generation.stops`.
    """
    for stop in stops:
        if isinstance(stop, bool) or not isinstance(stop, str | int) or stop == "":
            raise QuantkitError(f"stop={stop!r}: want a non-empty string or a token id")
    strings = [stop for stop in stops if isinstance(stop, str)]
    check_stops(strings)
    return strings, [stop for stop in stops if isinstance(stop, int)]
