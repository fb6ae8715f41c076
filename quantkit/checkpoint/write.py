"""Writing: from a model and its quantized sites to a directory that other programs can load, block by block."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from quantkit.checkpoint.card import write_card
from quantkit.checkpoint.check import check, config_json, config_of, dtype_name, layout_bytes, layout_of, replaced_files
from quantkit.checkpoint.contents import (
    Entry,
    aliases,
    carried_layout,
    carried_linears,
    contents_of,
    float_tensor,
    linear_modules,
    lookup,
    quantized_slice,
    read_floats,
    read_site,
    same_bits,
)
from quantkit.checkpoint.digests import Digest
from quantkit.checkpoint.extras import write_extras
from quantkit.checkpoint.handed import Share
from quantkit.checkpoint.on_disk import place_of
from quantkit.checkpoint.publish import INCOMPLETE, container_files, mark_incomplete
from quantkit.checkpoint.read import RECORD as SECTION
from quantkit.checkpoint.record import RECORD, Record, tensor_sums
from quantkit.checkpoint.staging import ALL, Stage
from quantkit.checkpoint.state import Key
from quantkit.checkpoint.verify import same_qtensor
from quantkit.errors import FormatError
from quantkit.formats.base import FORMATS, Stored
from quantkit.hf.ledger import ledger_of
from quantkit.hf.load import PreTrainedModel
from quantkit.nn.on_disk import OnDisk
from quantkit.nn.sites import Structure
from quantkit.qtensor import QTensor
from quantkit.spec import Plan
from quantkit.system.files import clear_errors, write_atomic
from quantkit.system.memory import PageRelease, drop_pages, mapped_pages
from quantkit.version import __version__

Check = Callable[[Path], Mapping[str, Any]]
"""Looks at a complete but not yet published directory; an exception stops it from being published."""


class CheckpointWriter:
    """Write a checkpoint block by block, and go on with one that was not finished.

    Names, sizes and places of all tensors follow from the plan, so each block goes once to its final place in
    ``<path>/incomplete`` (:mod:`quantkit.checkpoint.staging`) and nothing is kept in memory. :meth:`finish` publishes. Whoever
    writes has claimed ``path`` (:func:`quantkit.checkpoint.claim`) until then, so that nobody else writes there.

    Args:
        path: directory, created if need be.
        model: the model, float or already quantized; unquantized tensors are read from it as their block is written.
        plan: site name to scheme.
        format: name in :data:`quantkit.formats.base.FORMATS`.
        overwrite: replace a model that is already there, at the very end.
        key: what decides the codes and floats that will be written; with it, a killed run can be continued.
        resume: continue an unfinished run of the same key; otherwise what is left of any run goes.
        floats: returns a tensor that is stored in float; None takes them from the model.

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
        key: Key | None = None,
        resume: bool = True,
        floats: Callable[[Entry], Tensor] | None = None,
    ) -> None:
        self.path, self.model, self.plan, self.format = Path(path), model, dict(plan), format
        self._rule, self._floats = FORMATS.get(format), floats
        self._contents = contents_of(config_of(model))
        check(self._contents, self.path, model, plan, format, overwrite)
        if not (self.path / self._rule.container.key_file).exists():
            mark_incomplete(self.path, "a quantkit run has not finished writing this checkpoint; run it again")
        self._stored = {
            entry.name: Stored(self.plan[entry.site.name], self._rule.codec(self.plan[entry.site.name]))
            for entry in self._contents.entries
            if entry.site and entry.site.name in self.plan
        }
        self._layouts = {e.name: layout_of(self._contents, model, plan, format, e) for e in self._contents.entries}
        self._ledger = ledger_of(model)
        carried = [{name: what} for name, what in carried_layout(self._ledger).items()]
        self._stage = Stage(self.path, key, resume=resume)
        self._files = self._rule.container.writer(self._stage.path, [*self._layouts.values(), *carried])
        self._stage.begin()
        self._written = set(range(self._stage.finished))
        self._sums: dict[str, str] = {}
        self._carry_out_changes()

    @property
    def structure(self) -> Structure:
        """Blocks and sites of the model, as the checkpoint orders them."""
        return self._contents.structure

    @property
    def finished(self) -> int:
        """Number of leading blocks that a run of the same key has finished; the rest is to be written."""
        return self._stage.finished

    @property
    def changes(self) -> dict[str, Any]:
        """Steps that have changed the finished blocks since, by name, and what :meth:`change_blocks` was told of them."""
        return self._stage.changes

    @property
    def stored_bytes(self) -> dict[str, int]:
        """Bytes of everything that stands for a quantized layer, by the layer's name."""
        found: dict[str, int] = {}
        for entry in self._contents.entries:
            if entry.site and entry.name in self._stored:
                found[entry.site.name] = found.get(entry.site.name, 0) + layout_bytes(self._layouts[entry.name])
        return found

    @property
    def handed(self) -> list[str]:
        """Digests of the files of what the last of the finished blocks handed on; see :mod:`quantkit.checkpoint.handed`."""
        return self._stage.handed

    def write_block(
        self,
        index: int,
        qtensors: Mapping[str, QTensor],
        *,
        facts: Mapping[str, Any] | None = None,
        chain: Sequence[Tensor] = (),
        share: Share = ALL,
    ) -> None:
        """Write block ``index`` (the number of blocks stands for everything outside them).

        Args:
            index: position in ``describe(model).blocks``.
            qtensors: site name to quantized weight, exactly the block's sites in the plan.
            facts: JSON-able, kept until :meth:`finish` and returned by :meth:`restore_block`.
            chain: tensors that a continued run wants to go on with after this block: its outputs. Only the newest are kept.
            share: which part of them this is; the other workers write theirs.

        Raises:
            FormatError: a site is missing, or its grid or shape is not the plan's, or the disk is full.
        """
        wanted = {entry.site.name for entry in self._entries(index) if entry.site and entry.name in self._stored}
        if wanted != set(qtensors):
            raise FormatError(f"block {index}: got {sorted(qtensors)}, the plan wants {sorted(wanted)}")
        if index in self._written:
            raise FormatError(f"block {index} is written twice")
        digest, pages = Digest(), PageRelease()
        for entry in self._entries(index):
            tensors = self._encode(entry, qtensors)
            self._files.write(tensors)
            digest.add(tensors)
            pages.add(*tensors.values())
        pages.flush()
        if self._stage.key is not None and index < len(self.structure.blocks):
            self._files.flush()
            self._stage.record(index, digest.hexdigest(), facts or {}, chain, share)
        self._sums |= digest.sums
        self._written.add(index)

    def on_disk(self, index: int, qtensors: Mapping[str, QTensor]) -> dict[str, OnDisk]:
        """Return where the quantized sites of a written block are, for who does not want to keep them in memory.

        Raises:
            FormatError: what is read there is not ``qtensors``, bit for bit: the disk, or the format, lost bits.
        """
        entries, found = self._entries(index), {}
        view = getattr(self._files, "view", None)
        if view is None:  # a container from elsewhere, whose tensors have no place: they stay in memory
            return {}
        for site in dict.fromkeys(e.site for e in entries if e.site and e.name in self._stored):
            found[site.name] = place = place_of(site, self.plan[site.name], entries, self._stored, view)
            if not same_qtensor(place.read(), qtensors[site.name]):
                raise FormatError(f"{self._stage.path}: {site.name} is not what was written; the disk or the format lost bits")
        drop_pages(mapped_pages(view for place in found.values() for view in place.views))
        return found

    def restore_block(self, index: int) -> tuple[dict[str, QTensor], dict[str, Any]]:
        """Return the quantized sites of finished block ``index`` by name, and its facts.

        Its unquantized tensors are put into the model, where they are not what they were when the block was finished.

        Raises:
            FormatError: what is on the disk is not what was written.
        """
        tensors = {name: self._files.read(name) for entry in self._entries(index) for name in self._layouts[entry.name]}
        recorded, facts = self._stage.block(index)
        found = Digest()
        found.add(tensors)
        self._sums |= found.sums
        if found.hexdigest() != recorded:
            raise FormatError(
                f"{self._stage.path}: block {index} is not what was written; "
                "the disk lost bits, or another run writes there; pass resume=False to start over"
            )
        entries = self._entries(index)
        for name, value in read_floats(self._contents, (e for e in entries if e.name not in self._stored), tensors.__getitem__):
            own = lookup(self.model, name)
            if not same_bits(value, own):
                owner, _, attribute = name.rpartition(".")
                getattr(self.model.get_submodule(owner), attribute).data = value.to(own.device)  # the old may be shared
        sites = {e.site.name: e.site for e in entries if e.site and e.name in self._stored}
        return {name: read_site(site, entries, self._stored, tensors.__getitem__) for name, site in sites.items()}, facts

    def change_blocks(self, step: str, qtensors: Mapping[str, QTensor], facts: Any = None) -> None:
        """Replace what all blocks hold by what a later step has made of it: all of it, or after a kill nothing.

        Args:
            step: name of the step, for :attr:`changes`.
            qtensors: site name to quantized weight of every planned site in the blocks.
            facts: JSON-able, about the step.

        Raises:
            FormatError: as :meth:`write_block`, or not all blocks are written.
        """
        self._refuse_gaps()
        changed: dict[str, Tensor] = {}
        digests: dict[int, str] = {}
        for index in range(len(self.structure.blocks)):
            digest = Digest()
            for entry in self._entries(index):
                tensors = self._encode(entry, qtensors)
                digest.add(tensors)
                changed |= {name: tensor for name, tensor in tensors.items() if not same_bits(self._files.read(name), tensor)}
            digests[index] = digest.hexdigest()
            self._sums |= digest.sums
        if self._stage.key is None:
            self._files.write(changed)
            return
        self._stage.plan_changes(step, facts, changed, digests)
        self._carry_out_changes()

    def finish(
        self,
        metadata: Mapping[str, Any] | None = None,
        *,
        outside: Mapping[str, QTensor] | None = None,
        tokenizer: Any = None,
        run: Mapping[str, Any] | None = None,
        check: Check | None = None,
    ) -> Path:
        """Write what is left and move the checkpoint into place.

        Args:
            metadata: JSON-able facts for the ``quantkit`` section of the config.
            run: JSON-able facts for :attr:`quantkit.checkpoint.record.Record.run`.
            outside: quantized sites outside every block.
            tokenizer: saved along.
            check: called with the complete but not yet published directory; what it returns is recorded as
                ``quality``, and an exception leaves the previous state intact.

        Raises:
            FormatError: a block was not written, or the disk is full.
        """
        self._refuse_gaps()
        last = len(self.structure.blocks)
        if last not in self._written:
            self.write_block(last, outside or {})
        self._carry_over()
        with self._stage.extras() as folder:
            write_extras(folder, self.model, tokenizer)
        facts = dict(metadata or {})
        self._files.finish(self._config(facts))
        self._write_record(run or {})
        with clear_errors(f"write to {self._stage.path}"):
            (self._stage.path / INCOMPLETE).unlink()
        if check is not None:
            try:
                found = check(self._stage.path)
            except BaseException:
                if not (self._stage.path / INCOMPLETE).exists():
                    mark_incomplete(self._stage.path, "a check of the files failed")
                raise
            if found:
                facts["quality"] = {**facts.get("quality", {}), **found}
                self._files.finish(self._config(facts))
        self._write_card(self._config(facts))
        self._stage.publish(replaced_files(self.path), self._rule.container.key_file)
        return self.path

    def _write_record(self, run: Mapping[str, Any]) -> None:
        """Note the checksums of all tensors as they are on the disk, and what belongs to the checkpoint."""
        files = {RECORD, *container_files(self._stage.path), *self._stage.extra_names}
        with self._rule.container.reader(self._stage.path) as reader:
            tensors = tensor_sums(reader)
        if lost := next((name for name, one in self._sums.items() if tensors.get(name) != one), None):
            raise FormatError(f"{self._stage.path}: {lost} is not what was written; the disk lost bits; run it again")
        record = Record(__version__, self.format, sorted(files), tensors, dict(self._stage.key or {}), dict(run))
        with self._stage.extras() as folder:
            write_atomic(folder / RECORD, record.text())

    def _write_card(self, config: Mapping[str, Any]) -> None:
        carried = carried_layout(self._ledger)
        own = sum(layout_bytes(layout) for layout in self._layouts.values())
        facts = {"tensors": f"{own + layout_bytes(carried):,} bytes"}
        if carried:
            facts["carried over unchanged"] = (
                f"{len(carried)} tensors that this class does not run, {layout_bytes(carried):,} bytes"
            )
        with self._stage.extras() as folder:
            write_card(folder, self.path, config, facts, str(self.model.config.name_or_path))

    def _carry_over(self) -> None:
        """Copy what the model's class does not know from the source's files, one tensor at a time."""
        if self._ledger is None:
            return
        with self._ledger.tensors() as read:
            for name in self._ledger.carried:
                self._files.write({name: read(name)})

    def _entries(self, index: int) -> list[Entry]:
        return [entry for entry in self._contents.entries if entry.block == index]

    def _refuse_gaps(self) -> None:
        if missing := sorted(set(range(len(self.structure.blocks))) - self._written):
            raise FormatError(f"blocks {missing} have not been written; call write_block for each before finish")

    def _encode(self, entry: Entry, qtensors: Mapping[str, QTensor]) -> dict[str, Tensor]:
        if entry.name not in self._stored or entry.site is None:
            own = (
                self._floats(entry) if self._floats else float_tensor(self.model, entry, self._contents.transposed, copy=False)
            )
            return {entry.name: own}
        scheme, codec = self._stored[entry.name].scheme, self._stored[entry.name].codec
        qtensor = qtensors[entry.site.name]
        if qtensor.spec != scheme.weight or qtensor.shape != entry.site.shape:
            raise FormatError(
                f"{entry.site.name}: got {qtensor.spec.describe()} {qtensor.shape}, "
                f"the plan says {scheme.weight.describe()} {entry.site.shape}"
            )
        tensors = codec.encode(quantized_slice(qtensor, entry).to("cpu"))
        return {f"{entry.module}.{suffix}": tensor for suffix, tensor in tensors.items()}

    def _carry_out_changes(self) -> None:
        changes = self._stage.planned_changes()
        if changes is not None:
            self._files.write(changes)
            self._files.flush()
            self._stage.record_changes()

    def _config(self, metadata: Mapping[str, Any]) -> dict[str, Any]:
        config = config_json(self.model)
        quantized = {e.name: e for e in self._contents.entries if e.name in self._stored}
        plan = {name: self._stored[e.name].scheme for e in quantized.values() for name in aliases(e)}
        dtype = dtype_name(self.model)
        ignore = sorted({*linear_modules(self._contents, quantized), *carried_linears(self._ledger)})
        config = {key: value for key, value in config.items() if key not in ("quantization_config", "quantization")}
        if said := self._rule.dialect.dump_config(plan, ignore, dtype):
            config["quantization_config"] = said
        config |= self._rule.also(config)
        carried = {"carried_over": list(self._ledger.carried)} if self._ledger and self._ledger.carried else {}
        config[SECTION] = {"version": __version__, "format": self.format, **metadata, **carried}
        return config
