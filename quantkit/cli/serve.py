"""Commands that answer requests, real or made up: serve, trace."""

from pathlib import Path
from typing import Annotated

import typer

from quantkit.cli import app
from quantkit.cli.console import console, facts, progress_bars, say, size, table
from quantkit.cli.run import ComputeMode, Engine
from quantkit.errors import QuantkitError, nearest

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
    drafter: Annotated[
        str | None, typer.Option(help="Guess ahead: ngram, twin (int8 weights), or a smaller model's path.")
    ] = None,
    running: Annotated[int, typer.Option(help="Requests that run at once; more wait.")] = 16,
    waiting: Annotated[int, typer.Option(help="Requests that may wait; more are refused (429).")] = 1024,
    kv_tokens: Annotated[int | None, typer.Option(help="Tokens of key/value memory; default: what fits into 1 GiB.")] = None,
    context: Annotated[int | None, typer.Option(help="Longest prompt and answer; default: the model's limit.")] = None,
    engine: Engine = "auto",
    compute: ComputeMode = "float",
) -> None:
    """Serve a model to OpenAI clients: one process, for you and a few others. A fleet belongs on vLLM."""
    from quantkit.checkpoint.open import open_model
    from quantkit.engine.request import Limits
    from quantkit.serve.run import open_server, run_server

    opened, tokenizer = open_model(model)
    limits = Limits(running=running, waiting=waiting, kv_tokens=kv_tokens, context_tokens=context)
    draft = open_model(drafter)[0] if drafter not in (None, "ngram", "twin") else drafter  # type: ignore[arg-type]
    server = open_server(
        opened,
        tokenizer,
        name=name or model,
        host=host,
        port=port,
        token=token,
        kv=kv,
        drafter=draft,
        limits=limits,
        engine=engine,
        compute=compute,
    )
    runner = server.engine
    facts(
        {
            "address": f"http://{host}:{server.port}/v1 (model {name or model})",
            "memory": f"{runner.limits.kv_tokens} tokens of keys and values, {size(runner.backend.bytes_for(runner.memory))}",
            "at once": f"{running} requests of up to {runner.limits.context_tokens} tokens, {waiting} waiting",
            "run by": runner.backend.engine,
            "watch": "/metrics, /health",
            "fleet": f"this is one process on one machine; for many users: vllm serve {model}",
        }
    )
    if runner.backend.notice:
        say(f"note: {runner.backend.notice}; requests run one after another")
    if host not in LOCAL and token is None:
        say(f"warning: {host} may be reachable by others, and no --token is set")
    console().file.flush()  # a pipe would hold the address back for as long as the server runs
    run_server(server)


@app.command()
def trace(
    model: Annotated[str, typer.Argument(help="Checkpoint directory, float model, hub id, or demo.")],
    requests: Annotated[int, typer.Option(help="Requests in the trace.")] = 64,
    rate: Annotated[float | None, typer.Option(help="Mean arrivals per second (Poisson); default: all at once.")] = None,
    prompt: Annotated[str, typer.Option(help="Tokens of a prompt, LOW:HIGH.")] = "16:64",
    new: Annotated[str, typer.Option(help="Tokens of an answer, LOW:HIGH.")] = "20:300",
    lengths: Annotated[Path | None, typer.Option(help="File of 'prompt tokens, new tokens' lines, instead.")] = None,
    even: Annotated[bool, typer.Option("--even", help="Uniform lengths; default: log-uniform, most are short.")] = False,
    running: Annotated[int, typer.Option(help="Requests that run at once.")] = 8,
    kv: Annotated[str, typer.Option(help="Keys and values: float, int8 or int4.")] = "float",
    engine: Engine = "auto",
    compute: ComputeMode = "float",
    ways: Annotated[str, typer.Option(help="What to compare: padded, static, continuous.")] = "padded,continuous",
    price: Annotated[float | None, typer.Option(help="Price of this machine per hour: adds the cost of tokens.")] = None,
    seed: int = 0,
    out: Annotated[Path | None, typer.Option(help="Write the numbers here (JSON).")] = None,
    html: Annotated[Path | None, typer.Option(help="Write a page with plots here.")] = None,
) -> None:
    """Serve a made-up trace: time to first token, time between tokens, throughput; static against continuous batching."""
    import math

    from quantkit.checkpoint.open import open_model
    from quantkit.engine.request import Limits
    from quantkit.evaluation.trace import poisson_trace, read_lengths, serve_trace
    from quantkit.generation.engine import Engine as Runner
    from quantkit.nn.embedding import input_table
    from quantkit.report import trace_rows, write_trace_html
    from quantkit.system.files import write_json

    opened, _ = open_model(model)
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
    for way in _ways(ways):
        batching = "continuous" if way == "continuous" else "static"
        limits = Limits(running=running, kv_tokens=running * longest, waiting=max(requests, 1), batching=batching)  # type: ignore[arg-type]
        runner = Runner(opened, kv=kv, limits=limits, engine=engine, compute=compute)
        with progress_bars() as progress:
            found[way] = serve_trace(runner, arrivals, padded=way == "padded", progress=progress)
    pace = f"{rate} per second" if rate else "all at once"
    title = f"{requests} requests, {sum(a.new_tokens for a in arrivals)} new tokens, {running} at a time, {pace}"
    table(title, *trace_rows(found, price))
    if html is not None:
        write_trace_html(html, found, price=price, title=f"{model}: {title}")
    if out is not None:
        write_json(out, {way: one.to_dict() for way, one in found.items()})


def _range(option: str, text: str) -> tuple[int, int]:
    low, _, high = text.partition(":")
    if not (low.isdecimal() and high.isdecimal()):
        raise QuantkitError(f"{option} {text}: want LOW:HIGH, two whole numbers")
    return int(low), int(high)


def _ways(text: str) -> list[str]:
    ways = [way.strip() for way in text.split(",")]
    for way in ways:
        if way not in ("padded", "static", "continuous"):
            raise QuantkitError(f"--ways {text}: {nearest(way, ('padded', 'static', 'continuous'))}")
    return ways
