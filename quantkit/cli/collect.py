"""The command that calibrates and quantizes nothing: collect."""

from pathlib import Path
from typing import Annotated

import typer

from quantkit.cli import app
from quantkit.cli.bars import progress_bars
from quantkit.cli.console import facts
from quantkit.cli.groups import Place, Text, values
from quantkit.cli.options import Model, at_revision


@app.command()
def collect(
    model: Model,
    imatrix: Annotated[Path, typer.Option(help="Importance matrix for llama-quantize --imatrix (a GGUF file).")],
    all_experts: Annotated[
        bool, typer.Option("--all-experts", help="Let every expert see every token, so that none is left without.")
    ] = False,
    *,
    text: Text,
    place: Place,
) -> None:
    """Run a float model over text and write how large the inputs of its layers are, for llama.cpp."""
    from quantkit.calibrate.data import Calibration
    from quantkit.hf.load import load_float
    from quantkit.hf.source import locate
    from quantkit.pipeline import quantize as pipeline
    from quantkit.pipeline.imatrix import save_imatrix
    from quantkit.pipeline.settings import Run

    dtype, source = None if place.dtype == "auto" else place.dtype, locate(at_revision(model, place.revision))
    loaded, tokenizer = load_float(source, dtype, trust_remote_code=place.trust_remote_code)
    calibration = Calibration(**values(text), all_experts=all_experts)
    with progress_bars() as progress:
        found, _ = pipeline.collect(
            loaded,
            ("mean_square",),
            calibration=calibration,
            run=Run(progress=progress, device=place.device),
            tokenizer=tokenizer,
        )
    save_imatrix(imatrix, loaded, found, length=text.length, source=Path(text.data).name if text.data else "text")
    unseen = sum(count == 0 for one in found.values() for count in one.tokens)
    facts({"written": str(imatrix), "layers": str(len(found)), **({"experts without a token": str(unseen)} if unseen else {})})
