"""uvicorn's server, with an end that every client hears of.

When it is told to stop, it takes no new connections and lets answers go on for a while. Those that are still unfinished then
end with an error event, and clients that do not read it are cut off.
"""

import asyncio
from collections.abc import Callable
from typing import Any

import uvicorn

from quantkit.serve.worker import Worker

READ_S = 2.0
"""Time in which clients may read the last event, after the answers have been ended."""
SHUTTING_DOWN = "the server is shutting down"


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
        super().__init__(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=round(grace_s + 2 * READ_S)))
        self._worker, self._grace_s = worker, grace_s
        self.on_started: Callable[[], None] = lambda: None

    async def startup(self, sockets: Any = None) -> None:
        """Start to accept connections."""
        await super().startup(sockets)
        if self.started:
            self.on_started()

    async def shutdown(self, sockets: Any = None) -> None:
        """Stop to accept connections, and end when all clients have been served."""
        ending = asyncio.ensure_future(self._end_answers())
        try:
            await super().shutdown(sockets)
        finally:
            ending.cancel()

    async def _end_answers(self) -> None:
        await asyncio.sleep(self._grace_s)
        self._worker.finish_all(SHUTTING_DOWN)
        await asyncio.sleep(READ_S)
        for connection in list(self.server_state.connections):
            if connection.transport is not None:
                connection.transport.abort()
