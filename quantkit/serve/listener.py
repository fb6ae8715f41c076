"""uvicorn's server, with an end that every client hears of, and without clients that only take up room.

When it is told to stop, it takes no new connections and lets answers go on for a while. Those that are still unfinished then
end with an error event, and clients that do not read it are cut off. A second Ctrl-C skips the while, not the event.

A client that asks for a stream and never reads it would keep the whole answer in memory for as long as it stays, and one that
connects and never asks would keep a file descriptor. Both are cut off after a while.
"""

import asyncio
import math
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import uvicorn

from quantkit.serve.worker import Worker

READ_S = 2.0
"""Time in which clients may read the last event, after the answers have been ended."""
HASTY_READ_S = 0.3
"""The same, after a second Ctrl-C."""
TICK_S = 0.05
"""Time between two looks at whether there is haste."""
UNREAD_S = 30.0
"""Longest time that a client may take none of the bytes that wait for it."""
UNASKED_S = 30.0
"""Longest time that a client may take to send the head of a request."""
KEPT_S = 20.0
"""Time that a connection stays open between two requests. Clients keep theirs for 5 s (httpx, and with it OpenAI's) to 15 s.
The client must close first, or its next request may be on its way to a connection that the server has just closed."""
WATCH_S = 1.0
"""Time between two looks at the connections."""
ACCEPTED = 64
"""Most connections that are accepted before those that are open already go on."""
SHUTTING_DOWN = "the server is shutting down"


@dataclass(slots=True)
class _Seen:
    """What a connection was last seen to do: bytes that wait for the client, its latest request, and since when."""

    unread: int
    cycle: Any
    asks: bool
    since_s: float


class Listener(uvicorn.Server):
    """A server for one application.

    Args:
        app: the application.
        worker: what generates its answers.
        grace_s: seconds in which answers may go on after the server has been told to stop.

    Attributes:
        on_started: called as soon as connections are accepted.
    """

    def __init__(self, app: Any, worker: Worker, grace_s: float) -> None:
        graceful_s = round(grace_s + 2 * READ_S)
        # h11 bounds the head of a request, which other parsers that uvicorn would choose if they are installed do not
        super().__init__(
            uvicorn.Config(
                app,
                log_level="warning",
                timeout_graceful_shutdown=graceful_s,
                timeout_keep_alive=round(KEPT_S),
                http="h11",
                ws="none",
                backlog=ACCEPTED,
            )
        )
        self._worker, self._grace_s = worker, grace_s
        self._seen: dict[Any, _Seen] = {}
        self._hasty = False
        self.on_started: Callable[[], None] = lambda: None

    async def startup(self, sockets: Any = None) -> None:
        """Start to accept connections."""
        await super().startup(sockets)
        for one in sockets or ():
            one.listen(socket.SOMAXCONN)  # more may wait than asyncio accepts in one go, for which it has the same number
        if self.started:
            self.on_started()

    async def shutdown(self, sockets: Any = None) -> None:
        """Stop to accept connections, and end when all clients have been served."""
        ending = asyncio.ensure_future(self._end_answers())
        try:
            await super().shutdown(sockets)
        finally:
            ending.cancel()

    async def _wait(self, calm_s: float, hasty_s: float) -> None:
        started_s = time.monotonic()
        while time.monotonic() - started_s < (hasty_s if self._hasty else calm_s):
            await asyncio.sleep(TICK_S)

    async def main_loop(self) -> None:
        """Serve until told to stop."""
        watching = asyncio.ensure_future(self._watch())
        try:
            await super().main_loop()
        finally:
            watching.cancel()

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(WATCH_S)
            self._cut_off(time.monotonic())

    def _cut_off(self, now_s: float) -> None:
        """Close the connections of clients that neither read nor ask."""
        connections: list[Any] = [one for one in self.server_state.connections if one.transport is not None]
        self._seen = {one: self._seen[one] for one in connections if one in self._seen}
        for one in connections:
            unread = one.transport.get_write_buffer_size()  # more of an answer may be added to it, up to a limit
            asks = one.cycle is not None and not one.cycle.response_complete
            seen = self._seen.get(one)
            if seen is None or seen.unread != unread or seen.cycle is not one.cycle or seen.asks != asks:
                self._seen[one] = _Seen(unread, one.cycle, asks, now_s)
            elif now_s - seen.since_s > (UNREAD_S if unread else math.inf if asks else UNASKED_S):
                one.transport.abort()

    def handle_exit(self, sig: int, frame: Any) -> None:
        """Note a signal. uvicorn would leave at a second Ctrl-C, with streams that just break off and tracebacks."""
        self._hasty = self._hasty or (self.should_exit and sig == signal.SIGINT)
        super().handle_exit(sig, frame)
        self.force_exit = False

    async def _end_answers(self) -> None:
        await self._wait(self._grace_s, 0.0)
        self._worker.finish_all(SHUTTING_DOWN)
        await self._wait(READ_S, HASTY_READ_S)
        for connection in list(self.server_state.connections):
            if connection.transport is not None:
                connection.transport.abort()
