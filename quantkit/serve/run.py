"""Create a server for a model and run it."""

import ipaddress
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Unpack, cast

from torch import nn

from quantkit.engine.engine import TokenEngine
from quantkit.engine.request import Limits
from quantkit.errors import QuantkitError
from quantkit.generation.engine import Engine
from quantkit.generation.generate import end_tokens
from quantkit.generation.options import DrafterChoice, EngineOptions
from quantkit.system.turns import short_turns

BACKLOG = 2048
"""Connections that may wait to be accepted."""
GRACE_S = 5.0
"""Default of :class:`ServerOptions`."""


class ServerOptions(EngineOptions, total=False):
    """More options of :func:`open_server`; ``kv``, ``engine``, ``compute`` and ``batch_invariant`` are those of the engine.

    Attributes:
        hosts: names under which a server on a loopback address may be asked besides those of this machine, as behind a proxy;
            none by default.
        origins: origins of web pages that may use the server, such as ``http://localhost:3000``, or ``"*"`` for all;
            none by default.
        grace_s: seconds in which answers may go on after the server has been told to stop; then they end with an error. 5 by
            default.
    """

    hosts: Sequence[str]
    origins: Sequence[str]
    grace_s: float


@dataclass(frozen=True, slots=True)
class Server:
    """A server that is ready to run.

    Attributes:
        engine: the engine; it runs on a thread of its own already, so use it for reading only.
        port: the port of ``socket``.
        runner: ``uvicorn.Server``; ``run(sockets=[...])`` runs it, and setting ``should_exit`` stops it.
        socket: the socket, which listens already: clients that connect before the server runs wait.
    """

    engine: TokenEngine
    port: int
    runner: Any
    socket: socket.socket


def open_server(
    model: nn.Module,
    tokenizer: Any,
    *,
    name: str = "quantkit",
    host: str = "127.0.0.1",
    port: int = 8000,
    token: str | None = None,
    limits: Limits | None = None,
    drafter: DrafterChoice = None,
    **options: Unpack[ServerOptions],
) -> Server:
    """Create an engine and a server for it, and listen on the port.

    Args:
        model: a causal language model of transformers.
        tokenizer: its tokenizer.
        name: name of the model for clients.
        host: address to listen on; by default only this machine can connect.
        port: port to listen on; 0 chooses a free one.
        token: bearer token that clients must send; None for none.
        limits, drafter: see :class:`quantkit.Engine`.
        **options: see :class:`ServerOptions`.

    Raises:
        QuantkitError: the extra ``serve`` is not installed, there is no tokenizer, the port is in use, or an option is refused
            by :class:`quantkit.Engine`.
    """
    try:
        from quantkit.serve.app import ServerSettings, make_app
        from quantkit.serve.guard import check_origins
        from quantkit.serve.listener import Listener
    except ImportError as error:
        raise QuantkitError(f"serving needs {error.name}: pip install 'quantkit[serve]'") from error
    if tokenizer is None:
        raise QuantkitError("a server needs a tokenizer, and the model has none; add tokenizer files to its directory")
    origins, grace_s = tuple(options.pop("origins", ())), options.pop("grace_s", GRACE_S)
    hosts = tuple(options.pop("hosts", ()))
    check_origins(origins)
    bound = _listen(host, port)  # before the engine takes its memory
    try:
        engine = Engine(model, limits=limits, drafter=drafter, **cast(EngineOptions, options))
        address, number, *_ = bound.getsockname()
        loopback = ipaddress.ip_address(address.partition("%")[0]).is_loopback
        settings = ServerSettings(name, frozenset(end_tokens(model)), token, loopback, hosts, origins)
        app = make_app(engine, tokenizer, settings)
    except BaseException:
        bound.close()
        raise
    return Server(engine, number, Listener(app, app.state.worker, grace_s), bound)


def run_server(server: Server, started: Callable[[], None] | None = None) -> None:
    """Serve requests until interrupted.

    Args:
        server: what :func:`open_server` returned.
        started: called as soon as requests are answered.
    """
    if started is not None:
        server.runner.on_started = started
    with short_turns():
        server.runner.run(sockets=[server.socket])


def check_port(host: str, port: int) -> None:
    """Refuse a port that is in use, before a model is loaded.

    Raises:
        QuantkitError: see :func:`open_server`.
    """
    _listen(host, port).close()


def _listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens.

    Raises:
        QuantkitError: the port is in use, not allowed or out of range, or the host is not an address of this machine.
    """
    where, way_out = f"cannot listen on {host}:{port}", "give another --host or --port"
    if not 0 <= port < 1 << 16:
        raise QuantkitError(f"{where}: a port is a number from 0 to 65535; {way_out}")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio sends small pieces at once (TCP_NODELAY) only where the protocol is named: else each waits 40 ms for its turn
    bound = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
        bound.listen(BACKLOG)
    except (OSError, UnicodeError) as error:  # a name that is no name fails to be encoded
        bound.close()
        raise QuantkitError(f"{where}: {getattr(error, 'strerror', None) or error}; {way_out}") from error
    return bound
