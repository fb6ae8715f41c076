"""Put a quantized checkpoint into another format: :func:`reformat`, and ``quantkit convert`` on the command line.

(``quantkit.convert`` ends a training: it makes codes of a model that was prepared.)
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from quantkit import checkpoint
from quantkit.checkpoint.reformat import FLOAT, open_source, write
from quantkit.dtypes import float_dtype
from quantkit.errors import FormatError
from quantkit.evaluation.sanity import SanityCheck
from quantkit.formats.base import FORMATS
from quantkit.hf.load import load_tokenizer
from quantkit.system.files import named_path, usable_path

log = logging.getLogger(__name__)


def reformat(
    path: str | Path,
    format: str,
    out: str | Path,
    *,
    lossy: bool = False,
    overwrite: bool = False,
    dtype: torch.dtype | str | None = None,
) -> dict[str, Any]:
    """Write a quantized checkpoint in another format, number for number the same.

    Tensors are decoded and encoded one after the other, read back and compared bit for bit; then the directory gets its name.
    Zero points, scales and groups change their form where the format wants that and the numbers stay; where they would not, the
    layer is refused by name.

    Args:
        path: directory of a checkpoint that :func:`quantkit.load` reads, whoever wrote it.
        format: name of a format, or ``"float"``: the weights that the codes stand for, as a plain directory of transformers.
        out: directory to write to, another than ``path``.
        lossy: round layers again whose numbers the format does not have, to the nearest of a grid that it has; the divergence
            (KL in nats per token) from the source on the built-in text is measured, recorded and returned.
        overwrite: replace a model that is in ``out`` already.
        dtype: for ``"float"``, dtype of all weights; None keeps that of the checkpoint.

    Returns:
        A mapping: ``path``, ``format``, ``from`` (the format read), ``layers`` (how many were quantized), ``rounded`` (names of
        those that were rounded again) and, where there are some, ``quality``.

    Raises:
        FormatError: the source cannot be read; the format cannot hold a layer; ``out`` is the source, or holds a model.
    """
    source, target = named_path(path), usable_path(out)
    FORMATS.get(format)
    if source.resolve() == target.resolve():
        raise FormatError(f"{target} is the checkpoint that is to be converted; write to another directory")
    wanted = float_dtype(dtype)
    if wanted is not None and format != FLOAT:
        raise FormatError(f"dtype={dtype!r} goes with format float; {format} keeps the dtype of the checkpoint")
    with open_source(source, format, lossy=lossy, dtype=wanted) as opened, checkpoint.claim(target, "converting a checkpoint"):
        found: dict[str, Any] = {}

        def check(stage: Path) -> Mapping[str, Any]:
            if opened.again:
                found.update(_measure(source, stage))
            return found

        facts = {
            **{key: value for key, value in opened.opened.config.get("quantkit", {}).items() if key not in _OWN},
            "converted_from": opened.opened.format_name,
            **({"rounded_again": list(opened.again)} if opened.again else {}),
        }
        write(opened, target, format, overwrite=overwrite, facts=facts, check=check)
        layers, name = len(opened.opened.schemes), opened.opened.format_name
    result = {"path": str(target), "format": format, "from": name, "layers": layers, "rounded": list(opened.again)}
    return {**result, "quality": found} if found else result


_OWN = ("version", "format", "carried_over")


def _measure(source: Path, written: Path) -> dict[str, Any]:
    """Return how far the predictions of a converted checkpoint are from those of its source."""
    before = checkpoint.load(source, cache=False)
    reference = SanityCheck.start(before, load_tokenizer(source))
    quality = reference.measure(reference.recorded_of(checkpoint.load(written, cache=False)))
    log.warning("layers were rounded again: KL to the source %.4g nats per token", quality["kl_mean"])
    return quality
