"""From a model to a listening socket."""

import socket
from dataclasses import dataclass
from typing import Any

from torch import nn

from quantkit.engine.drafters import Drafter
from quantkit.engine.engine import TokenEngine
from quantkit.engine.request import Limits
from quantkit.errors import QuantkitError
from quantkit.generation.engine import Engine
from quantkit.generation.generate import end_tokens
from quantkit.spec import KVScheme


@dataclass(frozen=True, slots=True)
class Server:
    """A server that is ready to run.

    Attributes:
        engine: for looking at; its thread runs already.
        port: where it listens.
        runner: ``uvicorn.Server``: ``run(sockets=[...])``; set ``should_exit`` to end it.
        socket: bound and owned by the server.
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
    kv: str | KVScheme = "float",
    drafter: str | nn.Module | Drafter | None = None,
    limits: Limits | None = None,
    engine: str = "auto",
    compute: str = "float",
) -> Server:
    """Make an engine and a server for it, and bind the port.

    Args:
        model: a causal language model of transformers.
        tokenizer: its tokenizer.
        name: of the model, for clients.
        host: address; the default answers this machine only.
        port: 0 takes a free one.
        token: bearer token that clients must send.
        kv, drafter, limits, engine, compute: see :class:`quantkit.Engine`.

    Raises:
        QuantkitError: the extra ``serve`` is not installed, there is no tokenizer, or the port is taken.
    """
    try:
        import uvicorn

        from quantkit.serve.app import ServerSettings, make_app
    except ImportError as error:
        raise QuantkitError(f"serving needs {error.name}: pip install 'quantkit[serve]'") from error
    if tokenizer is None:
        raise QuantkitError("the model has no tokenizer, and a server needs text; put tokenizer files into its directory")
    runner = Engine(model, kv=kv, drafter=drafter, limits=limits, engine=engine, compute=compute)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
    except OSError as error:
        bound.close()
        raise QuantkitError(f"cannot listen on {host}:{port}: {error.strerror}; give another --host or --port") from error
    settings = ServerSettings(name, frozenset(end_tokens(model)), token)
    app = make_app(runner, tokenizer, settings)
    listener = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=5))
    return Server(runner, bound.getsockname()[1], listener, bound)


def run_server(server: Server) -> None:
    """Serve until interrupted."""
    server.runner.run(sockets=[server.socket])
