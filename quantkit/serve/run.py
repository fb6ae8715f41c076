"""Create a server for a model and run it."""

import socket
from dataclasses import dataclass
from typing import Any, Unpack

from torch import nn

from quantkit.engine.engine import TokenEngine
from quantkit.engine.request import Limits
from quantkit.errors import QuantkitError
from quantkit.generation.engine import Engine
from quantkit.generation.generate import end_tokens
from quantkit.generation.options import DrafterChoice, EngineOptions


@dataclass(frozen=True, slots=True)
class Server:
    """A server that is ready to run.

    Attributes:
        engine: the engine; it runs on a thread of its own already, so use it for reading only.
        port: the port of ``socket``.
        runner: ``uvicorn.Server``; ``run(sockets=[...])`` runs it, and setting ``should_exit`` stops it.
        socket: the bound socket.
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
    **options: Unpack[EngineOptions],
) -> Server:
    """Create an engine and a server for it, and bind the port.

    Args:
        model: a causal language model of transformers.
        tokenizer: its tokenizer.
        name: name of the model for clients.
        host: address to listen on; by default only this machine can connect.
        port: port to listen on; 0 chooses a free one.
        token: bearer token that clients must send; None for none.
        limits, drafter: see :class:`quantkit.Engine`.
        **options: ``kv``, ``engine``, ``compute``, ``batch_invariant``, see :class:`quantkit.Engine`.

    Raises:
        QuantkitError: the extra ``serve`` is not installed, there is no tokenizer, the port is in use, or an option is refused
            by :class:`quantkit.Engine`.
    """
    try:
        import uvicorn

        from quantkit.serve.app import ServerSettings, make_app
    except ImportError as error:
        raise QuantkitError(f"serving needs {error.name}: pip install 'quantkit[serve]'") from error
    if tokenizer is None:
        raise QuantkitError("a server needs a tokenizer, and the model has none; add tokenizer files to its directory")
    engine = Engine(model, limits=limits, drafter=drafter, **options)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
    except OSError as error:
        bound.close()
        raise QuantkitError(f"cannot listen on {host}:{port}: {error.strerror}; give another --host or --port") from error
    settings = ServerSettings(name, frozenset(end_tokens(model)), token)
    app = make_app(engine, tokenizer, settings)
    listener = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=5))
    return Server(engine, bound.getsockname()[1], listener, bound)


def run_server(server: Server) -> None:
    """Serve requests until interrupted."""
    server.runner.run(sockets=[server.socket])
