"""Saving: a model whose layers are quantized already, written as it is."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quantkit.checkpoint.staging import claim
from quantkit.checkpoint.verify import installed, installed_plan, verify
from quantkit.checkpoint.write import Check, CheckpointWriter
from quantkit.errors import FormatError
from quantkit.hf.load import PreTrainedModel
from quantkit.spec import Plan


def save(
    model: PreTrainedModel,
    path: str | Path,
    *,
    plan: Plan | None = None,
    format: str = "compressed-tensors",
    tokenizer: Any = None,
    metadata: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    check: Check | None = None,
) -> Path:
    """Write a model whose sites are already quantized, and compare the files bit for bit before they are published.

    Args:
        model: model with :class:`QuantLinear` and :class:`QuantWeight` in place.
        path: directory.
        plan: site name to scheme; None takes what is installed as it is.
        format: name in :data:`quantkit.formats.base.FORMATS`.
        tokenizer: saved along.
        metadata: JSON-able facts for the ``quantkit`` section of the config.
        overwrite: replace a model that is already there.
        check: something else to look at before publishing, see :meth:`CheckpointWriter.finish`.

    Raises:
        FormatError: see :func:`check_output` and :func:`verify`.
    """
    found = installed(model)
    plan = installed_plan(model) if plan is None else plan
    if found.keys() != plan.keys():
        odd = sorted(found.keys() ^ plan.keys())
        raise FormatError(f"{odd[0]} is {'quantized' if odd[0] in found else 'not quantized'} in the model, unlike in the plan")
    with claim(path):
        writer = CheckpointWriter(path, model, plan=plan, format=format, overwrite=overwrite)
        for i, block in enumerate(writer.structure.blocks):
            writer.write_block(i, {site.name: found[site.name] for site in block.sites if site.name in found})
        outside = {site.name: found[site.name] for site in writer.structure.after if site.name in found}

        def check_all(stage: Path) -> Mapping[str, Any]:
            verify(stage, model)
            return check(stage) if check is not None else {}

        return writer.finish(metadata, outside=outside, tokenizer=tokenizer, check=check_all)
