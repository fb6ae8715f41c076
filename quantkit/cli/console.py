"""How the command shows things: tables, facts, and progress bars fed by the library's one callback."""

import contextlib
import functools
import json
import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import typer

from quantkit.errors import RecipeError
from quantkit.system.progress import Progress, ProgressCallback

if TYPE_CHECKING:
    from rich.console import Console


PIPE_COLUMNS = 140
"""Width of tables that go to a file or a pipe."""
QUIET_S = 10.0
"""Longest time without a line about a stage at work, where there is no terminal to show a bar on."""


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


@contextlib.contextmanager
def progress_bars(*, again: bool = False) -> Iterator[ProgressCallback]:
    """Yield a callback that shows one bar per stage; where there is no terminal, lines: per finished stage, and now and then.

    Args:
        again: a stage that begins again uses its bar again, for many runs in a row.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    terminal = console(stderr=True)
    columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    bars = Bars(*columns, TextColumn("{task.fields[detail]}", markup=False), console=terminal, disable=not terminal.is_terminal)
    tasks: dict[str, Any] = {}
    started: dict[str, float] = {}
    last_event = [time.monotonic()]  # a stage begins where the one before it ended
    last_line = [time.monotonic()]

    def show(event: Progress) -> None:
        if event.stage not in tasks or event.done < bars.tasks[tasks[event.stage]].completed:
            if again and event.stage in tasks:
                bars.reset(tasks[event.stage], total=event.total)
            else:
                tasks[event.stage] = bars.add_task(event.stage, total=event.total, detail="")
            started[event.stage] = last_event[0]
        last_event[0] = time.monotonic()
        detail = event.detail if event.loss is None else f"{event.detail}  loss {event.loss:.2e}"
        bars.update(tasks[event.stage], completed=event.done, total=event.total, detail=detail)
        if terminal.is_terminal or event.stage not in started:
            return
        finished, seconds = event.done == event.total, last_event[0] - started[event.stage]
        if finished or last_event[0] - last_line[0] > QUIET_S:
            steps = f"{event.total} steps" if finished else f"{event.done} of {event.total} steps"
            terminal.print(f"{event.stage}: {steps} in {seconds:.1f} s", markup=False, highlight=False)
            last_line[0] = last_event[0]
        if finished:
            del started[event.stage]

    with bars:
        yield show
