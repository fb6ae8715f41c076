"""Run the engine on a thread of its own, for an asyncio event loop that submits requests and receives answers.

Only this thread uses the engine. Other threads put functions into a queue, which are called between two steps; pieces of
answers are put into ``asyncio`` queues with ``call_soon_threadsafe``.
"""

import asyncio
import logging
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

from quantkit.engine.engine import TokenEngine
from quantkit.engine.request import Event, FinishReason, Logprob, Request
from quantkit.errors import QuantkitError
from quantkit.generation.text import TextStream
from quantkit.serve.metrics import FIRST_TOKEN_S, TOKEN_S, histogram

logger = logging.getLogger(__name__)

T = TypeVar("T")


class Closed(QuantkitError):
    """The engine takes no more requests."""


@dataclass(frozen=True, slots=True)
class Piece:
    """The part of an answer that one token adds.

    Attributes:
        text: new text; empty if a character or a possible stop string is incomplete.
        token: token id; None if the answer ended without one.
        finish: why the answer ends here; None if it continues.
        logprob: log probability of the token, if requested.
        error: the error, if the reason is ``"error"``.
    """

    text: str
    token: int | None
    finish: FinishReason | None
    logprob: Logprob | None = None
    error: str | None = None


@dataclass(eq=False, slots=True)
class Answer:
    """An answer that is being generated; read it with ``async for piece in answer.pieces()``."""

    request: Request
    text: TextStream
    loop: asyncio.AbstractEventLoop
    inbox: "asyncio.Queue[Piece]"
    fresh: list[str]
    last_s: float
    reported_tokens: int = 0

    async def pieces(self) -> AsyncIterator[Piece]:
        """Yield the pieces of the answer; the last one has a finish reason."""
        while True:
            piece = await self.inbox.get()
            yield piece
            if piece.finish:
                return


class Worker:
    """Run an engine on a thread until :meth:`close`.

    Args:
        engine: the engine; only this worker may use it from now on.
        tokenizer: converts tokens to text.

    Attributes:
        first_token_s, token_s: histograms of the time to the first token and of the time between tokens, in seconds.
        prompt_tokens: tokens of all accepted prompts.
        failures: steps that raised an exception.
        closing: no more requests are accepted.
    """

    def __init__(self, engine: TokenEngine, tokenizer: Any) -> None:
        self.engine, self.tokenizer = engine, tokenizer
        self.closing = False
        self.first_token_s = histogram("quantkit_first_token_seconds", "Time from arrival to the first token.", FIRST_TOKEN_S)
        self.token_s = histogram("quantkit_token_seconds", "Time between tokens.", TOKEN_S)
        self.prompt_tokens = self.failures = 0
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._answers: dict[Request, Answer] = {}
        self._closing = threading.Lock()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="quantkit-engine", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether the thread is running."""
        return self._thread.is_alive()

    @property
    def unfinished(self) -> int:
        """Number of answers that are not finished."""
        return len(self._answers)

    def close(self) -> None:
        """Stop the thread after the current step; unfinished answers end with the reason ``"cancelled"``."""
        self._calls.put(None)
        self._thread.join()

    def finish_all(self, reason: str) -> None:
        """End all answers at once, without waiting for the engine's step, and accept no more. Call it on the event loop.

        Args:
            reason: the error that their last piece has.
        """
        self.closing = True
        for answer in self._answers.copy().values():
            answer.inbox.put_nowait(Piece("", None, "cancelled", error=reason))

    def call(self, function: Callable[[], T]) -> "Future[T]":
        """Call ``function`` on the engine's thread between two steps; the future has its result or exception.

        After :meth:`close` the future has a :class:`Closed`.
        """
        future: Future[T] = Future()

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                if self._closed:
                    raise Closed("the engine is closed")
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
        """Submit several prompts, all or none.

        Args:
            prompts: token ids of each prompt.
            stops: stop strings.
            options: keyword arguments of :meth:`~quantkit.engine.engine.TokenEngine.submit` for each prompt.

        Returns:
            The answer to each prompt.

        Raises:
            QuantkitError: the engine refuses one of the prompts.
            Closed: it takes no more requests.
        """
        loop = asyncio.get_running_loop()
        future = self.call(lambda: self._admit(prompts, stops, options, loop))
        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            future.add_done_callback(self._abandon)
            raise

    def cancel(self, answers: Sequence[Answer]) -> None:
        """Cancel the answers that are not finished; the client has disconnected."""

        def cancel() -> None:
            for answer in answers:
                self.engine.cancel(answer.request)

        self._calls.put(cancel)

    def _abandon(self, future: "Future[list[Answer]]") -> None:
        """Cancel the answers of a submission whose client has disconnected meanwhile."""
        if not future.cancelled() and future.exception() is None:
            self.cancel(future.result())

    def _admit(
        self,
        prompts: Sequence[Sequence[int]],
        stops: Sequence[str],
        options: Sequence[dict[str, Any]],
        loop: asyncio.AbstractEventLoop,
    ) -> list[Answer]:
        if self.closing:
            raise Closed("the server is shutting down")
        admitted: list[Answer] = []
        try:
            for ids, one in zip(prompts, options, strict=True):
                fresh: list[str] = []
                text = TextStream(self.tokenizer, stops, fresh.append)
                request = self.engine.submit(ids, watch=text.add, **one)
                answer = Answer(request, text, loop, asyncio.Queue(), fresh, time.perf_counter())
                self._answers[request] = answer
                admitted.append(answer)
        except Exception:
            for answer in admitted:
                self.engine.cancel(answer.request)
            raise
        self.prompt_tokens += sum(len(ids) for ids in prompts)
        return admitted

    def _run(self) -> None:
        while True:
            try:  # wait for a call only if the engine is idle
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
        with self._closing:  # nothing is put into the queue from here on; calls that are in it fail
            self._closed = True
        while not self._calls.empty():
            if late := self._calls.get():
                late()

    def _step(self) -> None:
        try:
            events = self.engine.step()
        except Exception as error:
            logger.exception("a step of the engine failed; all requests end with an error")
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
            (self.token_s if answer.reported_tokens else self.first_token_s).observe(now - answer.last_s)
            answer.last_s = now
            answer.reported_tokens += 1
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
        except RuntimeError:  # the event loop is closed: the server is shutting down
            logger.debug("request %d: the event loop is closed, a piece of its answer is dropped", answer.request.number)
