"""The command that calibrates and quantizes nothing: collect."""

from pathlib import Path
from typing import Annotated

import typer

from quantkit.cli import app
from quantkit.cli.bars import progress_bars
from quantkit.cli.console import facts
from quantkit.cli.options import Column, Data, Model, Template, TrustRemoteCode


@app.command()
def collect(
    model: Model,
    imatrix: Annotated[Path, typer.Option(help="Importance matrix for llama-quantize --imatrix (a GGUF file).")],
    data: Data = None,
    column: Column = None,
    template: Template = None,
    samples: Annotated[int, typer.Option(help="Windows of calibration text.")] = 128,
    length: Annotated[int, typer.Option(help="Tokens of a window.")] = 512,
    all_experts: Annotated[
        bool, typer.Option("--all-experts", help="Let every expert see every token, so that none is left without.")
    ] = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Run a float model over text and write how large the inputs of its layers are, for llama.cpp."""
    from quantkit.calibrate.data import Calibration
    from quantkit.hf.code import trust_code
    from quantkit.hf.load import load_float
    from quantkit.hf.source import locate
    from quantkit.pipeline import quantize as pipeline
    from quantkit.pipeline.imatrix import save_imatrix
    from quantkit.pipeline.settings import Run

    if trust_remote_code:
        trust_code(model)
    loaded, tokenizer = load_float(locate(model))
    calibration = Calibration(data, samples=samples, length=length, column=column, template=template, all_experts=all_experts)
    with progress_bars() as progress:
        found, _ = pipeline.collect(
            loaded, ("mean_square",), calibration=calibration, run=Run(progress=progress), tokenizer=tokenizer
        )
    save_imatrix(imatrix, loaded, found, length=length, source=Path(data).name if data else "text")
    unseen = sum(count == 0 for one in found.values() for count in one.tokens)
    facts({"written": str(imatrix), "layers": str(len(found)), **({"experts without a token": str(unseen)} if unseen else {})})
