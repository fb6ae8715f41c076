"""The engine on a thread of its own: the event loop asks, the thread steps, pieces of answers come back.

The engine is used by this thread only. Everything from outside is a function put into a queue and run between two steps;
answers go to ``asyncio`` queues through the loop's thread-safe door.
"""

import asyncio
import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

from quantkit.engine.engine import TokenEngine
from quantkit.engine.request import Event, FinishReason, Logprob, Request
from quantkit.errors import QuantkitError
from quantkit.generation.text import TextStream
from quantkit.serve.metrics import Histogram

logger = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Piece:
    """What one token added to an answer.

    Attributes:
        text: new text, which may be empty: a character or a stop string may need more tokens.
        token: its id; None for an end without a token.
        finish: why the answer ends here, or None.
        logprob: of the token, if asked for.
        error: what went wrong, if the reason is ``"error"``.
    """

    text: str
    token: int | None
    finish: FinishReason | None
    logprob: Logprob | None = None
    error: str | None = None


@dataclass(eq=False, slots=True)
class Answer:
    """An answer in the making: ``async for piece in answer.pieces()``."""

    request: Request
    text: TextStream
    loop: asyncio.AbstractEventLoop
    inbox: "asyncio.Queue[Piece]"
    fresh: list[str]
    last_s: float
    told_tokens: int = 0

    async def pieces(self) -> Any:
        """Yield pieces until the last one, which has a reason."""
        while True:
            piece = await self.inbox.get()
            yield piece
            if piece.finish:
                return


class Worker:
    """Run an engine until it is closed.

    Args:
        engine: used by nobody else from now on.
        tokenizer: turns tokens into text.

    Attributes:
        first_token_s, token_s: times from submission to the first token, and from token to token.
        prompt_tokens: tokens of all prompts accepted.
        failures: steps that raised.
    """

    def __init__(self, engine: TokenEngine, tokenizer: Any) -> None:
        self.engine, self.tokenizer = engine, tokenizer
        self.first_token_s = Histogram(0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
        self.token_s = Histogram(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
        self.prompt_tokens = self.failures = 0
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._answers: dict[Request, Answer] = {}
        self._closing = threading.Lock()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="quantkit-engine", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    def close(self) -> None:
        """Stop after the current step; unfinished answers end as cancelled."""
        self._calls.put(None)
        self._thread.join()

    def call(self, function: Callable[[], T]) -> "Future[T]":
        """Run ``function`` on the engine's thread, between two steps; once the worker is closed, fail instead."""
        future: Future[T] = Future()

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                if self._closed:
                    raise QuantkitError("the engine is closed")
                future.set_result(function())
            except Exception as error:
                future.set_exception(error)

        with self._closing:
            if not self._closed:
                self._calls.put(run)
                return future
        run()
        return future

    async def submit(
        self, prompts: Sequence[Sequence[int]], stops: Sequence[str], options: Sequence[dict[str, Any]]
    ) -> list[Answer]:
        """Submit prompts together, all or none; return their answers.

        Args:
            prompts: token ids.
            stops: stop strings.
            options: keyword arguments of :meth:`~quantkit.engine.engine.TokenEngine.submit`, for each prompt.

        Raises:
            QuantkitError: one of them is refused.
        """
        loop = asyncio.get_running_loop()
        future = self.call(lambda: self._admit(prompts, stops, options, loop))
        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            future.add_done_callback(self._abandon)
            raise

    def cancel(self, answers: Sequence[Answer]) -> None:
        """Take unfinished answers back; nobody listens any more."""

        def cancel() -> None:
            for answer in answers:
                self.engine.cancel(answer.request)

        self._calls.put(cancel)

    def _abandon(self, future: "Future[list[Answer]]") -> None:
        """Cancel what was admitted for somebody who has left meanwhile."""
        if not future.cancelled() and future.exception() is None:
            self.cancel(future.result())

    def _admit(
        self,
        prompts: Sequence[Sequence[int]],
        stops: Sequence[str],
        options: Sequence[dict[str, Any]],
        loop: asyncio.AbstractEventLoop,
    ) -> list[Answer]:
        admitted: list[Answer] = []
        try:
            for ids, one in zip(prompts, options, strict=True):
                fresh: list[str] = []
                text = TextStream(self.tokenizer, stops, fresh.append)
                request = self.engine.submit(ids, watch=text.add, **one)
                answer = Answer(request, text, loop, asyncio.Queue(), fresh, time.perf_counter())
                self._answers[request] = answer
                admitted.append(answer)
        except QuantkitError:
            for answer in admitted:
                self.engine.cancel(answer.request)
            raise
        self.prompt_tokens += sum(len(ids) for ids in prompts)
        return admitted

    def _run(self) -> None:
        while True:
            try:  # wait only when there is nothing to do
                call = self._calls.get(block=not self.engine.busy)
            except queue.Empty:
                self._step()
                continue
            if call is None:
                break
            call()
        for request in list(self._answers):
            self.engine.cancel(request)
        self._step()
        with self._closing:  # from here on nothing is put into the queue; what is there hears that it came too late
            self._closed = True
        while not self._calls.empty():
            if late := self._calls.get():
                late()

    def _step(self) -> None:
        try:
            events = self.engine.step()
        except Exception as error:
            logger.exception("a step failed; its requests end with an error")
            self.failures += 1
            message = f"the model failed: {type(error).__name__}: {error}"
            for request, answer in list(self._answers.items()):
                self.engine.cancel(request)
                self._send(answer, Piece("", None, "error", error=message))
            self._answers.clear()
            return
        for event in events:
            if event.request in self._answers:
                self._report(self._answers[event.request], event)

    def _report(self, answer: Answer, event: Event) -> None:
        if event.token is not None:
            now = event.request.token_s[-1]
            (self.token_s if answer.told_tokens else self.first_token_s).observe(now - answer.last_s)
            answer.last_s = now
            answer.told_tokens += 1
        if event.finish:
            answer.text.finish()
            del self._answers[event.request]
        text = "".join(answer.fresh)
        answer.fresh.clear()
        error = None if event.request.error is None else str(event.request.error)
        self._send(answer, Piece(text, event.token, event.finish, event.logprob, error))

    def _send(self, answer: Answer, piece: Piece) -> None:
        try:
            answer.loop.call_soon_threadsafe(answer.inbox.put_nowait, piece)
        except RuntimeError:  # the loop is closed: the server is going down
            logger.debug("nobody is left to hear about request %d", answer.request.number)
