"""Options that several commands share, and how their values are read. Imports nothing heavy."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from quantkit.generation.options import DrafterChoice

Model = Annotated[str, typer.Argument(help="Checkpoint directory, float model, hub id, or demo.")]
Engine = Annotated[str, typer.Option(help="native (one native call per step), modules (the model's own forward), or auto.")]
ComputeMode = Annotated[
    str,
    typer.Option(
        help="Inputs of products on a CPU: exact; int8, twice as fast; auto, int8 where the checkpoint records that it costs "
        "next to nothing; or float32, exact even in a bfloat16 model."
    ),
]
Head = Annotated[str, typer.Option(help="float, or int8: round the output head in memory, which is faster.")]
KeysAndValues = Annotated[str, typer.Option("--kv", help="How keys and values are stored: float, int8 or int4.")]
Data = Annotated[
    str | None,
    typer.Option(
        help="File or folder of text, JSON, JSON lines, CSV, TSV or Parquet, or a name of datasets; default: text that every "
        "Python carries."
    ),
]
Column = Annotated[str | None, typer.Option(help="Column of the data that is read: a text, messages, or prompt+response.")]
Template = Annotated[str | None, typer.Option(help="Chat template of conversations: a name of the tokenizer's, or a file.")]
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
        help="Draft tokens that the model verifies several at a time: with a drafter (quantkit doctor lists them), or with a "
        "smaller model.",
    ),
]


def load_compute(compute: str) -> Any:
    """Return what ``--compute`` says to what loads a model; ``float32`` matters only to what runs it."""
    return "exact" if compute == "float32" else compute


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
