"""Writing: from a model and its quantized sites to a directory that other programs can load."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from quantkit.checkpoint.check import MODEL_FILES, check, config_of, dtype_name, layout_bytes, layout_of
from quantkit.checkpoint.contents import Entry, aliases, contents_of, float_tensor, linear_modules, quantized_slice
from quantkit.checkpoint.files import INCOMPLETE, index_name, mark_incomplete, single_name, write_shard
from quantkit.checkpoint.verify import installed, installed_plan, verify
from quantkit.errors import FormatError
from quantkit.formats.base import FORMATS
from quantkit.hf.load import PreTrainedModel
from quantkit.qtensor import GridTensor
from quantkit.spec import Plan
from quantkit.system.files import remove_temporaries, write_atomic, write_json
from quantkit.version import __version__

MAX_SHARD_BYTES = 5_000_000_000
"""Largest shard, unless one weight alone is larger."""

_STAGE = "incomplete"


class CheckpointWriter:
    """Write a checkpoint block by block.

    Shards are planned from predicted sizes, so their final names and contents are known from the start; one is written as soon
    as its last tensor arrives. At most one shard is held in memory. Everything goes to ``<path>/incomplete`` until
    :meth:`finish`.

    Args:
        path: directory, created if need be.
        model: the model, float or already quantized; unquantized tensors are read from it as their block is written.
        plan: site name to scheme.
        format: name in :data:`quantkit.formats.base.FORMATS`.
        overwrite: replace a model that is already there, at the very end.

    Raises:
        FormatError: see :func:`check_output`.
    """

    def __init__(
        self,
        path: str | Path,
        model: PreTrainedModel,
        *,
        plan: Plan,
        format: str = "compressed-tensors",
        overwrite: bool = False,
    ) -> None:
        self.path, self.model, self.plan, self.format = Path(path), model, dict(plan), format
        self._contents = contents_of(config_of(model))
        check(self._contents, self.path, model, plan, format, overwrite)
        self._stage = self.path / _STAGE
        if self._stage.exists():
            shutil.rmtree(self._stage)
        self._stage.mkdir()
        if not any(self.path.glob("config.json")):
            mark_incomplete(self.path, "a quantkit run has not finished writing this checkpoint; run it again")
        mark_incomplete(self._stage, "a quantkit run has not finished writing this checkpoint; run it again")
        self._shard_of, self._sizes = self._plan_shards()
        self._waiting = [sum(1 for shard in self._shard_of.values() if shard == i) for i in range(len(self._sizes))]
        self._tensors: list[dict[str, Tensor]] = [{} for _ in self._sizes]
        self._weight_map: dict[str, str] = {}
        self._written: set[int] = set()

    def write_block(self, index: int, qtensors: Mapping[str, GridTensor]) -> None:
        """Write block ``index`` (the number of blocks stands for everything outside them).

        Args:
            index: position in ``describe(model).blocks``.
            qtensors: site name to quantized weight, exactly the block's sites in the plan.

        Raises:
            FormatError: a site is missing, or its grid or shape is not the plan's, or the disk is full.
        """
        entries = [entry for entry in self._contents.entries if entry.block == index]
        wanted = {entry.site.name for entry in entries if entry.site and entry.site.name in self.plan}
        if wanted != set(qtensors):
            raise FormatError(f"block {index}: got {sorted(qtensors)}, the plan wants {sorted(wanted)}")
        if index in self._written:
            raise FormatError(f"block {index} is written twice")
        for entry in entries:
            self._add(entry, self._encode(entry, qtensors))
        self._written.add(index)

    def finish(
        self,
        metadata: Mapping[str, Any] | None = None,
        *,
        outside: Mapping[str, GridTensor] | None = None,
        tokenizer: Any = None,
        prove: Callable[[Path], Mapping[str, Any]] | None = None,
    ) -> Path:
        """Write what is left and move the checkpoint into place.

        Args:
            metadata: JSON-able facts for the ``quantkit`` section of config.json.
            outside: quantized sites outside every block.
            tokenizer: saved along.
            prove: called with the complete but not yet published directory; what it returns is recorded as
                ``quality``, and an exception leaves the previous state intact.

        Raises:
            FormatError: a block was not written, or the disk is full.
        """
        last = len(self._contents.structure.blocks)
        if missing := sorted(set(range(last)) - self._written):
            raise FormatError(f"blocks {missing} have not been written; call write_block for each before finish")
        if last not in self._written:
            self.write_block(last, outside or {})
        self._write_index()
        _write_extras(self._stage, self.model, tokenizer)
        facts = dict(metadata or {})
        self._write_config(facts)
        (self._stage / INCOMPLETE).unlink()
        if prove is not None and (found := prove(self._stage)):
            facts["quality"] = {**facts.get("quality", {}), **found}
            self._write_config(facts)
        self._publish()
        return self.path

    def _encode(self, entry: Entry, qtensors: Mapping[str, GridTensor]) -> dict[str, Tensor]:
        scheme = self.plan.get(entry.site.name) if entry.site else None
        if scheme is None or entry.site is None:
            return {entry.name: float_tensor(self.model, entry, self._contents.transposed)}
        qtensor = qtensors[entry.site.name]
        if qtensor.spec != scheme.weight or qtensor.shape != entry.site.shape:
            raise FormatError(
                f"{entry.site.name}: got {qtensor.spec.describe()} {qtensor.shape}, "
                f"the plan says {scheme.weight.describe()} {entry.site.shape}"
            )
        part = quantized_slice(qtensor, entry).to("cpu")
        tensors = FORMATS.get(self.format).codec(scheme).encode(part)
        return {f"{entry.module}.{suffix}": _own(tensor) for suffix, tensor in tensors.items()}

    def _add(self, entry: Entry, tensors: dict[str, Tensor]) -> None:
        shard = self._shard_of[entry.name]
        self._tensors[shard].update(tensors)
        self._waiting[shard] -= 1
        if self._waiting[shard] == 0:
            name = _shard_name(FORMATS.get(self.format).stem, shard, len(self._sizes))
            write_shard(self._stage / name, self._tensors[shard])
            self._weight_map.update(dict.fromkeys(self._tensors[shard], name))
            self._tensors[shard] = {}

    def _plan_shards(self) -> tuple[dict[str, int], list[int]]:
        """Fill shards in order; return entry name to shard, and the bytes of each."""
        shard_of, sizes = {}, [0]
        for entry in self._contents.entries:
            size = layout_bytes(layout_of(self._contents, self.model, self.plan, self.format, entry))
            if sizes[-1] and sizes[-1] + size > MAX_SHARD_BYTES:
                sizes.append(0)
            shard_of[entry.name] = len(sizes) - 1
            sizes[-1] += size
        return shard_of, sizes

    def _write_index(self) -> None:
        if len(self._sizes) > 1:
            index = {"metadata": {"total_size": sum(self._sizes)}, "weight_map": dict(sorted(self._weight_map.items()))}
            write_json(self._stage / index_name(FORMATS.get(self.format).stem), index)

    def _write_config(self, metadata: Mapping[str, Any]) -> None:
        config = json.loads(self.model.config.to_json_string(use_diff=True))
        quantized = {e.name: e for e in self._contents.entries if e.site and e.site.name in self.plan}
        plan = {name: self.plan[e.site.name] for e in quantized.values() if e.site for name in aliases(e)}
        ignore = linear_modules(self._contents, quantized)
        dtype = dtype_name(self.model)
        config["architectures"] = [type(self.model).__name__]
        config["dtype"] = dtype
        config["quantization_config"] = FORMATS.get(self.format).dump_config(plan, ignore, dtype)
        config["quantkit"] = {"version": __version__, "format": self.format, **metadata}
        write_json(self._stage / "config.json", config)

    def _publish(self) -> None:
        """Move the staged files into place: old model files out, new ones in, config.json last."""
        mark_incomplete(self.path, "a quantkit run was stopped while it moved this checkpoint into place; run it again")
        for old in [file for pattern in (*MODEL_FILES, "generation_config.json") for file in self.path.glob(pattern)]:
            old.unlink()
        names = sorted(file.name for file in self._stage.iterdir())
        for name in [n for n in names if n != "config.json"] + ["config.json"]:
            (self._stage / name).replace(self.path / name)
        self._stage.rmdir()
        remove_temporaries(self.path)
        (self.path / INCOMPLETE).unlink()


def _shard_name(stem: str, index: int, count: int) -> str:
    return single_name(stem) if count == 1 else f"{stem}-{index + 1:05d}-of-{count:05d}.safetensors"


def _own(tensor: Tensor) -> Tensor:
    """Return ``tensor`` in storage of its own: safetensors refuses views of shared memory."""
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def _write_extras(path: Path, model: PreTrainedModel, tokenizer: Any) -> None:
    generation = getattr(model, "generation_config", None)
    if generation is not None:
        write_atomic(path / "generation_config.json", generation.to_json_string(use_diff=True))
    if tokenizer is not None:
        tokenizer.save_pretrained(path)


def save(
    model: PreTrainedModel,
    path: str | Path,
    *,
    plan: Plan | None = None,
    format: str = "compressed-tensors",
    tokenizer: Any = None,
    metadata: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    prove: Callable[[Path], Mapping[str, Any]] | None = None,
) -> Path:
    """Write a model whose sites are already quantized, and compare the files bit for bit before they are published.

    Args:
        model: model with :class:`QuantLinear` and :class:`QuantWeight` in place.
        path: directory.
        plan: site name to scheme; None takes what is installed as it is.
        format: name in :data:`quantkit.formats.base.FORMATS`.
        tokenizer: saved along.
        metadata: JSON-able facts for the ``quantkit`` section of config.json.
        overwrite: replace a model that is already there.
        prove: an additional proof, see :meth:`CheckpointWriter.finish`.

    Raises:
        FormatError: see :func:`check_output` and :func:`verify`.
    """
    found = installed(model)
    plan = installed_plan(model) if plan is None else plan
    if found.keys() != plan.keys():
        odd = sorted(found.keys() ^ plan.keys())
        raise FormatError(f"{odd[0]} is {'quantized' if odd[0] in found else 'not quantized'} in the model, unlike in the plan")
    writer = CheckpointWriter(path, model, plan=plan, format=format, overwrite=overwrite)
    structure = writer._contents.structure
    for i, block in enumerate(structure.blocks):
        writer.write_block(i, {site.name: found[site.name] for site in block.sites if site.name in found})
    outside = {site.name: found[site.name] for site in structure.after if site.name in found}

    def prove_all(stage: Path) -> Mapping[str, Any]:
        verify(stage, model)
        return prove(stage) if prove is not None else {}

    return writer.finish(metadata, outside=outside, tokenizer=tokenizer, prove=prove_all)
