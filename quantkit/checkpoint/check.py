"""Everything that can be refused before a byte is written: sites, directory, disk."""

import copy
import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from quantkit.checkpoint.contents import (
    Contents,
    Entry,
    carried_layout,
    contents_of,
    linear_modules,
    lookup,
    parameter_of,
    rejections_of,
    same_bits,
)
from quantkit.checkpoint.publish import INCOMPLETE, container_files, owner_of_new_files, refuse_foreign
from quantkit.checkpoint.record import RECORD, read_record
from quantkit.checkpoint.staging import find_state, stage_bytes
from quantkit.checkpoint.state import STAGE, Key
from quantkit.errors import FormatError, SpecError, nearest
from quantkit.formats.base import FORMATS
from quantkit.formats.containers.base import Layout
from quantkit.hf.ledger import ledger_of
from quantkit.hf.load import PreTrainedModel, architectures_of, empty_model
from quantkit.hf.reader import transformers_fault, transformers_warning
from quantkit.hf.structure import owners_of
from quantkit.hf.ties import settle_ties
from quantkit.nn.linear import QuantModule
from quantkit.nn.sites import Site
from quantkit.spec import Plan
from quantkit.system.files import clear_errors, read_json, usable_path

log = logging.getLogger(__name__)

FOREIGN_FILES = ("pytorch_model.bin", "pytorch_model-*-of-*.bin", "pytorch_model.bin.index.json")
"""Model files that no format here writes."""

EVALUATION = "evaluation.json"
"""Name of a measurement of the checkpoint that it lies beside."""


def model_files(path: Path) -> list[str]:
    """Return the names of the files that make a directory a model, whatever its format."""
    foreign = [file.name for pattern in FOREIGN_FILES for file in sorted(path.glob(pattern)) if file.is_file()]
    return [*container_files(path), *foreign]


def replaced_files(path: Path) -> list[str]:
    """Return the names of the files in a directory that another checkpoint there takes the place of.

    Those of a model, whoever wrote it; of the rest only what quantkit itself wrote. Everything else is the user's and stays.
    """
    try:
        record = read_record(path)
    except FormatError as error:
        log.warning("%s", error)
        record = None
    known = {*model_files(path), "generation_config.json", RECORD, *(record.files if record else ())}
    if _is_measurement(path / EVALUATION):
        known.add(EVALUATION)
    inside = [name for name in sorted(known) if not Path(name).is_absolute() and ".." not in Path(name).parts]
    return [name for name in inside if (path / name).is_file()]


def _is_measurement(file: Path) -> bool:
    try:
        return file.is_file() and str(read_json(file).get("schema", "")).startswith("quantkit.")
    except FormatError:
        return False


def rejections(model: PreTrainedModel, plan: Plan, format: str = "compressed-tensors") -> dict[str, str]:
    """Say which sites of ``plan`` the format cannot store in this model's checkpoint layout.

    Unlike :meth:`Format.rejects`, this knows the checkpoint's dtype and how transformers cuts stacks of experts apart.

    Returns:
        Site name to reason; empty if everything can be written.
    """
    return rejections_in(contents_of(config_of(model)), plan, format, dtype_name(model))


