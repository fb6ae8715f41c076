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

import torch
from torch import Tensor, nn

from quantkit.engine.drafters import DRAFTERS, Drafter
from quantkit.engine.drafters.model import ModelDrafter
from quantkit.engine.drafters.twin import TwinDrafter
from quantkit.engine.engine import TokenEngine
from quantkit.engine.request import FinishReason, Limits, Logprob, Request
from quantkit.engine.sampling import Sampling
from quantkit.engine.step import Backend
from quantkit.errors import QuantkitError
from quantkit.hf.backend import make_backend
from quantkit.nn.embedding import input_table
from quantkit.spec import KVScheme

Message = dict[str, Any]
Prompt = str | Sequence[int] | Sequence[Message] | Tensor

REPLACEMENT = "\ufffd"
"""What a tokenizer shows for bytes that are not yet a character."""


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


class Engine(TokenEngine):
    """Serve many requests with one model: continuous batching, paged keys and values, drafts. Token ids in, token ids out.

    >>> engine = quantkit.Engine(model)  # doctest: +SKIP
    >>> requests = [engine.submit(ids, max_new_tokens=64) for ids in prompts]  # doctest: +SKIP
    >>> for event in engine.run():  # doctest: +SKIP
    ...     print(event.request.number, event.token, event.finish)

    Args:
        model: a causal language model of transformers, quantized or not; put in eval mode.
        kv: how keys and values are stored: ``"float"``, ``"int8"``, ``"int4"`` or a :class:`~quantkit.spec.KVScheme`.
        limits: how much to take on; None for the defaults.
        drafter: guesses ahead, to decode several tokens at once: ``"ngram"``; ``"twin"``, the upper four bits of the model's
            own int8 weights (native only); a smaller model with the same vocabulary; or any
            :class:`~quantkit.engine.drafters.Drafter`. Answers do not change.
        engine: ``"native"`` (one call per step), ``"modules"`` (the model's own forward), or ``"auto"``, the first that
            can run it.
        activations: ``"int8"`` is faster and less exact; ``"float32"`` keeps those of a bfloat16 model from being rounded to
            bfloat16 where that is faster; both native, on a CPU.
        batch_invariant: an answer is the same bits whatever runs beside it, with drafts and without. The CPU's native engine is
            always so; CUDA's reads prompts several times slower for it.

    Raises:
        QuantkitError: what :func:`~quantkit.hf.backend.make_backend` and :class:`~quantkit.engine.engine.TokenEngine` refuse.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        kv: str | KVScheme = "float",
        limits: Limits | None = None,
        drafter: str | nn.Module | Drafter | None = None,
        engine: str = "auto",
        activations: str = "float",
        batch_invariant: bool = False,
    ) -> None:
        options: dict[str, Any] = {"engine": engine, "activations": activations, "batch_invariant": batch_invariant}
        backend = make_backend(model.eval(), kv, **options)  # type: ignore[arg-type]
        super().__init__(backend, input_table(model)[0], limits=limits)
        self.use_drafter(_drafter(drafter, self))


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
    activations: str = "float",
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
        engine: see :class:`Engine`, as are ``activations`` and ``batch_invariant``.

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
        options: dict[str, Any] = {"engine": engine, "activations": activations, "batch_invariant": batch_invariant}
        backend = make_backend(model, kv, **options)  # type: ignore[arg-type]
        runner = TokenEngine(backend, input_table(model)[0], limits=_limits_for(backend, prompts, max_new_tokens, batch_size))
        runner.use_drafter(_drafter(drafter, runner))
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


def _drafter(drafter: str | nn.Module | Drafter | None, engine: TokenEngine) -> Drafter | None:
    """Make a drafter of what a user may give."""
    if isinstance(drafter, nn.Module):
        context = engine.limits.context_tokens
        assert context is not None
        backend = make_backend(drafter.eval())  # type: ignore[arg-type]
        return ModelDrafter(backend, engine.limits.running, context, vocabulary=(input_table(drafter)[0], engine.vocabulary))
    if isinstance(drafter, str):
        if drafter == "model":
            raise QuantkitError("drafter='model' needs to know which: give the smaller model itself")
        if drafter == "twin":
            return TwinDrafter(engine.backend)
        return DRAFTERS.get(drafter)()
    return drafter


def is_several(prompt: Any) -> bool:
    """Whether ``prompt`` is a list of prompts: of texts, of id lists or tensors, or of lists of messages."""
    return (
        isinstance(prompt, list | tuple)
        and bool(prompt)
        and all(isinstance(one, str | list | tuple | Tensor) for one in prompt)
    )


def encode_prompt(prompt: Prompt, tokenizer: Any = None) -> Tensor:
    """Return the prompt as int64 ids (T,) on the CPU; text and messages go through ``tokenizer``."""
    if isinstance(prompt, Tensor):
        ids = prompt[0] if prompt.ndim == 2 and prompt.shape[0] == 1 else prompt
        if ids.ndim != 1 or ids.is_floating_point():
            raise QuantkitError(
                f"prompt: {prompt.dtype} {tuple(prompt.shape)}, want integer ids (T,) or (1, T); "
                "for several prompts give a list"
            )
        return ids.long().cpu()
    if isinstance(prompt, Sequence) and not isinstance(prompt, str) and all(isinstance(item, int) for item in prompt):
        return torch.tensor(list(prompt), dtype=torch.int64)
    if tokenizer is None:
        raise QuantkitError("the prompt is text: give the model's tokenizer, or token ids instead of text")
    if isinstance(prompt, str):
        return torch.tensor(tokenizer(prompt)["input_ids"], dtype=torch.int64)
    if not isinstance(prompt, Sequence) or not all(isinstance(item, dict) for item in prompt):
        raise QuantkitError(f"prompt is a {type(prompt).__name__}: want text, token ids, or messages (a list of dicts)")
    if not getattr(tokenizer, "chat_template", None):
        raise QuantkitError("the tokenizer has no chat template, so messages cannot be written as one prompt; give text")
    encoded = tokenizer.apply_chat_template(list(prompt), add_generation_prompt=True, tokenize=True, return_dict=True)
    return torch.tensor(encoded["input_ids"], dtype=torch.int64)


def end_tokens(model: nn.Module) -> list[int]:
    """Return the model's end-of-sequence token ids, from its generation config or else from its config."""
    for config in (getattr(model, "generation_config", None), getattr(model, "config", None)):
        ids = getattr(config, "eos_token_id", None)
        if ids is not None:
            return [ids] if isinstance(ids, int) else list(ids)
    return []


