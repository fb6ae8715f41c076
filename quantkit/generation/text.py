"""Convert prompts to tokens and tokens to text.

Streaming text is harder than streaming tokens. A character can consist of several tokens (an emoji is four bytes), and a token
can be the start of a stop string, which must not be shown. :class:`TextStream` therefore delays text that later tokens could
change, and never revises text that it has shown: the pieces, joined, are exactly the final text.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from quantkit.errors import QuantkitError
from quantkit.generation.stops import stop_strings as automaton

Message = dict[str, Any]
"""A chat message, for instance ``{"role": "user", "content": "Hello"}``."""

Prompt = str | Sequence[int] | Sequence[Message] | Tensor
"""Text, token ids, or chat messages."""

REPLACEMENT = "\ufffd"
"""The character that a tokenizer returns for an incomplete sequence of bytes."""

MAX_PENDING_TOKENS = 64
"""Most tokens that are decoded again with every new one. A character has a few; more are bytes that never become one."""

_LARGEST_ID = 2**63 - 1


def is_several(prompt: Any) -> bool:
    """Return whether ``prompt`` is a list of prompts rather than one prompt."""
    return (
        isinstance(prompt, list | tuple)
        and bool(prompt)
        and all(isinstance(one, str | list | tuple | Tensor) for one in prompt)
    )


def encode_prompt(prompt: Prompt, tokenizer: Any = None, tools: Sequence[Message] = ()) -> Tensor:
    """Return a prompt as int64 token ids (T,) on the CPU.

    Args:
        prompt: text, token ids (list, or tensor (T,) or (1, T)), or chat messages.
        tokenizer: needed for text and messages.
        tools: functions that the model may call, as chat templates want them.

    Raises:
        QuantkitError: a prompt of another type or shape, text that is not Unicode, a missing tokenizer, a tokenizer without
            chat template, or messages that its template refuses.
    """
    if isinstance(prompt, Tensor):
        ids = prompt[0] if prompt.ndim == 2 and prompt.shape[0] == 1 else prompt
        if ids.ndim != 1 or ids.is_floating_point():
            raise QuantkitError(
                f"prompt: {prompt.dtype} {tuple(prompt.shape)}, want integer ids (T,) or (1, T); "
                "for several prompts give a list"
            )
        return ids.long().cpu()
    if isinstance(prompt, Sequence) and not isinstance(prompt, str) and all(isinstance(item, int) for item in prompt):
        if any(isinstance(item, int) and abs(item) > _LARGEST_ID for item in prompt):
            raise QuantkitError(
                "the prompt has a token id that does not fit 64 bits; use the tokenizer that belongs to the model"
            )
        return torch.tensor(list(prompt), dtype=torch.int64)
    if tokenizer is None:
        raise QuantkitError("the prompt is text: give the model's tokenizer, or token ids instead of text")
    if isinstance(prompt, str):
        check_unicode(prompt, "the prompt")
        return torch.tensor(tokenizer(prompt)["input_ids"], dtype=torch.int64)
    if not isinstance(prompt, Sequence) or not all(isinstance(item, dict) for item in prompt):
        raise QuantkitError(f"prompt is a {type(prompt).__name__}: want text, token ids, or messages (a list of dicts)")
    if not getattr(tokenizer, "chat_template", None):
        raise QuantkitError("the tokenizer has no chat template, which messages need; give text instead")
    for text in _texts([*prompt, *tools]):
        check_unicode(text, "a message")
    try:
        encoded = tokenizer.apply_chat_template(
            list(prompt), tools=list(tools) or None, add_generation_prompt=True, tokenize=True, return_dict=True
        )
    except Exception as error:  # a template is a program of the model's authors: it may raise anything
        reason = str(error) or type(error).__name__
        raise QuantkitError(
            f"the model's chat template refuses these messages: {reason}; change their roles or order"
        ) from error
    return torch.tensor(encoded["input_ids"], dtype=torch.int64)


def check_unicode(text: str, where: str) -> None:
    """Refuse text with half of a surrogate pair, which stands for no character.

    Args:
        text: the text.
        where: what messages call it.

    Raises:
        QuantkitError: naming the position.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"U+{ord(text[error.start]):04X}"
        raise QuantkitError(
            f"{where} is not valid Unicode: character {error.start} is {half}, half of a surrogate pair (an emoji cut in two); "
            "remove it, or give the whole character"
        ) from None


def _texts(value: Any) -> Iterator[str]:
    """Yield every string in nested mappings and lists."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for one in value.values() if isinstance(value, Mapping) else value:
            yield from _texts(one)


class TextStream:
    """Convert a stream of tokens to text, and detect stop strings.

    For each token, only the tokens of the last piece and those after it are decoded, so the cost per token is constant.

    Args:
        tokenizer: a tokenizer with ``decode(ids, skip_special_tokens=...)``.
        stop_strings: the text ends before the first of these that is complete, the longest one of several.
        emit: called with each non-empty piece of text, in order.
    """

    def __init__(self, tokenizer: Any, stop_strings: Sequence[str] = (), emit: Callable[[str], None] | None = None) -> None:
        self._tokenizer, self._emit = tokenizer, emit
        self._stops, self._state = automaton(tuple(stop_strings)), 0
        self._ids: list[int] = []
        self._shown_from, self._shown_to = 0, 0  # tokens of the last piece that was shown
        self._pieces: list[str] = []
        self._held = ""  # final text that could be the start of a stop string
        self._stopped = False

    def add(self, token: int) -> bool:
        """Add a token. Return True if the text contains a stop string."""
        self._ids.append(token)
        shown = self._decode(self._ids[self._shown_from : self._shown_to])
        text = self._decode(self._ids[self._shown_from :])
        whole = len(text) > len(shown) and not text.endswith(REPLACEMENT)
        if whole or len(self._ids) - self._shown_to >= MAX_PENDING_TOKENS:
            self._shown_from, self._shown_to = self._shown_to, len(self._ids)
            self._push(text[len(shown) :])
        return self._stopped

    def finish(self) -> str:
        """Emit the delayed text and return the whole text."""
        if not self._stopped:
            shown = self._decode(self._ids[self._shown_from : self._shown_to])
            self._push(self._decode(self._ids[self._shown_from :])[len(shown) :])
            self._show("" if self._stopped else self._held)
        return "".join(self._pieces)

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    def _push(self, text: str) -> None:
        self._state, read, found = self._stops.search(self._state, text)
        self._stopped = found > 0
        known = self._held + text[:read]
        final = len(known) - (found or self._stops.pending(self._state))
        self._held = known[final:]
        self._show(known[:final])

    def _show(self, text: str) -> None:
        if not text:
            return
        self._pieces.append(text)
        if self._emit is not None:
            self._emit(text)