def rejections_in(contents: Contents, plan: Plan, format: str, dtype: str) -> dict[str, str]:
    """Say the same of a model whose contents are known; ``dtype`` is that of its float weights."""
    if unknown := sorted(plan.keys() - contents.sites.keys()):
        raise SpecError(f"plan names {unknown[0]!r}, which is no layer of the model; {nearest(unknown[0], contents.sites)}")
    rule = FORMATS.get(format)

    def ask(name: str, shape: tuple[int, ...]) -> str | None:
        scheme = plan[name]
        site = contents.sites[name]
        if not rule.dialect.conv1d and site.transposed and len(site.shape) == 2:
            return "it is a Conv1D, which other readers of this format leave uninitialised without an error; use native"
        if site.read and not rule.dialect.embeddings and not _is_linear(contents, site) and len(shape) == len(site.shape):
            return "it is a parameter of its module and no linear layer, which other readers of this format know; use native"
        if site == contents.structure.embedding and not rule.dialect.embeddings:
            return "it is an embedding table, which readers of this format expect in float; use native"
        if len(shape) > 2 and not rule.dialect.embeddings:
            return "the checkpoint holds it as one stack, and other readers of this format know experts one by one; use native"
        if reason := rule.rejects(scheme, shape, dtype):
            return reason
        try:
            rule.codec(scheme).layout(scheme.weight, shape)
        except FormatError as error:
            return str(error)
        return None

    refused = rejections_of(contents, plan, ask)
    stored = {e.name: plan[e.site.name] for e in contents.entries if e.site and e.site.name in plan}
    named = {name.removesuffix(".weight"): scheme for name, scheme in stored.items()}
    if not refused and named and (reason := rule.rejects_plan(named, linear_modules(contents, stored))):
        refused[next(iter(plan))] = reason
    for name, scheme in plan.items():
        rows = scheme.weight.block[0]
        cuts = [p for e in contents.entries if e.site and e.site.name == name for p in e.source.pieces]
        height = contents.sites[name].shape[-2]
        block = height if rows == -1 else rows
        if name not in refused and any(p.start % block or p.stop % block for p in cuts):
            refused[name] = f"the checkpoint cuts it in rows that split a block of {block}; use channel or a group size"
    return refused or (_readers_faults(contents, plan) if rule.packed else {})


def _readers_faults(contents: Contents, plan: Plan) -> dict[str, str]:
    """Return what keeps transformers from reading a checkpoint, by layer or tensor, and warn of what only others read."""
    known = [e for e in contents.entries if not (e.site and e.site.read and e.site.name not in plan)]  # those stand alone there
    stored = {entry.name: (entry.source.pieces[0].parameter, entry.source) for entry in known}
    chosen = {e.name: plan[e.site.name] for e in contents.entries if e.site and e.site.name in plan}
    if text := transformers_warning(chosen, stored):
        log.warning("%s", text)
    shared = set(contents.model.all_tied_weights_keys.values())
    fault = transformers_fault(empty_model(contents.model.config), chosen, stored, shared) if chosen else None
    return dict([fault]) if fault else {}


def _is_linear(contents: Contents, site: Site) -> bool:
    """Return whether a site's parameter is the weight of a linear layer, whatever that makes of it."""
    return isinstance(contents.model.get_submodule(site.module), nn.Linear) and site.parameter == "weight"


def check_output(
    path: str | Path,
    model: PreTrainedModel,
    plan: Plan,
    *,
    format: str = "compressed-tensors",
    overwrite: bool = False,
    key: Key | None = None,
    scratch: int = 0,
    tokenizer: Any = None,
) -> int:
    """Make sure that a checkpoint of ``plan`` can be written to ``path``; return its predicted size in bytes.

    Args:
        path, model, plan, format, overwrite: as for :class:`CheckpointWriter`.
        key: of the run that is going to write; None for one that will not continue another.
        scratch: bytes that are needed beside the checkpoint until it is finished.
        tokenizer: what will be saved along, for formats that have to understand it.

    Raises:
        SpecError: the plan names a site that the model does not have.
        FormatError: the model is not what its config describes, the format cannot store a site, the directory holds another
            model (and ``overwrite`` is False) or the unfinished state of a run with another ``key``, cannot be written to, or
            the disk is too small.
    """
    contents = contents_of(config_of(model))
    size = check(contents, usable_path(path), model, plan, format, overwrite, scratch)
    _refuse_whole(contents, model, format, tokenizer)
    if key is not None:
        find_state(Path(path), key)
    return size


