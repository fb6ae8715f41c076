"""How the command shows things: tables, facts, and progress bars fed by the library's one callback."""

import functools
import json
import logging
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import typer

from quantkit.errors import RecipeError

if TYPE_CHECKING:
    from rich.console import Console


PIPE_COLUMNS = 140
"""Width of tables that go to a file or a pipe."""


@functools.cache
def console(stderr: bool = False) -> "Console":
    """Return the terminal (results go to stdout, progress to stderr); a file or pipe is given room for whole rows."""
    from rich.console import Console

    found = Console(stderr=stderr)
    if not found.is_terminal and "COLUMNS" not in os.environ:
        found.width = PIPE_COLUMNS
    return found


def hush(quiet: bool) -> None:
    """Show nothing of what is going on from now on, or do show it."""
    if quiet:
        logging.getLogger("quantkit.told").setLevel(logging.WARNING)
    if quiet or console.cache_info().currsize:
        console(stderr=True).quiet = quiet


def say(text: str, stderr: bool = False) -> None:
    """Print a line as it is; a terminal may wrap it, but a path in it stays whole."""
    (console(stderr=True) if stderr else console()).print(text, markup=False, highlight=False, soft_wrap=True)


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table; columns of numbers are right-aligned."""
    from rich.table import Table
    from rich.text import Text

    shown = Table(title=title, title_justify="left", header_style="bold")
    for index, column in enumerate(columns):
        numeric = bool(rows) and all(row[index].replace(",", "").replace(".", "").isdigit() for row in rows)
        shown.add_column(column, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        shown.add_row(*(Text(cell) for cell in row))
    console().print(shown)


def facts(values: Mapping[str, str]) -> None:
    """Print names and values, one per line, aligned."""
    from rich.table import Table
    from rich.text import Text

    grid = Table.grid(padding=(0, 2))
    for name, value in values.items():
        grid.add_row(Text(name, style="bold"), Text(value))
    console().print(grid)


def print_json(value: Any) -> None:
    """Print a value as JSON."""
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False, default=str))


def size(nbytes: float) -> str:
    """Return bytes as a person reads them: ``269.1 MB`` (powers of ten, like disks)."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.2f} TB"


def parse_settings(settings: Sequence[str] | None) -> dict[str, Any]:
    """Turn ``["calibration.samples=8"]`` into ``{"calibration.samples": 8}``; values are YAML."""
    from quantkit.recipe.yaml import read_value

    found: dict[str, Any] = {}
    for setting in settings or ():
        key, separator, value = setting.partition("=")
        if not separator or not key:
            raise RecipeError(f"--set {setting}: want KEY=VALUE, e.g. --set calibration.samples=8")
        found[key] = read_value(value, f"--set {key}")
    return found
