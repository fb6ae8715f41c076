"""Open any model that a user may name."""

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from quantkit import checkpoint
from quantkit.checkpoint.activations import ComputeChoice, check_choice
from quantkit.dtypes import float_dtype
from quantkit.errors import SpecError
from quantkit.formats.base import FORMATS
from quantkit.hf.code import trust_code
from quantkit.hf.load import load_float, load_tokenizer
from quantkit.hf.source import locate
from quantkit.nn.install import describe_compute, quantize_head, set_compute
from quantkit.system.compute import known_device
from quantkit.system.files import named_path

HEADS = ("float", "int8")
"""What :func:`open_model` can make of an output head."""


def open_model(
    source: str | Path,
    dtype: torch.dtype | str | None = None,
    *,
    compute: ComputeChoice = "auto",
    head: str = "float",
    device: torch.device | str = "cpu",
    trust_remote_code: bool = False,
) -> tuple[nn.Module, Any]:
    """Open a quantized checkpoint, a float directory, a hub id, a GGUF file, or ``"demo"``, the embedded default.

    Args:
        source: what to open; of the hub also ``owner/name@revision``.
        dtype: dtype of the unquantized weights, or its name; None keeps what the files hold.
        compute: what the layers of a quantized checkpoint make of their inputs; see :func:`quantkit.checkpoint.load`.
        head: ``"int8"`` rounds a float output head in memory, see :func:`quantkit.nn.install.quantize_head`.
        device: where the model goes: ``"cpu"``, ``"cuda"``, ``"cuda:1"``, or ``"auto"``, the GPU if there is one.
        trust_remote_code: run the code that the model brings with it; see :func:`quantkit.hf.code.trust_code`.

    Returns:
        The model, ready to run, and its tokenizer (None where there is none).

    Raises:
        QuantkitError: it is not there, or cannot be read; an unknown ``head``, or one that does not fit the model.
    """
    if head not in HEADS:
        raise SpecError(f"head={head!r}: want one of {', '.join(HEADS)}")
    check_choice(compute)
    device = known_device(device)
    dtype, place = float_dtype(dtype), locate(source)
    if is_quantized(named_path(place)):
        if trust_remote_code:
            trust_code(place)
        model = checkpoint.load(place, dtype=dtype, device=device, compute=compute)
        tokenizer = load_tokenizer(place, trust_remote_code=trust_remote_code)
    else:
        floating, tokenizer = load_float(place, dtype, trust_remote_code=trust_remote_code)
        model = floating.to(device)  # type: ignore[arg-type]  # transformers types it so
    if head == "int8":
        quantize_head(model)
        if compute == "int8" or describe_compute(model) not in ("", "exact"):
            set_compute(model, "int8")  # the head as the other layers
    return model, tokenizer


def is_quantized(path: Path) -> bool:
    """Whether a directory is for :func:`quantkit.checkpoint.load`: also an unfinished one, so that it can say what is wrong."""
    if os.path.exists(path / checkpoint.INCOMPLETE):  # which, unlike Path.exists, is False for names that cannot be
        return True
    configs = (rule.container.config(path) for _, rule in FORMATS) if os.path.isdir(path) else ()
    return any(config is not None and "quantization_config" in config for config in configs)
