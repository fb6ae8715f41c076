"""The command ``quantkit``: thin, everything it does is a function of the library.

Heavy imports happen inside commands, so that ``quantkit --help`` answers at once. An error that quantkit raises on purpose is
printed as it is, without a traceback and in the words of the command that was given, and the exit code is 2;
``quantkit --debug ...`` shows the traceback. Ctrl-C exits with 130 and says how to go on.
"""

import atexit
import functools
import gc
import logging
import os
import re
from collections.abc import Callable
from inspect import Parameter, signature
from typing import Annotated, Any, TypeVar

import typer
from typer.core import TyperCommand, TyperGroup

from quantkit.cli.groups import spread
from quantkit.errors import QuantkitError
from quantkit.version import __version__

RESUMABLE = ("demo", "quantize", "run", "sweep", "train")
"""Commands that continue an interrupted run when they are given again."""


T = TypeVar("T", bound=Callable[..., Any])

QUICK = ("init",)
"""Commands that answer at once; the others import torch, which alone takes seconds."""
BRIEF = ("plan", "inspect", "list", "doctor")
"""Commands that hold no weights, and whose time goes into imports: an eighth of it is Python looking for garbage."""
_PANELS = {
    "Quantize": (
        *(
            "demo",
            "quantize",
            "plan",
            "init",
            "run",
            "train",
            "search",
            "sweep",
            "collect",
            "convert",
            "export",
            "package",
            "push",
        ),
    ),
    "Use": ("chat", "generate", "serve"),
    "Measure": ("eval", "bench", "trace", "inspect"),
    "This machine": ("list", "doctor", "cache", "build-kernels"),
}
"""Headings of the help, with the commands under them."""
_KEYS = {"overwrite": "output.overwrite", "resume": "run.resume"}
"""Arguments that messages of the library name, and their keys in a recipe."""
_ARGUMENT = re.compile(r"""(?<![\w.\[])([a-z]\w*)=('[^']*'|"[^"]*"|[\w.+-]*\w)""")
_SETTING = re.compile(r"\b[A-Z]\w+\((\w+)=([^()]*)\)(?=: )")
_SUBJECT = re.compile(r"^(?:[a-z_]+\.)*([a-z_]+?)(s?)(?:\.\d+)?(?=: )")
_PLACE = re.compile(r"(?<=which goes under )(\w+?)(s?)(?=;)")
_TWICE = re.compile(r"^(?:--[\w-]+: (?=--))?(--[\w-]+ )(\S+): \w+ '\2': ")
_CALL = re.compile(r",? ?(?:or )?quantkit\.\w+\(\.\.\., [^)]*\)(?: and give the model itself in place of its name)?")


def in_options(message: str, command: Any) -> str:
    """Return a message of the library in the words of a command: ``overwrite=True`` is ``--overwrite`` there.

    Args:
        message: the message; an argument that the command has no option for stays.
        command: the command, as click knows it.
    """
    options = {one.name: one for one in getattr(command, "params", ()) if getattr(one, "opts", [""])[0].startswith("-")}

    def option(found: re.Match[str]) -> str:
        name, value = found.groups()
        if name in options and not _within_call(found.string, found.start()):
            known = options[name]
            if value in ("True", "False"):
                no = [*known.secondary_opts, f"--no-{name.replace('_', '-')}"]
                return str(known.opts[0] if value == "True" else no[0])
            return f"{known.opts[0]} {value.strip(chr(39) + chr(34))}"
        return f"--set {_KEYS[name]}={value.lower()}" if "settings" in options and name in _KEYS else found[0]

    plain = _SETTING.sub(lambda found: f"{found[1]}={found[2]}" if found[1] in options else found[0], _CALL.sub("", message))
    named = plain
    for pattern in (_SUBJECT, _PLACE):
        named = pattern.sub(lambda found: _option_for(found, options) or found[0], named)
    return _TWICE.sub(r"\1\2: ", _ARGUMENT.sub(option, named))