def check(
    contents: Contents, path: Path, model: PreTrainedModel, plan: Plan, format: str, overwrite: bool, scratch: int = 0
) -> int:
    """Do what :func:`check_output` says, given the contents."""
    _refuse_another_model(contents.model, model)
    _refuse_whole(contents, model, format)
    _refuse(rejections_in(contents, plan, format, dtype_name(model)), format)
    _refuse_ties(contents, model, plan)
    ledger = ledger_of(model)
    carried = carried_layout(ledger)
    if ledger is not None:
        with ledger.tensors():  # opens the source's files: are they still there?
            log.debug("%d tensors of %s are carried over", len(carried), ledger.path)
    if odd := sorted(carried.keys() & {entry.name for entry in contents.entries}):
        raise FormatError(f"{odd[0]} is carried over from the source, but the checkpoint has a tensor of this name already")
    total = total_bytes(contents, model, plan, format)
    _check_directory(path, total + scratch, overwrite)
    for text in converted_buffers(model, contents.model):
        log.warning("%s", text)
    return total


def _refuse_whole(contents: Contents, model: PreTrainedModel, format: str, tokenizer: Any = None) -> None:
    """Refuse a model, or its tokenizer, that the format as a whole cannot say."""
    refuses = FORMATS.get(format).refuses
    if refuses is None:
        return
    names = [*(entry.name for entry in contents.entries), *carried_layout(ledger_of(model))]
    backend = getattr(tokenizer, "backend_tokenizer", None)
    said = json.loads(backend.to_str()) if backend is not None else None
    if tokenizer is not None and backend is None:
        raise FormatError(f"format {format}: {type(tokenizer).__name__} has no tokenizer.json; use a fast tokenizer")
    if reason := refuses(config_json(model), names, said):
        raise FormatError(f"format {format}: {reason}")


def converted_buffers(model: nn.Module, loaded: nn.Module) -> list[str]:
    """Say which buffers have another dtype than in a model that is loaded, where they come from the config.

    ``model.to(torch.bfloat16)`` rounds rotary frequencies too, which loading in bfloat16 does not: the two compute differently.
    """
    fresh = dict(loaded.named_buffers())
    pairs = [(name, buffer.dtype, fresh[name].dtype) for name, buffer in model.named_buffers() if name in fresh]
    return [
        f"{name} is {own} in memory and {other} where a checkpoint is loaded; load the model with dtype=, do not convert it"
        for name, own, other in pairs
        if own != other
    ]


def _refuse_another_model(described: nn.Module, model: nn.Module) -> None:
    """Refuse a model with parameters that its config does not describe, or without some that it does.

    A checkpoint is read as the model that its config describes: what is more is lost, and a bias is small enough to pass a
    comparison of logits. What a quantized layer holds is the format's to check.
    """
    done = tuple(f"{name}." for name, module in model.named_modules(remove_duplicate=False) if isinstance(module, QuantModule))
    own, want = (
        {n: tuple(p.shape) for n, p in one.named_parameters(remove_duplicate=False) if not f"{n}.".startswith(done)}
        for one in (model, described)
    )
    odd = [f"{name} {own[name]} is in this model only" for name in own.keys() - want.keys()]
    odd += [f"{name} {want[name]} is missing" for name in want.keys() - own.keys()]
    odd += [f"{n} is {own[n]} in this model, want {want[n]}" for n in own.keys() & want.keys() if own[n] != want[n]]
    if odd:
        more = f" (and {len(odd) - 1} more)" if len(odd) > 1 else ""
        raise FormatError(
            f"the model is not the {type(model).__name__} that its config describes: {min(odd)}{more}; correct the config, or "
            "take back what was added to the model or taken out of it"
        )


def _refuse(refused: Mapping[str, str], format: str) -> None:
    if refused:
        name, reason = next(iter(refused.items()))
        more = f" (and {len(refused) - 1} more layers)" if len(refused) > 1 else ""
        raise FormatError(f"format {format}: {name}: {reason}{more}")


