"""Options that several commands share, and how their values are read. Imports nothing heavy."""

import os
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quantkit.errors import QuantkitError

if TYPE_CHECKING:
    from pathlib import Path

    from quantkit.generation.options import DrafterChoice

Model = Annotated[
    str, typer.Argument(help="Checkpoint directory, float model, hub id (owner/name, owner/name@revision), or demo.")
]
Engine = Annotated[str, typer.Option(help="native (one native call per step), modules (the model's own forward), or auto.")]
ComputeMode = Annotated[
    str,
    typer.Option(
        help="What a CPU multiplies with: exact, inputs as they are; int8, inputs rounded, twice as fast; auto, int8 where the "
        "checkpoint records that it costs next to nothing; float32, as exact, even in a bfloat16 model."
    ),
]
Head = Annotated[str, typer.Option(help="float, or int8: round the output head in memory, which is faster.")]
KeysAndValues = Annotated[str, typer.Option("--kv", help="How keys and values are stored: float, int8 or int4.")]
Data = Annotated[
    str | None,
    typer.Option(
        help="File or folder of text, JSON, JSON lines, CSV, TSV or Parquet, or a name of datasets; default: the "
        "documentation that comes with Python, enough to try."
    ),
]
Column = Annotated[str | None, typer.Option(help="Column of the data that is read: a text, messages, or prompt+response.")]
Template = Annotated[str | None, typer.Option(help="Chat template of conversations: a name of the tokenizer's, or a file.")]
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
Scheme = Annotated[str | None, typer.Option(help="Scheme of every layer, such as w4a16-asym-g64; w4a16 if none is given.")]
Method = Annotated[str, typer.Option(help="Quantizer; quantkit list has their names.")]
Steps = Annotated[list[str] | None, typer.Option(help="awq, smoothquant, rotate, bias-correction, distill; in order.")]
Samples = Annotated[int, typer.Option(help="Calibration windows.")]
Length = Annotated[int, typer.Option(help="Tokens of a calibration window.")]
Format = Annotated[str, typer.Option(help="Format of the checkpoint; quantkit list has their names.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, one of several as cuda:1, or auto: the GPU if there is one.")]
MaxMemory = Annotated[
    str | None, typer.Option(help="Most memory that the process may take, such as 4GiB; kept to, or refused before work.")
]
Dtype = Annotated[str, typer.Option(help="Dtype of float weights: auto, as the files have them; float32, bfloat16 or float16.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a model of the hub; the same as MODEL@REVISION.")]
MaxNewTokens = Annotated[int, typer.Option("--max-new-tokens", "-n", help="Longest answer in tokens.")]
Temperature = Annotated[float, typer.Option(help="0 takes the most likely token.")]
TopK = Annotated[int | None, typer.Option(help="Choose among so many of the most likely tokens.")]
TopP = Annotated[float | None, typer.Option(help="Choose among the most likely tokens that have this probability together.")]
MinP = Annotated[float | None, typer.Option(help="Leave out tokens that are less likely than this share of the likeliest.")]
RepetitionPenalty = Annotated[float, typer.Option(help="Above 1, tokens that were there already become less likely.")]
Seed = Annotated[int | None, typer.Option(help="The same seed gives the same text.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
TrustRemoteCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code", help="Run the Python code that a model brings with it; only where you trust who wrote it."
    ),
]
DrafterName = Annotated[
    str | None,
    typer.Option(
        "--drafter",
        metavar="NAME, MODEL or NAME=MODEL",
        help="Draft tokens that the model verifies several at a time: with a drafter (quantkit list has their names), or a "
        "smaller model.",
    ),
]


Formats = Annotated[
    list[str] | None,
    typer.Option(
        "--format",
        help="Format of the checkpoint, compressed-tensors if none is given; several times writes the same codes in several "
        "formats, each into a folder of its own. quantkit list has their names.",
    ),
]


def recipe_from(model: str, out: "Path", scheme: Any, **settings: Any) -> Any:
    """Return the recipe that the options of a command amount to."""
    from quantkit.pipeline.settings import several
    from quantkit.recipe.schema import recipe_of

    data = {name: settings.pop(name) for name in ("data", "column", "template", "samples", "length")}
    output = several(out, settings.pop("formats") or ["compressed-tensors"], overwrite=settings.pop("overwrite", False))
    return recipe_of({"model": model, "scheme": scheme, "calibration": data, "output": output, **settings})


def scheme_or_budget(scheme: str | None, budget: str | None, choice: list[str] | None, include: list[str] | None) -> Any:
    """Return what a recipe's ``scheme`` is for these options.

    Raises:
        QuantkitError: options that contradict each other.
    """
    if scheme is not None and (budget is not None or choice):
        raise QuantkitError("--scheme gives every layer the same, --budget with --choice searches; give one of the two")
    if (choice or include) and budget is None:
        raise QuantkitError(
            "--choice and --include go with --budget: say how large or slow the model may be, such as --budget '4.25 bpw'"
        )
    if budget is None:
        return scheme or "w4a16"
    return {"budget": budget, "include": tuple(include or ())} | ({"choices": tuple(choice)} if choice else {})


def load(
    model: str, *, device: str = "auto", dtype: str = "auto", revision: str | None = None, compute: str = "auto", **options: Any
) -> tuple[Any, Any]:
    """Open the model that a command names, as its options say; ``options`` are those of :func:`quantkit.open_model`.

    Returns:
        The model and its tokenizer.

    Raises:
        QuantkitError: it cannot be opened.
    """
    from quantkit.checkpoint.open import open_model
    from quantkit.cli.bars import PULSE

    opened = open_model(
        at_revision(model, revision),
        None if dtype == "auto" else dtype,
        compute="exact" if compute == "float32" else compute,  # type: ignore[arg-type]  # a wrong word is refused there
        device=device,
        **options,
    )
    PULSE.end()
    return opened


def at_revision(model: str, revision: str | None) -> str:
    """Return the name of a model at a revision.

    Raises:
        QuantkitError: a revision of what is not on the hub.
    """
    if revision is None:
        return model
    if os.path.lexists(model) or "@" in model or model == "demo":
        raise QuantkitError(f"--revision {revision}: {model} is no id of the hub (owner/name), which alone has revisions")
    return f"{model}@{revision}"


def read_prompt(prompt: str | None) -> str:
    """Return a prompt given as an argument, or what standard input holds for ``-`` or where there is a pipe and no argument.

    Raises:
        QuantkitError: there is none.
    """
    if prompt is not None and prompt != "-":
        return prompt
    if prompt is None and sys.stdin.isatty():
        raise QuantkitError("no prompt: give it after the model, or through a pipe (echo Once upon | quantkit generate MODEL)")
    text = sys.stdin.read().removesuffix("\n")
    if not text:
        raise QuantkitError("no prompt: standard input is empty")
    return text


def engine_options(running: Any) -> dict[str, Any]:
    """Return what :class:`quantkit.cli.groups.Running` says, as the library takes it."""
    return {"kv": running.kv, "drafter": read_drafter(running.drafter), "engine": running.engine}


def read_drafter(text: str | None) -> "DrafterChoice":
    """Return what ``--drafter`` selects: the name of a registered drafter, a model to open, or both as ``NAME=MODEL``.

    Raises:
        QuantkitError: the model cannot be opened.
    """
    from quantkit.checkpoint.open import open_model
    from quantkit.engine.drafters import DRAFTERS

    if text is None:
        return None
    name, separator, model = text.partition("=")
    if name not in DRAFTERS.names():
        return open_model(text)[0]
    return (name, open_model(model)[0]) if separator else name
