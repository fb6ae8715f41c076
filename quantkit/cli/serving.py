"""Commands that answer requests: serve."""

from typing import Annotated

import typer

from quantkit.cli import app
from quantkit.cli.show import facts, say, size

LOCAL = ("127.0.0.1", "localhost", "::1")


@app.command()
def serve(
    model: Annotated[str, typer.Argument(help="Checkpoint directory, float model, hub id, or demo.")],
    host: Annotated[str, typer.Option(help="Address to listen on; the default is this machine only.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes a free one.")] = 8000,
    token: Annotated[
        str | None, typer.Option(envvar="QUANTKIT_SERVE_TOKEN", help="Bearer token that clients must send.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name that clients see; default: MODEL.")] = None,
    kv: Annotated[str, typer.Option(help="Keys and values: float, int8 or int4.")] = "float",
    drafter: Annotated[str | None, typer.Option(help="Guess ahead: ngram, or a smaller model's path.")] = None,
    running: Annotated[int, typer.Option(help="Requests that run at once; more wait.")] = 16,
    waiting: Annotated[int, typer.Option(help="Requests that may wait; more are refused (429).")] = 1024,
    kv_tokens: Annotated[int | None, typer.Option(help="Tokens of key/value memory; default: what fits into 1 GiB.")] = None,
    context: Annotated[int | None, typer.Option(help="Longest prompt and answer; default: the model's limit.")] = None,
) -> None:
    """Serve a model to OpenAI clients: one process, for you and a few others. A fleet belongs on vLLM."""
    from quantkit.engine.request import Limits
    from quantkit.models import open_model
    from quantkit.serve.run import open_server, run_server

    opened, tokenizer = open_model(model)
    limits = Limits(running=running, waiting=waiting, kv_tokens=kv_tokens, context_tokens=context)
    draft = open_model(drafter)[0] if drafter not in (None, "ngram") else drafter  # type: ignore[arg-type]
    server = open_server(
        opened, tokenizer, name=name or model, host=host, port=port, token=token, kv=kv, drafter=draft, limits=limits
    )
    engine = server.engine
    facts(
        {
            "address": f"http://{host}:{server.port}/v1 (model {name or model})",
            "memory": f"{engine.limits.kv_tokens} tokens of keys and values, {size(engine.backend.bytes_for(engine.memory))}",
            "at once": f"{running} requests of up to {engine.limits.context_tokens} tokens, {waiting} waiting",
            "watch": "/metrics, /health",
            "fleet": f"this is one process on one machine; for many users: vllm serve {model}",
        }
    )
    if engine.backend.notice:
        say(f"note: {engine.backend.notice}; requests run one after another")
    if host not in LOCAL and token is None:
        say(f"warning: {host} may be reachable by others, and no --token is set")
    run_server(server)
