"""A float model in another file: a directory of transformers as a GGUF file, and a GGUF file of anybody's as a directory.

What :func:`quantkit.reformat` does with a model that has no codes, or whose codes its format alone knows. Numbers stay what
they are, or become those of another dtype where that was asked for; a number that is too large for it is refused.
"""

import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch

from quantkit import checkpoint
from quantkit.checkpoint.check import config_json, config_of
from quantkit.checkpoint.contents import contents_of, float_tensor, same_bits
from quantkit.checkpoint.digests import sums
from quantkit.checkpoint.write import CheckpointWriter
from quantkit.errors import FormatError
from quantkit.formats.base import FORMATS
from quantkit.hf.ledger import ledger_of
from quantkit.hf.load import PreTrainedModel, load_float
from quantkit.pipeline.again import is_done
from quantkit.pipeline.resume import code_digest, versions
from quantkit.system.files import known_sha256

GGUF: Final = ".gguf"

log = logging.getLogger(__name__)


def convert_floats(source: Path, format: str, target: Path, *, dtype: torch.dtype | None, overwrite: bool) -> dict[str, Any]:
    """Write a float model in another format; ``target`` is claimed.

    Args:
        source: a float directory, or a GGUF file, whose blocks become floats.
        format: a format that holds models without a quantized layer.
        target: directory to write to.
        dtype: of all weights; None keeps what the source names (float32 for a GGUF file that names none).
        overwrite: replace a model that is there.

    Returns:
        What :func:`quantkit.reformat` returns.

    Raises:
        FormatError: the format holds no such model, or this one not; a number is none in ``dtype``.
    """
    if not FORMATS.get(format).floats:
        able = " and ".join(name for name, one in FORMATS if one.floats)
        what = "is read as floats" if source.suffix == GGUF else "is a float model"
        raise FormatError(
            f"{source} {what}, and format {format} holds codes; make some: quantkit quantize {source} --format {format}; "
            f"floats go into the formats {able}"
        )
    origin = "gguf" if source.suffix == GGUF else "float"
    model, tokenizer = load_float(source, dtype)
    _refuse_infinite(model, source)
    key = {**_key_of(model, source), "format": format, "settings": f"float, dtype={dtype}"}
    result = {"path": str(target), "format": format, "from": origin, "layers": 0, "rounded": []}
    if is_done(target, key, overwrite=overwrite):
        return {**result, "already_done": True}
    checkpoint.check_output(target, model, {}, format=format, overwrite=overwrite, key=key, tokenizer=tokenizer)
    writer = CheckpointWriter(target, model, plan={}, format=format, overwrite=overwrite, key=key)
    for index in range(writer.finished, len(writer.structure.blocks)):
        writer.write_block(index, {})

    def compare(stage: Path) -> Mapping[str, Any]:
        _verify(stage, format, model)
        return {}

    writer.finish({"converted_from": origin}, tokenizer=tokenizer, check=compare)
    return {**result, "already_done": False}


def _refuse_infinite(model: PreTrainedModel, source: Path) -> None:
    """Refuse numbers that are none, which a narrower dtype makes of those that it does not have."""
    for name, parameter in model.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise FormatError(
                f"{source}: {name} holds NaN or infinity in {parameter.dtype}; if it does not in the source, its numbers are "
                "too large for that: use bfloat16 or float32 (dtype)"
            )


def _key_of(model: PreTrainedModel, source: Path) -> checkpoint.Key:
    """Return what of a conversion's result its source and the software decide; reads every tensor once."""
    ledger = ledger_of(model)
    if ledger is None:
        said: Any = known_sha256(source)
    else:
        with ledger.open() as opened:
            said = dict(sums((name, opened.read(name, copy=False)) for name in sorted(opened.headers)))
    text = json.dumps([said, config_json(model)], sort_keys=True, default=str)
    return {
        "source": hashlib.sha256(text.encode()).hexdigest(),
        "versions": ", ".join(f"{name} {version}" for name, version in versions().items()),
        "code": code_digest(),
    }


def _verify(stage: Path, format: str, model: PreTrainedModel) -> None:
    """Read what was written and compare all of it with the model."""
    contents = contents_of(config_of(model))
    with FORMATS.get(format).container.reader(stage) as reader:
        for entry in contents.entries:
            own = float_tensor(model, entry, contents.transposed, copy=False)
            if not same_bits(reader.read(entry.name), own):
                raise FormatError(f"{stage}: {entry.name} is not what was written; the disk or the format lost bits")
    if FORMATS.get(format).container.config(stage) is None:
        raise FormatError(f"{stage} is no checkpoint of format {format}")
