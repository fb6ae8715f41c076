"""The command that compares: sweep."""

from pathlib import Path
from typing import Annotated

import typer

from quantkit.cli import app
from quantkit.cli.console import console, facts, parse_settings, print_json, progress_bars, say
from quantkit.cli.inspect import RecipeFile, Settings
from quantkit.cli.options import AsJson, Device, TrustRemoteCode
from quantkit.system.progress import Progress


@app.command()
def sweep(
    recipe: RecipeFile,
    settings: Settings = None,
    ray: Annotated[bool, typer.Option("--ray", help="Make rows as tasks of a Ray cluster (extra ray).")] = False,
    html: Annotated[Path | None, typer.Option(help="Write a page with the table and pictures here.")] = None,
    device: Device = "auto",
    as_json: AsJson = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Quantize a model in many ways from one calibration, and score all of them. An interrupted sweep continues."""
    import dataclasses

    from quantkit.hf.code import trust_code
    from quantkit.sweeps.run import run_sweep
    from quantkit.sweeps.schema import load_sweep
    from quantkit.sweeps.show import sweep_table, unmade

    asked = {"run.device": device} if device != "auto" else {}
    loaded = load_sweep(recipe, asked | parse_settings(settings))
    if trust_remote_code:
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
    if as_json:
        print_json([dataclasses.asdict(row) for row in result.rows])
    else:
        console().print(sweep_table(result))
        for name, status, reason in unmade(result):
            say(f"{status}: {name}{': ' if reason else ''}{reason}")
        facts({"rows": str(result.directory), **({"page": f"{html} (open it in a browser)"} if html else {})})
    if any(row.status == "failed" for row in result.rows):
        say("the same command again tries the failed rows once more", stderr=True)
        raise typer.Exit(1)
