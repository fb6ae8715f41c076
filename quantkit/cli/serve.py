"""Commands that serve requests: serve, and trace, which simulates them."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from quantkit.cli import app
from quantkit.cli.bars import progress_bars
from quantkit.cli.console import console, facts, print_json, say, size, table
from quantkit.cli.groups import Opening, Running, values
from quantkit.cli.options import AsJson, Engine, KeysAndValues, Model, engine_options, load
from quantkit.errors import QuantkitError, nearest

if TYPE_CHECKING:
    from quantkit.serve.run import Server

LOCAL = ("127.0.0.1", "localhost", "::1")
BATCHING = ("padded", "static", "continuous")


@app.command()
def serve(
    model: Model,
    host: Annotated[str, typer.Option(help="Address to listen on; the default accepts this machine only.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 chooses a free one.")] = 8000,
    token: Annotated[
        str | None, typer.Option(envvar="QUANTKIT_SERVE_TOKEN", help="Bearer token that clients must send.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name that clients see; default: MODEL.")] = None,
    allow_host: Annotated[
        list[str] | None, typer.Option(help="On a loopback address, answer to this name too, as behind a proxy.")
    ] = None,
    allow_origin: Annotated[
        list[str] | None, typer.Option(help="Let web pages of this origin use the server (http://localhost:3000, or *).")
    ] = None,
    log_requests: Annotated[
        bool, typer.Option("--log-requests", help="Write a line to standard error for each request, without what it says.")
    ] = False,
    grace: Annotated[float, typer.Option(help="Seconds in which answers may go on after Ctrl-C or SIGTERM.")] = 5.0,
    running: Annotated[int, typer.Option(help="Requests that run at the same time; others wait.")] = 16,
    waiting: Annotated[int, typer.Option(help="Requests that may wait; others are refused (429).")] = 1024,
    kv_tokens: Annotated[int | None, typer.Option(help="Tokens of key/value memory; default: at most 1 GiB.")] = None,
    context: Annotated[
        int | None, typer.Option(help="Longest prompt and answer in tokens; default: the model's limit.")
    ] = None,
    *,
    options: Running,
    opening: Opening,
) -> None:
    """Serve a model to OpenAI clients, in one process and for a few users. For many users, use vLLM."""
    from quantkit.engine.request import Limits
    from quantkit.serve.run import check_port, open_server, run_server

    check_port(host, port)
    if log_requests:
        _log_requests()
    opened, tokenizer = load(model, **values(opening))
    limits = Limits(running=running, waiting=waiting, kv_tokens=kv_tokens, context_tokens=context)
    server = open_server(
        opened,
        tokenizer,
        name=name or model,
        host=host,
        port=port,
        token=token,
        limits=limits,
        compute=opening.compute,
        **engine_options(options),
        hosts=allow_host or (),
        origins=allow_origin or (),
        grace_s=grace,
    )
    run_server(server, lambda: _introduce(server, model, name or model, host, guarded=token is not None))


def _log_requests() -> None:
    """Let the server's lines about requests go to standard error."""
    import logging

    logger, handler = logging.getLogger("quantkit.serve.requests"), logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False


def _introduce(server: "Server", model: str, name: str, host: str, *, guarded: bool) -> None:
    """Print where the server is and what it can do, as soon as it answers."""
    runner = server.engine
    limits, shown = runner.limits, f"[{host}]" if ":" in host else host
    facts(
        {
            "address": f"http://{shown}:{server.port}/v1 (model {name})",
            "memory": f"{limits.kv_tokens} tokens of keys and values, {size(runner.backend.bytes_for(runner.memory))}",
            "capacity": f"{limits.running} requests of up to {limits.context_tokens} tokens running, {limits.waiting} waiting",
            "engine": runner.backend.engine,
            "monitoring": "/metrics, /health",
            "many users": f"this is one process on one machine; for many users: vllm serve {model}",
        }
    )
    if runner.backend.notice:
        say(f"note: {runner.backend.notice}; requests run one after another")
    if host not in LOCAL and not guarded:
        say(f"warning: {host} may be reachable from other machines, and no --token is set")
    console().file.flush()  # otherwise a pipe would not show the address while the server runs


