"""Prompts to tokens, tokens to text.

Streaming text is harder than streaming tokens. A character can take several tokens (an emoji is four bytes), and a token
can be the start of a stop string that must not be shown. So :class:`TextStream` holds back what later tokens could still
change, and what it has shown is never taken back: the pieces joined are exactly the final text.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from quantkit.errors import QuantkitError

Message = dict[str, Any]


Prompt = str | Sequence[int] | Sequence[Message] | Tensor


REPLACEMENT = "\ufffd"
"""What a tokenizer shows for bytes that are not yet a character."""


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
