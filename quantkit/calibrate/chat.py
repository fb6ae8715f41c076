"""Conversations as the text that a model reads in use, by the tokenizer's chat template or by one that is given.

What a message says is a text, or a list of parts, ``{"type": "text", "text": ...}``. Some templates know only one of the two,
and a template has no way to say so: it prints a list as Python would, brackets and all, or finds no part in a text and prints
nothing. So a template is asked with a word of our own what becomes of it, and gets what it can read.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from quantkit.errors import CalibrationError, nearest

Message = dict[str, Any]

_TEXT_PARTS: Final = ("text", "input_text", "output_text")
_WORD: Final = "quantkit"
_QUOTED: Final = tuple(f"{_WORD}{quote}" for quote in ("'", '"', "&#39;", "&#34;"))
"""What stands in the text if a template has printed a part and not what it says."""


@dataclass(frozen=True, slots=True)
class Passage:
    """A text, and where in it the assistant speaks.

    Attributes:
        text: what the model reads.
        place: where it comes from, for messages.
        answers: (first, last) in characters of every answer; None for a text that is no conversation.
    """

    text: str
    place: str
    answers: tuple[tuple[int, int], ...] | None = None


def check_content(content: Any, place: str) -> None:
    """Make sure that what a message says is text, or a list of parts that are.

    Raises:
        CalibrationError: it is something else, such as an image: the text around it alone is not what the model reads.
    """
    if content is None or isinstance(content, str):
        return
    if not isinstance(content, list | tuple):
        raise CalibrationError(f"{place}: its content is a {type(content).__name__}, want text or a list of parts of text")
    for number, part in enumerate(content, start=1):
        kind = part.get("type", "text") if isinstance(part, Mapping) else "text"
        words = part.get("text") if isinstance(part, Mapping) else part
        if kind not in _TEXT_PARTS or not isinstance(words, str):
            what = f"of type {kind!r}" if kind not in _TEXT_PARTS else "without text"
            raise CalibrationError(
                f"{place}: part {number} of its content is {what}; want parts {{'type': 'text', 'text': ...}} only; remove "
                "the row, since quantkit calibrates with text"
            )


@dataclass(frozen=True, slots=True)
class Chat:
    """How conversations become text.

    Attributes:
        tokenizer: has the template and applies it.
        template: the name of one of the tokenizer's templates, a file with one, or the template itself; None for the
            tokenizer's own.
    """

    tokenizer: Any
    template: str | None = None
    _read: dict[bool, bool] = field(default_factory=dict, init=False, repr=False, compare=False)

    def source(self) -> str | None:
        """Return what ``apply_chat_template`` takes: None for the tokenizer's own template.

        Raises:
            CalibrationError: no tokenizer, no template, or a name that is none.
        """
        own = getattr(self.tokenizer, "chat_template", None)
        if self.tokenizer is None or (self.template is None and not own):
            what = "there is no tokenizer" if self.tokenizer is None else "the tokenizer has none"
            raise CalibrationError(
                f"conversations need a chat template, and {what}; "
                "give a tokenizer with one, template= (a file, or the template itself), or name a column of plain text"
            )
        if self.template is None or (isinstance(own, Mapping) and self.template in own):
            return self.template
        if "{%" in self.template or "{{" in self.template:
            return self.template
        if os.path.isfile(self.template):
            try:
                return Path(self.template).read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise CalibrationError(f"template {self.template}: cannot be read: {error}") from error
        known = nearest(self.template, own) if isinstance(own, Mapping) else "the tokenizer has one without a name"
        raise CalibrationError(f"template={self.template!r} is no file, no template and no name of one; {known}")

    def render(self, messages: Sequence[Message], tools: Any, place: str) -> Passage:
        """Return a conversation as text.

        Raises:
            CalibrationError: the template refuses it.
        """
        template = self.source()
        read = [{**message, "content": self._readable(message["content"], template)} for message in messages]
        try:
            text = self.tokenizer.apply_chat_template(read, tools=tools, chat_template=template, tokenize=False)
        except Exception as error:  # a template is a program: it raises what it likes
            raise CalibrationError(
                f"{place}: the chat template refuses the conversation ({', '.join(str(m['role']) for m in messages)}): "
                f"{type(error).__name__}: {error}; mend the row, or give another template="
            ) from error
        return Passage(text, place, _answers(text, messages))

    def _readable(self, content: Any, template: str | None) -> Any:
        """Return what a message says as the template can read it: as it is if that is possible."""
        if not content:
            return content
        text = isinstance(content, str)
        if not self._reads(text, template) and self._reads(not text, template):
            return _as_parts([content]) if text else "\n".join(_words(content))
        return content if text else _as_parts(_words(content))

    def _reads(self, text: bool, template: str | None) -> bool:
        """Say whether the template prints what is given as text, or as parts; it is asked once."""
        if text not in self._read:
            self._read[text] = self._prints(_WORD if text else _as_parts([_WORD]), template)
        return self._read[text]

    def _prints(self, content: Any, template: str | None) -> bool:
        try:
            asked = [{"role": "user", "content": content}]
            found: str = self.tokenizer.apply_chat_template(asked, chat_template=template, tokenize=False)
        except Exception:  # as above; of another role or number of messages it may think otherwise
            return isinstance(content, str)
        found = found.lower()
        return _WORD in found and (isinstance(content, str) or not any(quoted in found for quoted in _QUOTED))


def _as_parts(texts: Sequence[str]) -> list[dict[str, str]]:
    return [{"type": "text", "text": text} for text in texts]


def _words(content: Any) -> list[str]:
    """Return the texts that a message says, one by one."""
    if isinstance(content, str) or content is None:
        return [content or ""]
    return [part["text"] if isinstance(part, Mapping) else part for part in content]


def _answers(text: str, messages: Sequence[Message]) -> tuple[tuple[int, int], ...]:
    """Return where the assistant's words stand in the rendered text; the messages' contents stand there in order."""
    found, cursor = [], 0
    for message in messages:
        for words in filter(None, map(str.strip, _words(message.get("content")))):
            start = text.find(words, cursor)
            if start >= 0:
                cursor = start + len(words)
                found += [(start, cursor)] if message["role"] == "assistant" else []
    return tuple(found)
