"""Read requests: everything about them is bounded before work is done, and the event loop never waits for it.

Decoding a megabyte of JSON, filling in a chat template and splitting text into tokens takes seconds at worst. It is done on
threads of its own, so that the server answers other clients meanwhile; ``tokenizers`` releases the interpreter's lock.
"""

import asyncio
import functools
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from pydantic_core import from_json
from starlette.requests import Request

from quantkit.errors import QuantkitError
from quantkit.generation.text import encode_prompt
from quantkit.serve.grammar import Grammar, Grammars
from quantkit.serve.tools import Dialect, dialect_of, form_grammar, text_grammar
from quantkit.serve.wire import BadField, Chat, Completion, Generating, parse

QUICK_BYTES = 64 << 10
"""Larger bodies have a thread of their own, so that others do not wait for them."""
BUSY_BYTES = 64 << 20
"""Most bytes of requests that are being read or wait for a thread."""
BODY_S = 30.0
"""Longest time that a client may take to send a body."""
WAITING_FORMS = 32
"""Most requests whose grammars wait to be compiled."""
SHORT_CHARACTERS = 32768
"""Text of up to this many characters is split into tokens at once, so that an error can tell their number."""


class Refused(QuantkitError):
    """A request that is refused.

    Attributes:
        status: HTTP status.
        kind: OpenAI's name for the kind of error.
        param: the field that is wrong, if it is one.
    """

    def __init__(self, status: int, message: str, kind: str = "invalid_request_error", param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.kind, self.param = status, kind, param


@dataclass(frozen=True, slots=True)
class Accepted:
    """A request that has been read.

    Attributes:
        asked: its fields.
        prompts: token ids of its prompts.
        grammar: the form that its answers must have; None for any.
        dialect: how tool calls are written in its answers; None if there can be none.
        forms: a constraint for each answer; empty without a grammar.
        grammars: spells tokens, for log probabilities; None if llguidance cannot read the tokenizer.
    """

    asked: Any
    prompts: list[list[int]]
    grammar: str | None = None
    dialect: Dialect | None = None
    forms: Sequence[Grammar] = ()
    grammars: Grammars | None = None


class Intake:
    """Turns bodies into requests, and prompts into tokens.

    Args:
        tokenizer: the model's tokenizer.
        end_tokens: token ids that end an answer.
        context_tokens: longest prompt and answer together.
        body_bytes: largest body.
        answers: most answers to one request.
    """

    def __init__(self, tokenizer: Any, end_tokens: Sequence[int], context_tokens: int, body_bytes: int, answers: int) -> None:
        self._tokenizer, self._ends, self._context = tokenizer, end_tokens, context_tokens
        self._body_bytes, self._answers = body_bytes, answers
        self._bytes = 0  # of requests that are being read or wait for a thread
        self._quick, self._slow = (ThreadPoolExecutor(1, f"quantkit-intake-{name}") for name in ("quick", "slow"))
        self._compiler, self._compiling = ThreadPoolExecutor(1, "quantkit-intake-forms"), 0
        self._grammars, self._no_grammars = self._read_tokenizer()
        tokenizer("a")  # the first use may change settings, which is not safe while another thread uses them

    def close(self) -> None:
        """End the threads after their current work."""
        for threads in (self._quick, self._slow, self._compiler):
            threads.shutdown(wait=False, cancel_futures=True)
        if self._grammars is not None:
            self._grammars.close()

    async def read(self, request: Request, kind: type[Generating]) -> Accepted:
        """Return a request, the token ids of its prompts, and what its answers must look like.

        Args:
            request: the request.
            kind: what its body is.

        Raises:
            Refused: a body that is too large, too slow or invalid, or a server with too much to read.
            QuantkitError: a prompt that is not text, too long for the model, or refused by its chat template; a schema that
                is none, or too complicated.
        """
        accepted = replace(await self._receive(request, kind), grammars=self._grammars)
        if accepted.grammar is None:
            return accepted
        if self._compiling >= WAITING_FORMS:
            raise Refused(429, "too many requests with schemas at once; try again later", "rate_limit_error")
        self._compiling += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._compiler, self._form, accepted)
        finally:
            self._compiling -= 1

    async def _receive(self, request: Request, kind: type[Generating]) -> Accepted:
        media = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if media != "application/json":
            raise Refused(415, f"Content-Type is {media[:100]!r}, want application/json; send that header")
        body, announced = bytearray(), request.headers.get("content-length", "")
        if announced.isdecimal() and int(announced) > self._body_bytes:  # before a client that waits for 100 sends it
            raise self._too_large()
        try:
            async with asyncio.timeout(BODY_S):
                async for chunk in request.stream():
                    body += chunk
                    self._bytes += len(chunk)
                    if len(body) > self._body_bytes:
                        raise self._too_large()
                    if self._bytes > BUSY_BYTES:
                        raise Refused(429, "too many requests at once; try again later", "rate_limit_error")
            threads = self._quick if len(body) <= QUICK_BYTES else self._slow
            return await asyncio.get_running_loop().run_in_executor(threads, self._decode, bytes(body), kind)
        except TimeoutError as error:
            raise Refused(408, f"the body did not arrive within {BODY_S:.0f} s; send it again") from error
        finally:
            self._bytes -= len(body)

    def _too_large(self) -> Refused:
        return Refused(413, f"the body has more than {self._body_bytes} bytes, the limit of this server")

    def _decode(self, body: bytes, kind: type[Generating]) -> Accepted:
        try:
            found = from_json(body)
        except ValueError as error:  # not JSON, not UTF-8, half of a surrogate pair, or nested too deeply
            half = "; an emoji cut in two leaves half of a surrogate pair, which is no character" if "hex" in str(error) else ""
            raise Refused(400, f"the body is not JSON: {error}{half}") from error
        try:
            asked = parse(found, kind)
        except BadField as error:
            raise Refused(400, str(error), param=error.name) from error
        count = (len(asked.prompt) if isinstance(asked, Completion) else 1) * asked.n
        if count > self._answers:
            raise Refused(
                400,
                f"prompt: the request asks for {count} answers, the limit is {self._answers}; send fewer prompts at a time",
                param="prompt",
            )
        dialect, grammar, tools = None, None, getattr(asked, "callable_tools", ())
        schema = asked.response_format.schema_of_answers
        if tools:
            dialect = dialect_of(self._tokenizer.chat_template)
            grammar = form_grammar(dialect, tools, asked.tool_choice, schema, several=asked.parallel_tool_calls)
        elif schema is not None:
            grammar = text_grammar(schema)
        if grammar is not None and asked.min_tokens:
            raise Refused(400, "min_tokens: the form of an answer says when it may end; leave it out", param="min_tokens")
        return Accepted(asked, self._encode(asked), grammar, dialect)

    def _form(self, accepted: Accepted) -> Accepted:
        """Compile the grammar of a request, once for all of its answers."""
        assert accepted.grammar is not None
        known = self._grammars
        if known is None:
            raise QuantkitError(f"answers of a given form need llguidance to read the model's tokenizer: {self._no_grammars}")
        field = "tools" if accepted.dialect else "response_format"
        try:
            forms = [known.constraint(accepted.grammar) for _ in range(len(accepted.prompts) * accepted.asked.n)]
        except QuantkitError as error:
            raise Refused(400, f"{field}: {error}", param=field) from error
        return replace(accepted, forms=forms)

    def _read_tokenizer(self) -> tuple[Grammars | None, str]:
        """Return what compiles grammars, or why nothing does; made before the first request, since it holds up all others."""
        try:
            return Grammars(self._tokenizer, self._ends), ""
        except (QuantkitError, ValueError) as error:  # such a model is served without forms
            return None, str(error)

    def _encode(self, asked: Completion | Chat) -> list[list[int]]:
        if isinstance(asked, Chat):
            messages = [message.plain() for message in asked.messages]
            if any("tool_calls" in message for message in messages) and "tool_calls" not in str(self._tokenizer.chat_template):
                raise Refused(400, "messages: the model's chat template knows no tool calls; leave them out", param="messages")
            tools = [tool.plain() for tool in asked.callable_tools]
            self._check_length(*(message["content"] for message in messages), *(json.dumps(tool) for tool in tools))
            return [encode_prompt(messages, self._tokenizer, tools).tolist()]
        found = []
        for prompt in asked.prompt:
            if isinstance(prompt, str):
                self._check_length(prompt)
                prompt = encode_prompt(prompt, self._tokenizer).tolist()
            found.append(prompt)
        return found

    def _check_length(self, *texts: str) -> None:
        """Refuse text whose characters cannot fit the context, before it is split into tokens."""
        characters = sum(map(len, texts))
        if characters > SHORT_CHARACTERS and characters > self._longest_token * self._context:
            raise Refused(
                400,
                f"the prompt has {characters} characters, more than the {self._context} tokens of this server's context can "
                "stand for; shorten it",
            )

    @functools.cached_property
    def _longest_token(self) -> int:
        return max(map(len, self._tokenizer.get_vocab()), default=1)
