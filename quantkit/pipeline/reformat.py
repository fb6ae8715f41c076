"""Put a quantized checkpoint into another format: :func:`reformat`, and ``quantkit convert`` on the command line.

(``quantkit.convert`` ends a training: it makes codes of a model that was prepared.)
"""

import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from quantkit import checkpoint
from quantkit.checkpoint.open import is_quantized
from quantkit.checkpoint.record import tensor_sums
from quantkit.checkpoint.reformat import FLOAT, Source, open_source, write
from quantkit.dtypes import float_dtype
from quantkit.errors import FormatError
from quantkit.evaluation.sanity import SanityCheck
from quantkit.formats.base import FORMATS
from quantkit.hf.load import load_tokenizer
from quantkit.hf.source import locate
from quantkit.pipeline.again import is_done
from quantkit.pipeline.floats import convert_floats
from quantkit.pipeline.resume import code_digest, versions
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
    """Write a checkpoint in another format, number for number the same.

    Tensors are decoded and encoded one after the other, read back and compared bit for bit; then the directory gets its name.
    A conversion that was killed is continued when it is given again, and one that is done is not made twice.
    Zero points, scales and groups change their form where the format wants that and the numbers stay; where they would not, the
    layer is refused by name. A float model goes into the formats that hold floats: a directory becomes a GGUF file, a GGUF
    file of anybody's a directory of transformers, its blocks as the floats that they stand for.

    Args:
        path: directory of a checkpoint that :func:`quantkit.load` reads, whoever wrote it; or a float model as for
            :func:`quantkit.open_model`.
        format: name of a format, or ``"float"``: the weights that the codes stand for, as a plain directory of transformers.
        out: directory to write to, another than ``path``.
        lossy: round layers again whose numbers the format does not have, to the nearest of a grid that it has; the divergence
            (KL in nats per token) from the source on the built-in text is measured, recorded and returned.
        overwrite: replace a model that is in ``out`` already.
        dtype: for ``"float"``, and of a float model, dtype of all weights; None keeps that of the checkpoint.

    Returns:
        A mapping: ``path``, ``format``, ``from`` (the format read), ``layers`` (how many were quantized), ``rounded`` (names of
        those that were rounded again), ``already_done`` and, where layers were rounded, ``quality``.

    Raises:
        FormatError: the source cannot be read; the format cannot hold a layer; ``out`` is the source, or holds a model.
    """
    source, target = named_path(locate(path)), usable_path(out)
    FORMATS.get(format)
    if source.resolve() == target.resolve():
        raise FormatError(f"{target} is the checkpoint that is to be converted; write to another directory")
    wanted = float_dtype(dtype)
    if not is_quantized(source):
        with checkpoint.claim(target, "converting a model"):
            return convert_floats(source, format, target, dtype=wanted, overwrite=overwrite)
    if wanted is not None and format != FLOAT:
        raise FormatError(f"dtype={dtype!r} goes with format float; {format} keeps the dtype of the checkpoint")
    with open_source(source, format, lossy=lossy, dtype=wanted) as opened, checkpoint.claim(target, "converting a checkpoint"):
        key = {**key_of(opened), "format": format, "settings": f"lossy={lossy}, dtype={wanted}"}
        found: Mapping[str, Any] = {}
        if not (done := is_done(target, key, overwrite=overwrite)):
            found = convert(opened, target, format, key=key, overwrite=overwrite, check=lambda stage: _quality(opened, stage))
        elif opened.again:
            found = _recorded_quality(target, format)
        layers, name, again = len(opened.opened.schemes), opened.opened.format_name, list(opened.again)
    result = {"path": str(target), "format": format, "from": name, "layers": layers, "rounded": again, "already_done": done}
    return {**result, "quality": dict(found)} if found else result


def convert(
    opened: Source,
    target: Path,
    format: str,
    *,
    key: checkpoint.Key,
    overwrite: bool,
    check: Callable[[Path], Mapping[str, Any]],
) -> Mapping[str, Any]:
    """Write an open checkpoint in another format; ``target`` is claimed.

    Args:
        opened: the source.
        target: directory to write to.
        format: name of the format.
        key: what decides the result: noted beside it, and what makes a killed conversion one that can be continued.
        overwrite: replace a model that is there.
        check: looks at the files, which have been compared bit for bit, before they get their name.

    Returns:
        What ``check`` returned.
    """
    facts = {
        **{name: value for name, value in opened.opened.config.get("quantkit", {}).items() if name not in _OWN},
        "converted_from": opened.opened.format_name,
        **({"rounded_again": list(opened.again)} if opened.again else {}),
    }
    found: dict[str, Any] = {}

    def checked(stage: Path) -> Mapping[str, Any]:
        found.update(check(stage))
        return found

    write(opened, target, format, overwrite=overwrite, key=key, facts=facts, check=checked)
    return found


def key_of(opened: Source) -> checkpoint.Key:
    """Return what of a conversion's result its source and the software decide; reads every tensor once."""
    reader, config = opened.opened.reader, opened.opened.config
    text = json.dumps([tensor_sums(reader), config], sort_keys=True, default=str)
    return {
        "source": hashlib.sha256(text.encode()).hexdigest(),
        "versions": ", ".join(f"{name} {version}" for name, version in versions().items()),
        "code": code_digest(),
    }


def _recorded_quality(path: Path, format: str) -> Mapping[str, Any]:
    """Return the quality that a finished checkpoint records."""
    config = FORMATS.get(format).container.config(path) or {}
    found: Mapping[str, Any] = config.get("quantkit", {}).get("quality", {})
    return found


_OWN = ("version", "format", "carried_over")


def _quality(opened: Source, written: Path) -> dict[str, Any]:
    """Return how far the predictions of a converted checkpoint are from those of its source, where numbers were rounded."""
    if not opened.again:
        return {}
    source = opened.opened.path
    before = checkpoint.load(source, cache=False)
    reference = SanityCheck.start(before, load_tokenizer(source))
    quality = reference.measure(reference.recorded_of(checkpoint.load(written, cache=False)))
    log.warning("layers were rounded again: KL to the source %.4g nats per token", quality["kl_mean"])
    return quality
