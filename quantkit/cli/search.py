"""Commands without a recipe: quantize a model with one scheme or within a budget, or only search the plan."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from quantkit.cli import app
from quantkit.cli.bars import progress_bars
from quantkit.cli.console import facts, print_json, say, table
from quantkit.cli.groups import Place, Text, values
from quantkit.cli.options import (
    AsJson,
    BudgetText,
    Choices,
    Format,
    Formats,
    Include,
    MaxMemory,
    Method,
    Model,
    Scheme,
    Steps,
    at_revision,
    recipe_from,
    scheme_or_budget,
)
from quantkit.cli.run import carry_out

if TYPE_CHECKING:
    from quantkit.mixed.result import SearchResult


@app.command()
def quantize(
    model: Model,
    out: Annotated[Path, typer.Option(help="Directory of the checkpoint.")],
    scheme: Scheme = None,
    budget: BudgetText = None,
    choice: Choices = None,
    include: Include = None,
    method: Method = "gptq",
    step: Steps = None,
    format: Formats = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a checkpoint that is already there.")] = False,
    resume: Annotated[
        bool, typer.Option("--resume/--no-resume", help="Continue an interrupted run, or start over.", show_default=True)
    ] = True,
    max_memory: MaxMemory = None,
    as_json: AsJson = False,
    *,
    text: Text,
    place: Place,
) -> None:
    """Quantize a model with one scheme, or within a budget. An interrupted run continues."""
    from quantkit.system.workers import launched

    with launched() as workers:
        chosen = scheme_or_budget(scheme, budget, choice, include)
        recipe = recipe_from(
            at_revision(model, place.revision), out, chosen, method=method, steps=step or [], dtype=place.dtype,
            formats=format, overwrite=overwrite,
            run={"resume": resume, "device": place.device, "max_memory": max_memory}, **values(text),
        )  # fmt: skip
        carry_out(recipe, as_json, place.trust_remote_code, workers)


@app.command()
def search(
    model: Model,
    budget: Annotated[str, typer.Option(help="4.25 bpw, 300 MB, 20 ms, 50 tok/s or 0.05 kl.")],
    choice: Choices = None,
    include: Include = None,
    method: Method = "gptq",
    windows: Annotated[int, typer.Option(help="Calibration windows that the scores are made from.")] = 8,
    format: Format = "compressed-tensors",
    out: Annotated[Path | None, typer.Option(help="Write the plan, why, and the frontier here (JSON).")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write a picture of the plan and the frontier here (PNG or SVG).")] = None,
    html: Annotated[Path | None, typer.Option(help="Write a page with which layer got what, and why, here.")] = None,
    as_json: AsJson = False,
    *,
    text: Text,
    place: Place,
) -> None:
    """Find which layer gets how many bits within a budget, and what one more or less would change; nothing is quantized."""
    from quantkit.calibrate.data import Calibration
    from quantkit.hf.load import load_float
    from quantkit.hf.source import locate
    from quantkit.mixed.search import CHOICES, Scoring
    from quantkit.mixed.search import search as find
    from quantkit.pipeline.settings import Output, Run
    from quantkit.report import write_html

    dtype, source = None if place.dtype == "auto" else place.dtype, locate(at_revision(model, place.revision))
    opened, tokenizer = load_float(source, dtype, trust_remote_code=place.trust_remote_code)
    with progress_bars() as progress:
        found = find(
            opened,
            budget,
            choice or CHOICES,
            method=method,
            include=include or (),
            calibration=Calibration(**values(text)),
            scoring=Scoring(windows=windows),
            output=Output(format=format),
            run=Run(progress=progress, device=place.device),
            tokenizer=tokenizer,
        )
    if as_json:
        print_json({"facts": found.facts(), "plan": {name: one.describe() for name, one in found.plan.items()}})
    else:
        _show(found)
    if out is not None:
        found.save(out)
        say(f"written: {out}", stderr=True)
    if plot is not None:
        found.plot().savefig(plot)
        say(f"written: {plot}", stderr=True)
    if html is not None:
        write_html(html, [], search=found, title=f"{model} within {found.budget}")
        say(f"written: {html} (open it in a browser)", stderr=True)


def _show(found: "SearchResult") -> None:
    """Print what was found, and the best plans of other sizes."""
    rows = [(kind, *(f"{share:.0%}" if share else "" for share in shares)) for kind, shares in found.by_kind().items()]
    table("share of the weights, by kind of layer", ("layers", *found.choice_names()), rows)
    points = found.frontier
    shown = points[:: max(1, len(points) // 10)]
    lines = [
        (f"{p.bits_per_weight:.3f}", f"{p.nbytes / 1e6:.1f}", f"{p.kl:.4g}", "" if p.ms is None else f"{p.ms:.2f}")
        for p in shown
    ]
    table("the best plans of other sizes", ("bits per weight", "MB", "expected KL", "ms per token"), lines)
    facts(found.facts())
