"""The formats of responses in OpenAI's API: complete, as chunks of a stream, and errors."""

import time
import uuid
from collections.abc import Sequence
from typing import Any, Literal

from quantkit.engine.request import Logprob
from quantkit.serve.worker import Piece

Kind = Literal["chat", "text"]


class Reply:
    """Formats the response to one request, complete or streamed.

    Args:
        kind: ``"chat"`` or ``"text"``.
        model: name of the model.
        tokenizer: converts tokens to text, for log probabilities.
    """

    def __init__(self, kind: Kind, model: str, tokenizer: Any) -> None:
        self._kind, self._model, self._tokenizer = kind, model, tokenizer
        self._id = f"{'chatcmpl' if kind == 'chat' else 'cmpl'}-{uuid.uuid4().hex}"
        self._created = int(time.time())

    def whole(self, choices: Sequence[Sequence[Piece]], usage: dict[str, Any]) -> dict[str, Any]:
        """Return the complete response.

        Args:
            choices: the pieces of each choice.
            usage: the object that :func:`usage` returns.
        """
        written = []
        for index, pieces in enumerate(choices):
            text = "".join(piece.text for piece in pieces)
            message = {"role": "assistant", "content": text, "refusal": None}
            content = {"message": message} if self._kind == "chat" else {"text": text}
            written.append({"index": index, **content, **self._ending(pieces)})
        kind = "chat.completion" if self._kind == "chat" else "text_completion"
        return {**self._frame(kind), "choices": written, "usage": usage}

    def part(self, index: int, piece: Piece, first: bool) -> dict[str, Any]:
        """Return the chunk of a streamed response for one piece of choice number ``index``."""
        if self._kind == "chat":
            delta = {**({"role": "assistant"} if first else {}), "content": piece.text}
            choice = {"index": index, "delta": delta, **self._ending([piece])}
            return {**self._frame("chat.completion.chunk"), "choices": [choice]}
        return {**self._frame("text_completion"), "choices": [{"index": index, "text": piece.text, **self._ending([piece])}]}

    def last(self, usage: dict[str, Any]) -> dict[str, Any]:
        """Return the last chunk of a streamed response, which has the usage."""
        return {
            **self._frame("chat.completion.chunk" if self._kind == "chat" else "text_completion"),
            "choices": [],
            "usage": usage,
        }

    def _frame(self, kind: str) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self._created, "model": self._model}

    def _ending(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        found = [(piece.token, piece.logprob) for piece in pieces if piece.token is not None and piece.logprob is not None]
        return {"finish_reason": pieces[-1].finish, "logprobs": self._logprobs(found) if found else None}

    def _logprobs(self, known: Sequence[tuple[int, Logprob]]) -> dict[str, Any]:
        spell = lambda token: self._tokenizer.decode([token])  # noqa: E731
        if self._kind == "chat":
            entry = lambda token, logprob: {  # noqa: E731
                "token": spell(token), "logprob": logprob, "bytes": list(spell(token).encode()),
            }  # fmt: skip
            rows = [
                {**entry(token, found.logprob), "top_logprobs": [entry(*pair) for pair in found.top]} for token, found in known
            ]
            return {"content": rows}
        return {
            "tokens": [spell(token) for token, _ in known],
            "token_logprobs": [found.logprob for _, found in known],
            "top_logprobs": [{spell(token): logprob for token, logprob in found.top} for _, found in known],
        }


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
