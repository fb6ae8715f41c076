"""A line in the log for each request, when its answer has been sent: who, what, how it ended, tokens and times. No content.

The lines go to the logger ``quantkit.serve.requests``, with level INFO; nothing is formatted unless somebody listens.
"""

import logging
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

if TYPE_CHECKING:
    from quantkit.serve.worker import Answer

logger = logging.getLogger("quantkit.serve.requests")
NOTE = "quantkit.answers"


def note(request: Request, answers: "Sequence[Answer]") -> None:
    """Remember the answers to a request, for its line."""
    request.scope[NOTE] = answers


class Journal:
    """ASGI middleware that writes the lines.

    Args:
        app: the application.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hand the request on, and write its line afterwards."""
        if scope["type"] != "http" or not logger.isEnabledFor(logging.INFO):
            await self._app(scope, receive, send)
            return
        status, started_s = 499, time.perf_counter()

        async def watch(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, watch)
        finally:
            took_ms = (time.perf_counter() - started_s) * 1000
            client = (scope.get("client") or ["-"])[0]
            what = f"{client} {scope['method']} {scope['path'][:200]!r} {status} {took_ms:.0f} ms"
            logger.info("%s%s", what, _tokens(scope.get(NOTE, ())))


def _tokens(answers: "Sequence[Answer]") -> str:
    """Return what the line says of the answers."""
    if not answers:
        return ""
    requests = [answer.request for answer in answers]
    first = [one.token_s[0] - one.submitted_s for one in requests if one.token_s]
    ends = ",".join(sorted({one.finish_reason or "unfinished" for one in requests}))
    begun = f", first token {min(first) * 1000:.0f} ms" if first else ""
    return f", {len(requests[0].prompt)} + {sum(one.answered for one in requests)} tokens, {ends}{begun}"
