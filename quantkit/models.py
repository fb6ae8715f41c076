"""Open any model that a user may name."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from quantkit import checkpoint
from quantkit.hf.load import load_float, load_tokenizer
from quantkit.hf.source import locate
from quantkit.kernels import Activations


def open_model(
    source: str | Path, dtype: torch.dtype | None = None, *, activations: Activations = "float"
) -> tuple[nn.Module, Any]:
    """Open a quantized checkpoint, a float directory, a hub id, a GGUF file, or ``"demo"``, the embedded default.

    Args:
        source: what to open.
        dtype: dtype of the unquantized weights; None keeps what the files hold.
        activations: what quantized layers make of their inputs; see :func:`quantkit.checkpoint.load`.

    Returns:
        The model, ready to run, and its tokenizer (None where there is none).

    Raises:
        QuantkitError: it is not there, or cannot be read.
    """
    place = locate(source)
    if _is_quantized(Path(place)):
        return checkpoint.load(place, dtype=dtype, activations=activations), load_tokenizer(place)
    return load_float(place, dtype)


def _is_quantized(path: Path) -> bool:
    """Whether a directory is for :func:`quantkit.checkpoint.load`: also an unfinished one, so that it can say what is wrong."""
    if (path / checkpoint.INCOMPLETE).exists():
        return True
    config = path / "config.json"
    return config.is_file() and "quantization_config" in json.loads(config.read_text(encoding="utf-8"))
