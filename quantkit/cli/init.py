"""The command that writes a recipe to begin with: init."""

import json
from pathlib import Path
from typing import Annotated

import typer

from quantkit.cli import app
from quantkit.cli.console import say
from quantkit.cli.options import BudgetText, Data
from quantkit.errors import QuantkitError


@app.command()
def init(
    model: Annotated[str | None, typer.Argument(help="Float model: a directory, hub id, .gguf file, or demo.")] = None,
    out: Annotated[Path, typer.Option(help="File of the recipe.")] = Path("recipe.yaml"),
    scheme: Annotated[str | None, typer.Option(help="Scheme of every layer; w4a16-asym if none is given.")] = None,
    budget: BudgetText = None,
    data: Data = None,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON schema of recipes, for editors.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a file that is already there.")] = False,
) -> None:
    """Write a recipe with comments, to be changed and given to quantkit run; or print the schema of recipes."""
    from quantkit.recipe.schema import recipe_of
    from quantkit.recipe.starter import recipe_schema, starter
    from quantkit.recipe.yaml import read_value
    from quantkit.system.files import write_atomic

    if schema:
        typer.echo(json.dumps(recipe_schema(), indent=1, ensure_ascii=False))
        return
    if model is None:
        raise QuantkitError("no model: quantkit init MODEL, such as quantkit init demo; or quantkit init --schema")
    if scheme is not None and budget is not None:
        raise QuantkitError("--scheme gives every layer the same, --budget searches; give one of the two")
    if out.exists() and not overwrite:
        raise QuantkitError(f"{out} is there already; choose another --out, or pass overwrite=True")
    label = model.rstrip("/").rpartition("/")[2].removesuffix(".gguf").partition("@")[0]
    kind = scheme or ("w4a16-asym" if budget is None else budget.replace(" ", ""))
    text = starter(model, f"{label}-{kind}", scheme=scheme or "w4a16-asym", budget=budget, data=data, name=str(out))
    recipe_of(read_value(text, str(out)))  # a scheme, budget or name that is none is said now
    write_atomic(out, text)
    say(f"written: {out}; look what it would do: quantkit plan {out}; do it: quantkit run {out}")
