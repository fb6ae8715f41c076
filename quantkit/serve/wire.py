"""The formats of requests and responses in OpenAI's API.

A field that quantkit does not know or does not support is an error that names the field. It is never ignored, because a client
that requests a tool call or a penalty must not get something else. Fields for accounting only (``user``, ``metadata``) are
accepted.
"""

import time
import uuid
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from quantkit.engine.request import Logprob
from quantkit.engine.sampling import Sampling
from quantkit.errors import QuantkitError, nearest
from quantkit.serve.worker import Piece


class StreamOptions(BaseModel):
    """Options of a streamed response."""

    model_config = ConfigDict(extra="forbid", strict=True)
    include_usage: bool = False


class Generating(BaseModel):
    """The fields that both kinds of request have. Those after ``frequency_penalty`` are extensions of vLLM."""

    model_config = ConfigDict(extra="forbid", strict=True)
    model: str | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    n: Annotated[int, Field(ge=1, le=16)] = 1
    stop: str | list[str] | None = None
    seed: Annotated[int, Field(ge=0)] | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    user: str | None = None
    metadata: dict[str, str] | None = None
    presence_penalty: Annotated[float, Field(ge=0, le=0)] | None = 0
    frequency_penalty: Annotated[float, Field(ge=0, le=0)] | None = 0
    top_k: Annotated[int, Field(ge=1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0)] = 1.0
    min_tokens: Annotated[int, Field(ge=0)] = 0
    ignore_eos: bool = False

    def sampling(self, choice: int) -> Sampling:
        """Return the sampling parameters of choice number ``choice``; each choice of a request has a seed of its own."""
        seed = None if self.seed is None else (self.seed + choice) % 2**63
        if self.temperature == 0:  # greedy decoding: filters have no effect
            return Sampling(repetition_penalty=self.repetition_penalty, seed=seed)
        top_p = None if self.top_p == 1 else self.top_p
        return Sampling(self.temperature, self.top_k, top_p, self.min_p, self.repetition_penalty, seed)

    @property
    def stops(self) -> list[str]:
        """The stop strings.

        Raises:
            QuantkitError: one of them is empty.
        """
        found = [self.stop] if isinstance(self.stop, str) else self.stop or []
        if "" in found:
            raise QuantkitError("stop: an empty string would end every answer; leave it out")
        return found

    @property
    def num_logprobs(self) -> int | None:
        """Number of alternatives whose log probabilities are requested; None for no log probabilities."""
        raise NotImplementedError


class Completion(Generating):
    """A request to /v1/completions."""

    prompt: str | list[int] | list[str] | list[list[int]]
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: Literal[False] | None = False
    suffix: None = None
    best_of: Literal[1] | None = None

    @property
    def num_logprobs(self) -> int | None:
        """See :class:`Generating`."""
        return self.logprobs

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts as a list."""
        if isinstance(self.prompt, str) or all(isinstance(one, int) for one in self.prompt):
            return [self.prompt]  # type: ignore[list-item]
        return list(self.prompt)  # type: ignore[arg-type]


class TextPart(BaseModel):
    """A part of a message; only text is supported."""

    model_config = ConfigDict(extra="forbid", strict=True)
    type: Literal["text"]
    text: str


class Message(BaseModel):
    """One message of a chat."""

    model_config = ConfigDict(extra="forbid", strict=True)
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None

    def plain(self) -> dict[str, str]:
        """Return the message in the form that chat templates use."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class Chat(Generating):
    """A request to /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @property
    def num_logprobs(self) -> int | None:
        """See :class:`Generating`."""
        return (self.top_logprobs or 0) if self.logprobs else None


def explain(error: ValidationError, kind: type[Generating]) -> tuple[str, str]:
    """Return the name of the first invalid field, and a sentence that says what is wrong."""
    first = error.errors(include_url=False)[0]
    where = ".".join(str(part) for part in first["loc"]) or "body"
    if first["type"] == "extra_forbidden":
        return where, f"{where}: quantkit does not know this field; {nearest(where, kind.model_fields)}"
    given = repr(first["input"])
    return where, f"{where}: {first['msg']}; got {given if len(given) < 80 else given[:77] + '...'}"


class Reply:
    """Formats the response to one request, complete or streamed.

    Args:
        kind: ``"chat"`` or ``"text"``.
        model: name of the model.
        tokenizer: converts tokens to text, for log probabilities.
    """

    def __init__(self, kind: Literal["chat", "text"], model: str, tokenizer: Any) -> None:
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
            content = {"message": {"role": "assistant", "content": text}} if self._kind == "chat" else {"text": text}
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
