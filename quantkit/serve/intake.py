"""Read requests: everything about them is bounded before work is done, and the event loop never waits for it.

Decoding a megabyte of JSON, filling in a chat template and splitting text into tokens takes seconds at worst. It is done on
threads of its own, so that the server answers other clients meanwhile; ``tokenizers`` releases the interpreter's lock.
"""

import asyncio
import functools
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from pydantic_core import from_json
from starlette.requests import Request

from quantkit.errors import QuantkitError
from quantkit.generation.text import encode_prompt
from quantkit.serve.wire import BadField, Chat, Completion, Generating, parse

QUICK_BYTES = 64 << 10
"""Larger bodies have a thread of their own, so that others do not wait for them."""
BUSY_BYTES = 64 << 20
"""Most bytes of requests that are being read or wait for a thread."""
BODY_S = 30.0
"""Longest time that a client may take to send a body."""
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


class Intake:
    """Turns bodies into requests, and prompts into tokens.

    Args:
        tokenizer: the model's tokenizer.
        context_tokens: longest prompt and answer together.
        body_bytes: largest body.
        answers: most answers to one request.
    """

    def __init__(self, tokenizer: Any, context_tokens: int, body_bytes: int, answers: int) -> None:
        self._tokenizer, self._context = tokenizer, context_tokens
        self._body_bytes, self._answers = body_bytes, answers
        self._bytes = 0  # of requests that are being read or wait for a thread
        self._quick, self._slow = (ThreadPoolExecutor(1, f"quantkit-intake-{name}") for name in ("quick", "slow"))
        tokenizer("a")  # the first use may change settings, which is not safe while another thread uses them

    def close(self) -> None:
        """End the threads after their current work."""
        for threads in (self._quick, self._slow):
            threads.shutdown(wait=False, cancel_futures=True)

    async def read(self, request: Request, kind: type[Generating]) -> tuple[Any, list[list[int]]]:
        """Return a request, and the token ids of its prompts.

        Args:
            request: the request.
            kind: what its body is.

        Raises:
            Refused: a body that is too large, too slow or invalid, or a server with too much to read.
            QuantkitError: a prompt that is not text, too long for the model, or refused by its chat template.
        """
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

    def _decode(self, body: bytes, kind: type[Generating]) -> tuple[Any, list[list[int]]]:
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
        return asked, self._encode(asked)

    def _encode(self, asked: Completion | Chat) -> list[list[int]]:
        if isinstance(asked, Chat):
            messages = [message.plain() for message in asked.messages]
            self._check_length(*(message["content"] for message in messages))
            if any("tool_calls" in message for message in messages) and "tool_calls" not in str(self._tokenizer.chat_template):
                raise Refused(400, "messages: the model's chat template knows no tool calls; leave them out", param="messages")
            return [encode_prompt(messages, self._tokenizer).tolist()]
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
