"""The command that compares: sweep."""

from pathlib import Path
from typing import Annotated, Any

import typer

from quantkit.cli import app
from quantkit.cli.bars import progress_bars
from quantkit.cli.console import console, facts, parse_settings, print_json, say
from quantkit.cli.groups import Place, Text, values
from quantkit.cli.inspect import Settings, is_recipe
from quantkit.cli.options import AsJson, at_revision
from quantkit.errors import QuantkitError
from quantkit.system.progress import Progress


@app.command()
def sweep(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE or MODEL", help="Sweep (YAML), or a model and options.")],
    settings: Settings = None,
    out: Annotated[
        Path | None, typer.Option(help="Directory of the sweep of a model; it can be continued and extended.")
    ] = None,
    scheme: Annotated[list[str] | None, typer.Option(help="A scheme to compare; give it several times.")] = None,
    method: Annotated[list[str] | None, typer.Option(help="A quantizer to compare; gptq if none is given.")] = None,
    budget: Annotated[list[str] | None, typer.Option(help="A size to compare, such as 4.25 bpw or 100 MB.")] = None,
    windows: Annotated[int, typer.Option(help="Windows that rows are scored on, as long as those of calibration.")] = 16,
    eval_data: Annotated[
        str | None, typer.Option(help="Text that rows are scored on; default: the documentation that comes with Python.")
    ] = None,
    latency: Annotated[bool, typer.Option("--latency", help="Time decoding, too.")] = False,
    ray: Annotated[bool, typer.Option("--ray", help="Make rows as tasks of a Ray cluster (extra ray).")] = False,
    html: Annotated[Path | None, typer.Option(help="Write a page with the table and pictures here.")] = None,
    as_json: AsJson = False,
    *,
    text: Text,
    place: Place,
) -> None:
    """Quantize a model in many ways from one calibration, and score all of them. An interrupted sweep continues."""
    from quantkit.hf.code import trust_code
    from quantkit.sweeps.run import run_sweep

    run = {"run.device": place.device} if place.device != "auto" else {}
    if is_recipe(recipe):
        loaded = _load(recipe, run | parse_settings(settings))
    else:
        if out is None or not (scheme or budget):
            raise QuantkitError(
                f"a sweep of {recipe} wants --out and --scheme, the last several times: --scheme w4a16 --scheme w3a16"
            )
        scored = {"data": eval_data, "windows": windows, "length": text.length, "latency": latency}
        axes = {"schemes": scheme or [], "quantizers": method or ["gptq"], "budgets": budget or []}
        output = {"output": {"path": str(out)}, "run": {"device": place.device}, "dtype": place.dtype}
        loaded = _made(
            {"model": at_revision(recipe, place.revision), **axes, "calibration": values(text), "evaluate": scored, **output}
        )
    if place.trust_remote_code:
        trust_code(loaded.model)
    with progress_bars(again=True) as bars:

        def show(event: Progress) -> None:
            if event.stage == "sweep":
                say(event.detail, stderr=True)
            else:
                bars(event)

        result = run_sweep(loaded, show, ray=ray)
    if html is not None:
        result.save_html(html)
    _show(result, html, as_json)
    if any(row.status == "failed" for row in result.rows):
        say("the same command again tries the failed rows once more", stderr=True)
        raise typer.Exit(1)


def _load(recipe: str, overrides: dict[str, Any]) -> Any:
    from quantkit.sweeps.schema import load_sweep

    return load_sweep(recipe, overrides)


def _made(data: dict[str, Any]) -> Any:
    from quantkit.recipe.schema import recipe_of
    from quantkit.sweeps.schema import SweepRecipe

    return recipe_of(data, SweepRecipe)


def _show(result: Any, html: Path | None, as_json: bool) -> None:
    """Print the table of a sweep."""
    from quantkit.sweeps.rows import COLUMNS
    from quantkit.sweeps.show import sweep_table, unmade

    if as_json:
        print_json([{name: getattr(row, name) for name in COLUMNS} for row in result.rows])
        return
    console().print(sweep_table(result))
    for name, status, reason in unmade(result):
        say(f"{status}: {name}{': ' if reason else ''}{reason}")
    facts({"rows": str(result.directory), **({"page": f"{html} (open it in a browser)"} if html else {})})