def _option_for(subject: re.Match[str], options: dict[str, Any]) -> str | None:
    """Return the option that a recipe's key stands for: ``calibration.samples`` is ``--samples``, ``steps.0`` is ``--step``."""
    known = next((one for name in (subject[1] + subject[2], subject[1]) if (one := options.get(name))), None)
    return known and str(known.opts[0])


def _within_call(message: str, position: int) -> bool:
    """Return whether a place in a message is between the brackets of what looks like a call, as in ``GPTQ(damping=0.01)``."""
    calls: list[bool] = []
    for index, letter in enumerate(message[:position]):
        if letter == "(":
            calls.append(index > 0 and (message[index - 1].isalnum() or message[index - 1] == "_"))
        elif letter == ")" and calls:
            calls.pop()
    return any(calls)


Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show results and errors, not what is going on.")]


def _with_quiet(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a command with the option ``--quiet``."""

    @functools.wraps(function)
    def command(*arguments: Any, quiet: bool = False, **options: Any) -> Any:
        from quantkit.cli.console import hush

        hush(quiet)
        return function(*arguments, **options)

    known = signature(function)
    last = Parameter("quiet", Parameter.KEYWORD_ONLY, default=False, annotation=Quiet)
    command.__signature__ = known.replace(parameters=[*known.parameters.values(), last])  # type: ignore[attr-defined]
    command.__annotations__ = {**function.__annotations__, "quiet": Quiet}
    return command


class _Command(TyperCommand):
    """A command that gives a sign of life before it imports what it works with, which takes seconds."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        from quantkit.cli.bars import PULSE

        first = os.environ.get("RANK", "0") == "0"  # of several that a launcher has started
        if self.name in QUICK or not first or ctx.params.get("quiet"):
            return super().invoke(ctx)
        typer.secho("loading ...", fg=typer.colors.BRIGHT_BLACK, err=True)
        PULSE.begin("loading")
        collecting = gc.isenabled()
        if self.name in BRIEF:
            gc.disable()
        try:
            return super().invoke(ctx)
        finally:
            PULSE.end()
            if collecting:
                gc.enable()


class _App(typer.Typer):
    def command(self, *arguments: Any, **options: Any) -> Callable[[T], T]:
        """Return a decorator that adds a command."""

        def decorate(function: T) -> T:
            name = arguments[0] if arguments else function.__name__
            panel = next((title for title, names in _PANELS.items() if name in names), None)
            super(_App, self).command(*arguments, **{"cls": _Command, "rich_help_panel": panel, **options})(
                _with_quiet(spread(function))
            )
            return function

        return decorate


class _Guarded(TyperGroup):
    """Turns errors and Ctrl-C into a line and an exit code, in one place for all commands."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the names of all commands, in the order of the help."""
        order = [name for names in _PANELS.values() for name in names]
        return sorted(super().list_commands(ctx), key=lambda name: order.index(name) if name in order else len(order))

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
    epilog="Begin with: quantkit quantize MODEL --out DIR, then quantkit chat DIR. More: quantkit COMMAND --help.",
    no_args_is_help=True,
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


class _Plain(logging.Formatter):
    """Shows what users are told as it is, and what is logged with its level and place."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line of a record."""
        return record.getMessage() if record.name == "quantkit.told" else super().format(record)


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
        handler.setFormatter(_Plain("%(levelname)s %(name)s: %(message)s"))
    logging.getLogger("quantkit").setLevel(level)
    logging.getLogger("huggingface_hub").setLevel(level if debug or verbose else logging.ERROR)  # a line per retry
    logging.getLogger("quantkit.told").setLevel(min(level, logging.INFO))
    atexit.unregister(gc.freeze)
    atexit.register(gc.freeze)  # else Python looks for garbage in all it has imported, for seconds, before it ends
    os.environ.setdefault("TQDM_DISABLE", "1")  # bars of the libraries below would fight with ours


# The order is that of the commands in --help.
from quantkit.cli import (  # noqa: E402, F401, I001
    init,
    search,
    run,
    evaluate,
    sweep,
    convert,
    export,
    chat,
    serve,
    inspect,
    collect,
    build,
)
