"""The formats of responses in OpenAI's API: complete, as chunks of a stream, and errors."""

import codecs
import json
import time
import uuid
from collections.abc import Sequence
from typing import Any, Literal

from quantkit.engine.request import Logprob, Request
from quantkit.serve.intake import Accepted
from quantkit.serve.tools import CallFinder
from quantkit.serve.worker import Answer, Piece

Kind = Literal["chat", "text"]
_ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))


class Spelling:
    """Spells the tokens of one answer: text, bytes, and where in the text each begins.

    A token can be a part of a character. It is then written as OpenAI does, ``bytes:\\xf0\\x9f``; the bytes of all tokens,
    joined, are those of the text.

    Args:
        tokenizer: converts tokens to text.
        accepted: the request.
    """

    def __init__(self, tokenizer: Any, accepted: Accepted) -> None:
        self._tokenizer, self._grammars = tokenizer, accepted.grammars
        self._decoder, self._offset = codecs.getincrementaldecoder("utf-8")("replace"), 0

    def token(self, token: int) -> tuple[str, list[int] | None]:
        """Return the text and the bytes of a token; a special one has a name, but no bytes."""
        if self._grammars is None:
            text = self._tokenizer.decode([token])
            return text, list(text.encode())
        raw = self._grammars.token_bytes(token)
        if not raw:
            return self._tokenizer.decode([token]), None
        try:
            return raw.decode(), list(raw)
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw), list(raw)

    def offset(self, token: int) -> int:
        """Return where the next token of the answer begins, in characters."""
        before = self._offset
        self._offset += len(self._decoder.decode(bytes(self.token(token)[1] or ())))
        return before

    def chat(self, known: Sequence[tuple[int, Logprob]]) -> dict[str, Any]:
        """Return log probabilities as /v1/chat/completions has them."""
        rows = [
            {**self._entry(token, found.logprob), "top_logprobs": [self._entry(*pair) for pair in found.top]}
            for token, found in known
        ]
        return {"content": rows, "refusal": None}

    def text(self, known: Sequence[tuple[int, Logprob | None]]) -> dict[str, Any]:
        """Return log probabilities as /v1/completions has them; the first token of a prompt has none."""
        return {
            "tokens": [self.token(token)[0] for token, _ in known],
            "token_logprobs": [found and found.logprob for _, found in known],
            "top_logprobs": [found and {self.token(token)[0]: value for token, value in found.top} for _, found in known],
            "text_offset": [self.offset(token) for token, _ in known],
        }

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        text, raw = self.token(token)
        return {"token": text, "logprob": logprob, "bytes": raw}


