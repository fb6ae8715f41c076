"""The command that puts a checkpoint into another format: convert."""

import json
from pathlib import Path
from typing import Annotated

import typer

from quantkit.cli import app
from quantkit.cli.console import facts, say
from quantkit.cli.options import AsJson


@app.command()
def convert(
    source: Annotated[str, typer.Argument(help="Directory of a checkpoint, whoever wrote it; or a float model or GGUF file.")],
    to: Annotated[str, typer.Option("--to", help="Format to write; float writes the weights that the codes stand for.")],
    out: Annotated[Path, typer.Option(help="Directory to write to.")],
    lossy: Annotated[
        bool, typer.Option("--lossy", help="Round layers again whose numbers the format does not have, and measure the KL.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a model that is already there.")] = False,
    dtype: Annotated[str | None, typer.Option(help="Dtype of the weights, with --to float or of a float model.")] = None,
    as_json: AsJson = False,
) -> None:
    """Write a checkpoint in another format, number for number the same."""
    from quantkit.pipeline.reformat import reformat

    found = reformat(source, to, out, lossy=lossy, overwrite=overwrite, dtype=dtype)
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    quality = found.get("quality", {})
    facts(
        {
            (
                "already there" if found["already_done"] else "written to"
            ): f"{found['path']}, {found['format']} (from {found['from']})",
            "layers" if found["layers"] else "tensors": f"{found['layers'] or 'all'}, read back and compared bit for bit",
            **({"rounded again": f"{len(found['rounded'])} layers"} if found["rounded"] else {}),
            **({"KL to the source": f"{quality['kl_mean']:.4g} nats per token, {quality['text']}"} if quality else {}),
        }
    )
    if found["rounded"]:
        say(f"note: {found['rounded'][0]} is other numbers than in the source; better quantize the float model again")