class TextStream:
    """Turn tokens into text as they come, and watch for stop strings.

    Only the last piece and the tokens after it are decoded again for each token, so the cost per token does not grow.

    Args:
        tokenizer: has ``decode(ids, skip_special_tokens=...)``.
        stop_strings: the text ends before the first of these.
        emit: called with each non-empty piece of text, in order.
    """

    def __init__(self, tokenizer: Any, stop_strings: Sequence[str] = (), emit: Callable[[str], None] | None = None) -> None:
        self._tokenizer, self._stops, self._emit = tokenizer, tuple(stop_strings), emit
        self._ids: list[int] = []
        self._shown_from, self._shown_to = 0, 0  # the last piece shown came from these tokens
        self._pieces: list[str] = []
        self._held = ""  # text that is certain but could begin a stop string
        self._stopped = False

    def add(self, token: int) -> bool:
        """Take one more token; return True when a stop string is complete."""
        self._ids.append(token)
        shown = self._decode(self._ids[self._shown_from : self._shown_to])
        text = self._decode(self._ids[self._shown_from :])
        if len(text) > len(shown) and not text.endswith(REPLACEMENT):
            self._shown_from, self._shown_to = self._shown_to, len(self._ids)
            self._push(text[len(shown) :])
        return self._stopped

    def finish(self) -> str:
        """Emit what was held back and return the whole text."""
        if not self._stopped:
            shown = self._decode(self._ids[self._shown_from : self._shown_to])
            self._push(self._decode(self._ids[self._shown_from :])[len(shown) :])
            self._show("" if self._stopped else self._held)
        return "".join(self._pieces)

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    def _push(self, text: str) -> None:
        text = self._held + text
        found = [start for stop in self._stops if (start := text.find(stop)) >= 0]
        if found:
            self._stopped = True
            self._show(text[: min(found)])
            return
        keep = max((n for stop in self._stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
        self._held = text[len(text) - keep :]
        self._show(text[: len(text) - keep])

    def _show(self, text: str) -> None:
        if not text:
            return
        self._pieces.append(text)
        if self._emit is not None:
            self._emit(text)


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