class Reply:
    """Formats the response to one request, complete or streamed.

    Args:
        kind: ``"chat"`` or ``"text"``.
        model: name of the model.
        tokenizer: converts tokens to text.
        accepted: the request.
    """

    def __init__(self, kind: Kind, model: str, tokenizer: Any, accepted: Accepted) -> None:
        self._kind, self._model, self._tokenizer, self._accepted = kind, model, tokenizer, accepted
        self._id = f"{'chatcmpl' if kind == 'chat' else 'cmpl'}-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._echo = bool(getattr(accepted.asked, "echo", False))
        self._silent = accepted.asked.max_tokens == 0  # the prompt only
        self._spellings: dict[int, Spelling] = {}
        self._finders: dict[int, CallFinder] = {}

    def whole(self, answers: Sequence[Answer], choices: Sequence[Sequence[Piece]], usage: dict[str, Any]) -> dict[str, Any]:
        """Return the complete response.

        Args:
            answers: the answer of each choice.
            choices: the pieces of each choice.
            usage: the object that :func:`usage` returns.
        """
        written = []
        for index, (answer, pieces) in enumerate(zip(answers, choices, strict=True)):
            text = "" if self._silent else "".join(piece.text for piece in pieces)
            text, calls = self._divide(index, text, last=True)
            if self._kind == "chat":
                called = [{name: value for name, value in call.items() if name != "index"} for call in calls]
                content = {"role": "assistant", "content": text if text or not calls else None, "refusal": None}
                choice: dict[str, Any] = {"message": {**content, **({"tool_calls": called} if called else {})}}
            else:
                choice = {"text": self._prompt(index) + text}
            written.append({"index": index, **choice, **self._ending(index, pieces, answer.request)})
        kind = "chat.completion" if self._kind == "chat" else "text_completion"
        return {**self._frame(kind), "choices": written, "usage": usage}

    def part(self, index: int, piece: Piece, first: Request | None) -> dict[str, Any] | None:
        """Return the chunk of a streamed response for one piece of choice number ``index``; None for no chunk.

        Args:
            index: number of the choice.
            piece: its next piece.
            first: the engine's request, if this is the choice's first piece.
        """
        text, calls = self._divide(index, "" if self._silent else piece.text, last=piece.finish is not None)
        if self._kind == "chat":
            if not (text or calls or piece.finish or piece.logprob or first):
                return None
            delta = {**({"role": "assistant"} if first else {}), **({"tool_calls": calls} if calls else {})}
            if text or not calls:
                delta["content"] = text
            choice = {"index": index, "delta": delta, **self._ending(index, [piece])}
            return {**self._frame("chat.completion.chunk"), "choices": [choice]}
        text = (self._prompt(index) if first else "") + text
        return {
            **self._frame("text_completion"),
            "choices": [{"index": index, "text": text, **self._ending(index, [piece], first)}],
        }

    def last(self, usage: dict[str, Any]) -> dict[str, Any]:
        """Return the last chunk of a streamed response, which has the usage."""
        return {
            **self._frame("chat.completion.chunk" if self._kind == "chat" else "text_completion"),
            "choices": [],
            "usage": usage,
        }

    def _frame(self, kind: str) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self._created, "model": self._model}

    def _prompt(self, index: int) -> str:
        """Return the prompt of a choice, if it is to be repeated."""
        if not self._echo:
            return ""
        given = self._accepted.asked.prompt[index // self._accepted.asked.n]
        return given if isinstance(given, str) else str(self._tokenizer.decode(given))

    def _divide(self, index: int, text: str, *, last: bool) -> tuple[str, list[dict[str, Any]]]:
        """Return the content and the tool calls that a choice has with a new piece of text."""
        if self._accepted.dialect is None:
            return text, []
        return self._finders.setdefault(index, CallFinder(self._accepted.dialect)).add(text, last)

    def _ending(self, index: int, pieces: Sequence[Piece], begun: Request | None = None) -> dict[str, Any]:
        """Return why a choice ends, and the log probabilities: of the prompt too, if the choice begins and repeats it."""
        finish: str | None = pieces[-1].finish
        if finish == "stop" and index in self._finders and self._finders[index].calls:
            finish = "tool_calls"
        known: list[tuple[int, Logprob | None]] = []
        if self._echo and begun is not None and self._accepted.asked.num_logprobs is not None:
            known += zip(begun.prompt, [None, *begun.prompt_logprob], strict=True)
        if not self._silent:
            known += [(one.token, one.logprob) for one in pieces if one.token is not None and one.logprob is not None]
        spelling = self._spellings.setdefault(index, Spelling(self._tokenizer, self._accepted))
        logprobs = (spelling.chat if self._kind == "chat" else spelling.text)(known) if known else None  # type: ignore[arg-type]
        return {"finish_reason": finish, "logprobs": logprobs}


def written(value: dict[str, Any]) -> str:
    """Return JSON, written part by part, so that other threads get their turns; ``json.dumps`` stops them all meanwhile."""
    return "".join(_ENCODER.iterencode(value))


def usage(prompt_tokens: int, cached_tokens: int, answer_tokens: int) -> dict[str, Any]:
    """Return the usage object of a response."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": answer_tokens,
        "total_tokens": prompt_tokens + answer_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
    }


def failure(message: str, kind: str = "invalid_request_error", param: str | None = None) -> dict[str, Any]:
    """Return the object of an error.

    Args:
        message: what is wrong, where, and the way out.
        kind: OpenAI's name for the kind of error.
        param: the field of the request that is wrong.
    """
    return {"error": {"message": message, "type": kind, "param": param, "code": None}}