def _check_directory(path: Path, total: int, overwrite: bool) -> None:
    with clear_errors(f"write to {path}"):
        if path.exists() and not path.is_dir():
            raise FormatError(f"{path} is a file; want a directory to write the checkpoint to")
        found = model_files(path)
        if found and not (path / INCOMPLETE).exists() and not overwrite:
            raise FormatError(f"{path} already holds a model ({found[0]}); choose another directory or pass overwrite=True")
        path.mkdir(parents=True, exist_ok=True)
        refuse_foreign(path / STAGE, owner_of_new_files(path))
        free = shutil.disk_usage(path).free + stage_bytes(path)
        strangers = [file.name for file in path.glob("*.safetensors") if file.name not in found]
    if total > free:
        raise FormatError(f"{path}: the run needs {total / 1e9:.2f} GB but only {free / 1e9:.2f} GB are free there")
    if strangers:
        log.warning(
            "%s: %s is no file of this checkpoint and stays; some programs read every .safetensors file of a directory",
            path,
            strangers[0],
        )


def _refuse_ties(contents: Contents, model: nn.Module, plan: Plan) -> None:
    """Refuse what the model ties and a reader of its config would not, or the other way round."""
    owners, tied = owners_of(model), contents.model.all_tied_weights_keys
    kind = type(model).__name__
    for target, source in tied.items():
        if owners.get(target) != owners.get(source) and not same_bits(lookup(model, target).cpu(), lookup(model, source)):
            raise FormatError(
                f"{target} and {source} are one tensor in every {kind} of this config, but differ in this model; a checkpoint "
                "has place for one of them. Tie them, or use a config that does not"
            )
    sites = {parameter_of(site): name for name, site in contents.sites.items()}
    for name, owner in owners.items():
        if name != owner and name not in tied and sites.get(owner) in plan:
            raise FormatError(
                f"{name} and {owner} are one tensor in this model, but two in every {kind} loaded from its config; give "
                "each layer its own before quantizing (copy.deepcopy), or leave both in float (a rule with skip)"
            )


def config_of(model: PreTrainedModel) -> Any:
    """Return a copy of the model's config that says what the model is: its class, and whether its head is tied."""
    config = copy.deepcopy(model.config)
    config.architectures = architectures_of(model)
    settle_ties(model, config)
    return config


def config_json(model: PreTrainedModel) -> dict[str, Any]:
    """Return what config.json will say of the model itself."""
    config: dict[str, Any] = json.loads(config_of(model).to_json_string(use_diff=True))
    return config | {"dtype": dtype_name(model)}


def dtype_name(model: PreTrainedModel) -> str:
    """Return the dtype of the model's float weights as config.json spells it."""
    return str(model.dtype).removeprefix("torch.")


def layout_bytes(layout: Layout) -> int:
    """Return the bytes of all tensors in a layout."""
    return sum(dtype.itemsize * torch.Size(shape).numel() for dtype, shape in layout.values())


def total_bytes(contents: Contents, model: nn.Module, plan: Plan, format: str) -> int:
    """Return the bytes of all tensors of a checkpoint."""
    own = sum(layout_bytes(layout_of(contents, model, plan, format, entry)) for entry in contents.entries)
    return own + layout_bytes(carried_layout(ledger_of(model)))


def layout_of(contents: Contents, model: nn.Module, plan: Plan, format: str, entry: Entry) -> Layout:
    """Return full tensor name to (dtype, shape) of everything that stands for ``entry`` in the checkpoint."""
    scheme = plan.get(entry.site.name) if entry.site else None
    if scheme is None:
        return {entry.name: (lookup(model, entry.source.pieces[0].parameter).dtype, entry.shape)}
    layout = FORMATS.get(format).codec(scheme).layout(scheme.weight, entry.weight_shape)
    return {f"{entry.module}.{suffix}": what for suffix, what in layout.items()}
