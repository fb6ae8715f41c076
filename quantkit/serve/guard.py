"""Refuse requests that a web page sends behind its reader's back.

Any page that a browser shows can send requests to programs on the same machine. Three checks keep it out:

- **Origin.** A browser names the page's origin. Pages are refused, except those of origins that the server was told to allow.
- **Host.** A page can give its own domain name the address 127.0.0.1 (DNS rebinding), and then reads answers as if they were
  its own. A server that only listens on a loopback address therefore answers only to names of this machine.
- **Content-Type.** Browsers send ``text/plain`` and forms to any server without asking it first, but not ``application/json``.
  :mod:`quantkit.serve.intake` checks it where there is a body to read.
"""

import ipaddress
from collections.abc import Collection

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from quantkit.errors import QuantkitError
from quantkit.serve.reply import failure

ANY_ORIGIN = "*"


class Guard:
    """ASGI middleware with the checks.

    Args:
        app: the application.
        loopback: the server can only be reached from its own machine, so Host must be a name of it.
        hosts: other names under which such a server may be asked, as behind a proxy.
        origins: origins of pages that may use the server, such as ``http://localhost:3000``; ``"*"`` for all.
    """

    def __init__(self, app: ASGIApp, *, loopback: bool, hosts: Collection[str], origins: Collection[str]) -> None:
        self._app, self._loopback, self._origins = app, loopback, origins
        self._hosts = {host.lower() for host in hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer with 403, or hand the request on."""
        if scope["type"] == "http" and (found := self._reason(Headers(scope=scope))):
            status, message = found
            await JSONResponse(failure(message), status)(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _reason(self, headers: Headers) -> tuple[int, str] | None:
        """Return status and message of a refusal; None for a request that is allowed."""
        for host in headers.getlist("host"):
            if self._loopback and not is_local(host_name(host)) and host_name(host) not in self._hosts:
                return 403, (
                    f"Host is {host[:100]!r}, but this server answers only to names of its own machine; use localhost, or "
                    "allow the name with --allow-host (hosts= in Python)"
                )
        for origin in headers.getlist("origin"):
            if origin not in self._origins and ANY_ORIGIN not in self._origins:
                return 403, (
                    f"pages of {origin[:100]!r} may not use this server; allow them with --allow-origin (or origins= in Python)"
                )
        return None


def host_name(host: str) -> str:
    """Return a Host header without its port: ``[::1]:8000`` is ``::1``."""
    host = host.strip().lower()
    if host.startswith("["):
        name, _, port = host[1:].partition("]")
        return name if not port or port.startswith(":") else host
    return host.partition(":")[0].removesuffix(".")


def is_local(host: str) -> bool:
    """Return whether a host name or address always means this machine."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def check_origins(origins: Collection[str]) -> None:
    """Refuse what no browser sends as an origin.

    Raises:
        QuantkitError: naming the origin and the right form.
    """
    for origin in origins:
        scheme, separator, rest = origin.partition("://")
        if origin != ANY_ORIGIN and not (scheme in ("http", "https") and separator and rest and "/" not in rest):
            raise QuantkitError(
                f"origin {origin!r}: want scheme, host and port as a browser writes them, such as http://localhost:3000, or *"
            )
