"""Text in, text out: tokenizer, chat template, stop strings and streaming around the engine.

Streaming text is harder than streaming tokens. A character can take several tokens (an emoji is four bytes), and a token
can be the start of a stop string that must not be shown. So :class:`TextStream` holds back what later tokens could still
change, and what it has shown is never taken back: the pieces joined are exactly the final text.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from quantkit.engine.engine import FinishReason, generate_ids
from quantkit.engine.sampling import Sampling
from quantkit.errors import QuantkitError
from quantkit.hf.step import open_step

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
        prefill_ms: time to the first token.
        decode_ms: time of each later token; one shorter than ``ids``.
    """

    text: str | None
    ids: list[int]
    finish_reason: FinishReason
    prompt_tokens: int
    prefill_ms: float
    decode_ms: list[float] = field(repr=False)


def generate(
    model: nn.Module,
    prompt: Prompt,
    tokenizer: Any = None,
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    stop: str | int | Sequence[str | int] = (),
    seed: int | None = None,
    stream: Callable[[str], None] | None = None,
    engine: str = "auto",
    activations: str = "float",
    head: str = "float",
) -> Generation:
    """Continue a prompt.

    Args:
        model: a causal language model of transformers, quantized or not; put in eval mode meanwhile.
        prompt: text, token ids (list, or tensor (T,) or (1, T)), or chat messages (``[{"role": "user", "content": ...}]``,
            which go through the tokenizer's chat template).
        tokenizer: a tokenizer of transformers; needed for text, messages, stop strings and ``stream``.
        max_new_tokens: at most this many tokens.
        temperature: see :class:`~quantkit.engine.sampling.Sampling`, as are the next five; 0 is greedy. Nothing is taken
            from the model's generation config except its end-of-sequence tokens.
        stop: strings or token ids that also end the answer.
        stream: called with each piece of text as soon as it is certain.
        engine: ``"native"``, ``"modules"``, or the first where it can run the model: see :func:`quantkit.hf.step.open_step`.
        activations, head: ``"int8"`` is faster and less exact; native only.

    Returns:
        The answer and its timings.

    Raises:
        QuantkitError: a prompt that is empty, too long or holds ids outside the vocabulary; a missing tokenizer; sampling
            parameters out of range; logits that are not finite.
    """
    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty, seed)
    stop_strings, stop_tokens = _split_stops([stop] if isinstance(stop, str | int) else list(stop))
    if tokenizer is None and (stop_strings or stream):
        raise QuantkitError(f"{'stream' if stream else 'a stop string'} needs text: give a tokenizer")
    ids = encode_prompt(prompt, tokenizer)
    _check_fits(model, ids, max_new_tokens)
    text = None if tokenizer is None else TextStream(tokenizer, stop_strings, stream)
    with _evaluating(model):
        step = open_step(model, engine, activations=activations, head=head)  # type: ignore[arg-type]
        done = generate_ids(
            step,
            ids.to(_input_device(model)),
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            stop_tokens={*end_tokens(model), *stop_tokens},
            callback=None if text is None else text.add,
        )
    answer = None if text is None else text.finish()
    return Generation(answer, done.ids, done.finish_reason, len(ids), done.prefill_ms, done.token_ms)


def encode_prompt(prompt: Prompt, tokenizer: Any = None) -> Tensor:
    """Return the prompt as int64 ids (T,) on the CPU; text and messages go through ``tokenizer``."""
    if isinstance(prompt, Tensor):
        ids = prompt[0] if prompt.ndim == 2 and prompt.shape[0] == 1 else prompt
        if ids.ndim != 1 or ids.is_floating_point():
            raise QuantkitError(
                f"prompt: {prompt.dtype} {tuple(prompt.shape)}, want integer ids (T,) or (1, T); one prompt per call"
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


def _check_fits(model: nn.Module, ids: Tensor, max_new_tokens: int) -> None:
    if not len(ids):
        raise QuantkitError("the prompt is empty: give at least one token, for instance the beginning-of-sequence token")
    rows = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= rows:
        raise QuantkitError(f"prompt ids reach from {low} to {high}, the model knows 0 to {rows - 1}; is this its tokenizer?")
    config = model.config.get_text_config(decoder=True)  # type: ignore[union-attr,operator]
    longest = getattr(config, "max_position_embeddings", None)
    if longest is not None and len(ids) + max_new_tokens > longest:
        raise QuantkitError(
            f"{len(ids)} prompt tokens and max_new_tokens={max_new_tokens} make {len(ids) + max_new_tokens}, the model reads "
            f"at most {longest}; shorten the prompt, or ask for at most {max(longest - len(ids), 0)} new tokens"
        )


def _input_device(model: nn.Module) -> torch.device:
    device: torch.device = model.get_input_embeddings().weight.device  # type: ignore[operator]
    return device


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