@app.command()
def trace(
    model: Model,
    requests: Annotated[int, typer.Option(help="Number of requests.")] = 64,
    rate: Annotated[float | None, typer.Option(help="Mean arrivals per second (Poisson); default: all at the start.")] = None,
    prompt: Annotated[str, typer.Option(help="Tokens of a prompt, LOW:HIGH.")] = "16:64",
    new: Annotated[str, typer.Option(help="Tokens of an answer, LOW:HIGH.")] = "20:300",
    lengths: Annotated[Path | None, typer.Option(help="File with lines 'prompt tokens, new tokens' to use instead.")] = None,
    even: Annotated[bool, typer.Option("--even", help="Uniform lengths; default: log-uniform, most are short.")] = False,
    running: Annotated[int, typer.Option(help="Requests that run at the same time.")] = 8,
    kv: KeysAndValues = "float",
    engine: Engine = "auto",
    batching: Annotated[str, typer.Option(help="Kinds to compare: padded, static, continuous.")] = "padded,continuous",
    price: Annotated[float | None, typer.Option(help="Price of this machine per hour; adds the cost of tokens.")] = None,
    seed: Annotated[int, typer.Option(help="The same seed gives the same requests.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Write the numbers here (JSON).")] = None,
    html: Annotated[Path | None, typer.Option(help="Write a page with plots here.")] = None,
    as_json: AsJson = False,
    *,
    opening: Opening,
) -> None:
    """Simulate requests and measure time to first token, time between tokens and throughput, for several kinds of batching."""
    import math

    from quantkit.engine.request import Limits
    from quantkit.evaluation.trace import poisson_trace, read_lengths, serve_trace
    from quantkit.generation.engine import Engine as Runner
    from quantkit.nn.embedding import input_table
    from quantkit.report import trace_rows, write_trace_html
    from quantkit.system.files import write_json

    opened, _ = load(model, **values(opening))
    arrivals = poisson_trace(
        requests,
        rate_per_s=rate or math.inf,
        prompt_tokens=_range("--prompt", prompt),
        new_tokens=_range("--new", new),
        lengths=read_lengths(lengths) if lengths else None,
        vocabulary=input_table(opened)[0],
        even=even,
        seed=seed,
    )
    longest = max(len(a.prompt) for a in arrivals) + max(a.new_tokens for a in arrivals) + 16
    found = {}
    for kind in _kinds(batching):
        limits = Limits(
            running=running,
            kv_tokens=running * longest,
            waiting=max(requests, 1),
            batching="continuous" if kind == "continuous" else "static",
        )
        runner = Runner(opened, kv=kv, limits=limits, engine=engine, compute=opening.compute)
        with progress_bars() as progress:
            found[kind] = serve_trace(runner, arrivals, padded=kind == "padded", progress=progress)
    pace = f"{rate} arrivals per second" if rate else "all at the start"
    title = f"{requests} requests, {sum(a.new_tokens for a in arrivals)} new tokens, {running} running, {pace}"
    if as_json:
        print_json({kind: one.to_dict() for kind, one in found.items()})
    else:
        table(title, *trace_rows(found, price))
        say(f"energy: {next(iter(found.values())).energy_source}")
    if html is not None:
        write_trace_html(html, found, price=price, title=f"{model}: {title}")
    if out is not None:
        write_json(out, {kind: one.to_dict() for kind, one in found.items()})


def _range(option: str, text: str) -> tuple[int, int]:
    low, _, high = text.partition(":")
    if not (low.isdecimal() and high.isdecimal()):
        raise QuantkitError(f"{option} {text}: want LOW:HIGH, two whole numbers")
    return int(low), int(high)


def _kinds(text: str) -> list[str]:
    kinds = [kind.strip() for kind in text.split(",")]
    for kind in kinds:
        if kind not in BATCHING:
            raise QuantkitError(f"--batching {text}: {nearest(kind, BATCHING)}")
    return kinds
