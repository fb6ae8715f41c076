"""The command ``quantkit``: thin, everything it does is a function of the library.

Heavy imports happen inside commands, so that ``quantkit --help`` answers at once. An error that quantkit raises on purpose is
printed as it is, without a traceback, and the exit code is 2; ``quantkit --debug ...`` shows the traceback. Ctrl-C exits with
130 and says how to go on.
"""

import logging
import os
import re
from collections.abc import Callable
from typing import Annotated, Any, TypeVar

import typer
from typer.core import TyperCommand, TyperGroup

from quantkit.errors import QuantkitError
from quantkit.version import __version__

RESUMABLE = ("demo", "quantize", "run", "sweep", "train")
"""Commands that continue an interrupted run when they are given again."""


T = TypeVar("T", bound=Callable[..., Any])

LOADING = ("bench", "demo", "eval", "generate", "quantize", "run", "search", "serve", "sweep", "trace", "train")
"""Commands that load a model."""
_KEYS = {"overwrite": "output.overwrite", "resume": "run.resume"}
"""Arguments that messages of the library name, and their keys in a recipe."""


def in_options(message: str, command: Any) -> str:
    """Return a message of the library in the words of a command: ``overwrite=True`` is ``--overwrite`` there.

    Args:
        message: the message; an argument that the command has no option for stays.
        command: the command, as click knows it.
    """
    options = {one.name for one in getattr(command, "params", ())}

    def option(found: re.Match[str]) -> str:
        name, value = found.groups()
        if name in options:
            return f"--{'' if value == 'True' else 'no-'}{name}"
        return f"--set {_KEYS[name]}={value.lower()}" if "settings" in options else found[0]

    return re.sub(rf"\b({'|'.join(_KEYS)})=(True|False)\b", option, message)


class _Command(TyperCommand):
    """A command that gives a sign of life before it imports what it works with, which takes seconds."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        if self.name in LOADING:
            typer.secho("loading ...", fg=typer.colors.BRIGHT_BLACK, err=True)
        return super().invoke(ctx)


class _App(typer.Typer):
    def command(self, *arguments: Any, **options: Any) -> Callable[[T], T]:
        """Return a decorator that adds a command."""
        return super().command(*arguments, **{"cls": _Command, **options})


class _Guarded(TyperGroup):
    """Turns errors and Ctrl-C into a line and an exit code, in one place for all commands."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except QuantkitError as error:
            if ctx.params.get("debug"):
                raise
            command = self.commands.get(ctx.invoked_subcommand or "")
            typer.secho(f"error: {in_options(str(error), command)}", fg=typer.colors.RED, err=True)
            raise typer.Exit(2) from error
        except KeyboardInterrupt:
            again = "; give the same command again to continue where it stopped" if ctx.invoked_subcommand in RESUMABLE else ""
            typer.secho(f"interrupted{again}", fg=typer.colors.YELLOW, err=True)
            raise typer.Exit(130) from None


app = _App(
    cls=_Guarded,
    help="Quantize a language model, prove the checkpoint, measure it, ship it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _shown_by_nobody(record: logging.LogRecord) -> bool:
    """Return whether no logger below the root shows a record itself, as some libraries do; it would appear twice."""
    logger: logging.Logger | None = logging.getLogger(record.name)
    while logger is not None and logger.parent is not None:
        if logger.handlers:
            return False
        logger = logger.parent
    return True


def _show_version(value: bool) -> None:
    if value:
        typer.echo(f"quantkit {__version__}")
        raise typer.Exit


@app.callback()
def _settings(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks and everything the library logs.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log what is going on.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    level = logging.DEBUG if debug else logging.INFO if verbose else logging.WARNING
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    for handler in logging.getLogger().handlers:
        handler.addFilter(_shown_by_nobody)
    logging.getLogger("quantkit").setLevel(level)
    os.environ.setdefault("TQDM_DISABLE", "1")  # bars of the libraries below would fight with ours


from quantkit.cli import build, collect, inspect, run, search, serve, sweep  # noqa: E402, F401  (they add their commands to the app)
