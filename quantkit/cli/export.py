"""Commands that hand a checkpoint on: export, package, push."""

import json
from pathlib import Path
from typing import Annotated

import typer

from quantkit.cli import app
from quantkit.cli.console import facts, say
from quantkit.cli.options import AsJson


@app.command()
def export(
    source: Annotated[str, typer.Argument(help="Directory of a quantized checkpoint, whoever wrote it.")],
    to: Annotated[str, typer.Option("--to", help="openvino or torch-export; for ONNX and other formats: quantkit convert.")],
    out: Annotated[Path, typer.Option(help="Directory to write to, empty or not there yet.")],
    as_json: AsJson = False,
) -> None:
    """Write a checkpoint as a program of another compiler, run it once and compare its logits."""
    from quantkit.exports import export as write

    found = write(source, to, out)
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    facts({name.replace("_", " "): f"{value:.2g}" if isinstance(value, float) else str(value) for name, value in found.items()})


@app.command()
def package(
    path: Annotated[str, typer.Argument(help="Directory of a quantized checkpoint.")],
    server: Annotated[str, typer.Option("--for", help="vllm, ray, triton or ollama.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files that are already there.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write beside a checkpoint the files with which a server runs it."""
    from quantkit.exports.serving import package as write

    written = [str(file) for file in write(path, server, overwrite=overwrite)]
    if as_json:
        typer.echo(json.dumps(written, indent=2))
        return
    for file in written:
        say(f"written: {file}")


@app.command()
def push(
    path: Annotated[str, typer.Argument(help="Directory of a finished checkpoint.")],
    name: Annotated[str, typer.Argument(help="owner/name of the repository on the hub; made if there is none.")],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch to write to; the main one if none is given.")] = None,
    message: Annotated[str | None, typer.Option(help="Message of the commit.")] = None,
    as_json: AsJson = False,
) -> None:
    """Upload a checkpoint with its card to the Hugging Face hub, after every tensor was compared with its checksum."""
    from quantkit.exports.hub import push_to_hub

    url = push_to_hub(path, name, private=private, revision=revision, message=message)
    if as_json:
        typer.echo(json.dumps({"url": url}))
        return
    say(f"uploaded to {url}")
