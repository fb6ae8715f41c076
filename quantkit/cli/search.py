"""Commands without a recipe: quantize a model with one scheme or within a budget, or only search the plan."""

from pathlib import Path
from typing import Annotated, Any

import typer

from quantkit.cli import app
from quantkit.cli.console import console, facts, progress_bars, say, table
from quantkit.cli.options import Column, Data, Model, Template

BudgetText = Annotated[
    str | None,
    typer.Option("--budget", help="4.25 bpw, 300 MB, 20 ms, 50 tok/s or 0.05 kl: every layer gets what loses least within it."),
]
Choices = Annotated[
    list[str] | None,
    typer.Option("--choice", help="A scheme that layers may get within the budget, or float; give it several times."),
]
Include = Annotated[
    list[str] | None,
    typer.Option("--include", help="embedding or head: searched too (format native); twice for both."),
]
Method = Annotated[str, typer.Option(help="Quantizer; quantkit list has their names.")]
Samples = Annotated[int, typer.Option(help="Calibration windows.")]
Length = Annotated[int, typer.Option(help="Tokens of a calibration window.")]
Format = Annotated[str, typer.Option(help="Format of the checkpoint; quantkit list has their names.")]
Dtype = Annotated[str, typer.Option(help="Dtype the model is loaded and stored in: auto, float32, bfloat16 or float16.")]


def _recipe(model: str, out: Path, scheme: Any, **settings: Any) -> Any:
    """Return the recipe that the options of a command amount to."""
    from quantkit.recipe.schema import recipe_of

    data = {name: settings.pop(name) for name in ("data", "column", "template", "samples", "length")}
    output = {"path": str(out), "format": settings.pop("format"), "overwrite": settings.pop("overwrite", False)}
    return recipe_of({"model": model, "scheme": scheme, "calibration": data, "output": output, **settings})


@app.command()
def quantize(
    model: Model,
    out: Annotated[Path, typer.Option(help="Directory of the checkpoint.")],
    scheme: Annotated[
        str | None, typer.Option(help="Scheme of every layer, such as w4a16-asym-g64; w4a16 if none is given.")
    ] = None,
    budget: BudgetText = None,
    choice: Choices = None,
    include: Include = None,
    method: Method = "gptq",
    step: Annotated[
        list[str] | None, typer.Option(help="awq, smoothquant, rotate, bias-correction, distill; in order.")
    ] = None,
    data: Data = None,
    column: Column = None,
    template: Template = None,
    samples: Samples = 128,
    length: Length = 512,
    format: Format = "compressed-tensors",
    dtype: Dtype = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a checkpoint that is already there.")] = False,
    resume: Annotated[
        bool, typer.Option("--resume/--no-resume", help="Continue an interrupted run, or start over.", show_default=True)
    ] = True,
) -> None:
    """Quantize a model with one scheme, or within a budget. An interrupted run continues."""
    from quantkit.errors import RecipeError
    from quantkit.recipe.run import run_recipe
    from quantkit.report import coverage_table

    if scheme is not None and (budget is not None or choice):
        raise RecipeError("--scheme gives every layer the same, --budget with --choice searches; give one of the two")
    if (choice or include) and budget is None:
        raise RecipeError(
            "--choice and --include go with --budget: say how large or slow the model may be, such as --budget '4.25 bpw'"
        )
    chosen: Any = scheme or "w4a16"
    if budget is not None:
        chosen = {"budget": budget, "include": tuple(include or ())} | ({"choices": tuple(choice)} if choice else {})
    recipe = _recipe(
        model, out, chosen, method=method, steps=step or [], dtype=dtype, data=data, column=column, template=template,
        samples=samples, length=length, format=format, overwrite=overwrite, run={"resume": resume},
    )  # fmt: skip
    with progress_bars() as progress:
        outcome = run_recipe(recipe, progress)
    for note in outcome.preview.resolution.notes if budget is None else ():
        say(f"note: {note}")
    console().print(coverage_table(outcome.result.coverage))
    facts(outcome.result.facts())
    say(f"{'already done:' if outcome.result.already_done else 'written to'} {outcome.result.path}")


@app.command()
def search(
    model: Model,
    budget: Annotated[str, typer.Option(help="4.25 bpw, 300 MB, 20 ms, 50 tok/s or 0.05 kl.")],
    choice: Choices = None,
    include: Include = None,
    method: Method = "gptq",
    data: Data = None,
    column: Column = None,
    template: Template = None,
    samples: Samples = 128,
    length: Length = 512,
    windows: Annotated[int, typer.Option(help="Calibration windows that the scores are made from.")] = 8,
    format: Format = "compressed-tensors",
    out: Annotated[Path | None, typer.Option(help="Write the plan, why, and the frontier here (JSON).")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write a picture of the plan and the frontier here (PNG or SVG).")] = None,
    html: Annotated[Path | None, typer.Option(help="Write a page with which layer got what, and why, here.")] = None,
) -> None:
    """Find which layer gets how many bits within a budget, and what one more or less would change; nothing is quantized."""
    from quantkit.calibrate.data import Calibration
    from quantkit.mixed.search import CHOICES, Scoring
    from quantkit.mixed.search import search as find
    from quantkit.pipeline.settings import Output, Run
    from quantkit.report import write_html

    calibration = Calibration(data, samples, length, column=column, template=template)
    with progress_bars() as progress:
        found = find(
            model,
            budget,
            choice or CHOICES,
            method=method,
            include=include or (),
            calibration=calibration,
            scoring=Scoring(windows=windows),
            output=Output(format=format),
            run=Run(progress=progress),
        )
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
    if out is not None:
        found.save(out)
        say(f"written: {out}")
    if plot is not None:
        found.plot().savefig(plot)
        say(f"written: {plot}")
    if html is not None:
        write_html(html, [], search=found, title=f"{model} within {found.budget}")
        say(f"written: {html} (open it in a browser)")
