"""A checkpoint in another format: decoded and encoded tensor by tensor, without a model in memory.

What is quantized keeps its numbers where the other format's grids have them (:mod:`quantkit.checkpoint.regrid`); where they do
not, the layer is refused by name, or rounded again if that was asked for. The files are read back and compared before they are
published: every tensor must be the one that was encoded, and decode to the very numbers of the source.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quantkit.checkpoint.check import rejections_in
from quantkit.checkpoint.contents import Entry, read_site, same_bits
from quantkit.checkpoint.read import Opened, open_checkpoint
from quantkit.checkpoint.regrid import regridded, rounded, roundings
from quantkit.checkpoint.shared import accepted, holders, refusal, shapes_of
from quantkit.checkpoint.state import Key
from quantkit.checkpoint.write import CheckpointWriter
from quantkit.errors import FormatError
from quantkit.formats.base import FORMATS
from quantkit.hf.building import building
from quantkit.hf.ledger import Ledger, keep_ledger
from quantkit.hf.load import read_generation_config
from quantkit.nn.sites import Site
from quantkit.qtensor import QTensor
from quantkit.spec import QuantSpec, Scheme

FLOAT = "float"
"""The format without codes."""


@dataclass(frozen=True)
class Source:
    """An open checkpoint and what becomes of it.

    Attributes:
        opened: the source.
        plan: layer name to the scheme it has in the other format; empty for float.
        again: names of the layers that are rounded again.
        dtype: dtype of what is written in float, where that was codes.
        all_floats: whether the other floats get it, too.
    """

    opened: Opened
    plan: dict[str, Scheme]
    dtype: torch.dtype
    again: tuple[str, ...] = field(default=())
    all_floats: bool = False

    def qtensor(self, site: Site) -> QTensor:
        """Return a layer as it is written."""
        found, scheme = self.opened.qtensor(site), self.plan[site.name]
        if site.name in self.again:
            return rounded(found, scheme)
        same = regridded(found, scheme.weight)
        if same is None:
            raise FormatError(f"{site.name}: its numbers are not on the grid {scheme.weight.describe()}")
        return same if scheme.static else same.with_parts({"input_scale": None})

    def floats(self, entry: Entry) -> Tensor:
        """Return a tensor that is written in float."""
        opened = self.opened
        if entry.name not in opened.stored:
            own = opened.reader.read(entry.name)
            return own.to(self.dtype) if self.all_floats and own.is_floating_point() else own
        assert entry.site is not None
        alone = dataclasses.replace(entry, source=dataclasses.replace(entry.source, pieces=(_whole(entry),)))
        weight = read_site(entry.site, [alone], opened.stored, opened.reader.read).dequantize(self.dtype)
        return (weight.transpose(-1, -2) if entry.source.transposed else weight).contiguous()


def _whole(entry: Entry) -> Any:
    """Return the piece of a tensor that is read for itself."""
    return dataclasses.replace(entry.source.pieces[0], expert=None, start=0, stop=entry.weight_shape[-2])


@contextmanager
def open_source(path: Path, format: str, *, lossy: bool = False, dtype: torch.dtype | None = None) -> Iterator[Source]:
    """Open a checkpoint and decide what becomes of every layer, before anything is written.

    Raises:
        FormatError: it cannot be read, or the format has no place for a layer's numbers and ``lossy`` is False.
    """
    with open_checkpoint(path) as opened:
        stated = str(opened.config.get("dtype") or opened.config.get("torch_dtype") or "float32").removeprefix("torch.")
        floats = dtype or getattr(torch, stated)
        _prepare(opened, floats, everything=dtype is not None)
        plan: dict[str, Scheme] = {}
        again: list[str] = []
        if not opened.schemes and not FORMATS.get(format).floats:
            raise FormatError(f"{path} holds floats alone, and format {format} holds codes; quantize the float model instead")
        if format != FLOAT:
            name = str(next(opened.contents.model.parameters()).dtype).removeprefix("torch.")
            for site_name, scheme in opened.schemes.items():
                chosen, exact = _choose(opened, opened.contents.sites[site_name], scheme, format, name, lossy)
                plan[site_name] = chosen
                again += [] if exact else [site_name]
            if refused := rejections_in(opened.contents, plan, format, name):
                site_name, reason = next(iter(refused.items()))
                raise FormatError(f"format {format}: {site_name}: {reason}")
        yield Source(opened, plan, floats, tuple(again), dtype is not None)


def _choose(opened: Opened, site: Site, scheme: Scheme, format: str, dtype: str, lossy: bool) -> tuple[Scheme, bool]:
    """Return the scheme of a layer in another format, and whether it has the same numbers there."""
    shapes = shapes_of(opened.contents, site)
    first = refusal(scheme, shapes, format, dtype)
    if first is None:
        return scheme, True
    candidates = [one for one in accepted(scheme, shapes, format, dtype) if one != scheme]
    found = opened.qtensor(site) if candidates else None
    for candidate in candidates:
        if found is not None and regridded(found, candidate.weight) is not None:
            return candidate, True
    if lossy and (close := next((one for one in roundings(scheme, dtype) if not refusal(one, shapes, format, dtype)), None)):
        return close, False
    way_out = "pass lossy=True (--lossy) to round it again" if not lossy else "leave it where it is"
    holds = ", ".join(holders(scheme, shapes, dtype)) or "none"
    raise FormatError(f"format {format}: {site.name}: {first}; formats that hold it: {holds}; {way_out}")


def _prepare(opened: Opened, floats: torch.dtype, *, everything: bool) -> None:
    """Make the empty model say what the files hold: dtypes, ties, files beside the weights."""
    model, reader = opened.contents.model, opened.reader
    for entry in opened.contents.entries:
        own = floats if entry.name in opened.stored else reader.headers[entry.name].dtype
        dtype = floats if everything and own.is_floating_point else own
        for piece in entry.source.pieces:
            _retype(model, piece.parameter, dtype)
    with building:
        model.tie_weights()
    if (opened.path / "generation_config.json").exists() and hasattr(model, "generation_config"):
        model.generation_config = read_generation_config(opened.path)
    reopen = functools.partial(FORMATS.get(opened.format_name).container.reader, opened.path)
    keep_ledger(model, Ledger(opened.path, reader.headers, {}, opened.carried, reopen))


def _retype(model: nn.Module, name: str, dtype: torch.dtype) -> None:
    owner, _, attribute = name.rpartition(".")
    module = model.get_submodule(owner)
    old = getattr(module, attribute)
    if old.dtype == dtype:
        return
    new = torch.empty(old.shape, dtype=dtype, device="meta")
    setattr(module, attribute, nn.Parameter(new, requires_grad=False) if isinstance(old, nn.Parameter) else new)


def write(
    source: Source,
    out: Path,
    format: str,
    *,
    overwrite: bool,
    key: Key,
    facts: Mapping[str, Any],
    check: Callable[[Path], Mapping[str, Any]],
) -> Path:
    """Write a source in another format, and compare the files with it before they are published; ``out`` is claimed.

    A run of the same ``key`` that was killed is continued.
    """
    opened = source.opened
    model: Any = opened.contents.model
    writer = CheckpointWriter(out, model, plan=source.plan, format=format, overwrite=overwrite, key=key, floats=source.floats)
    for index, block in list(enumerate(writer.structure.blocks))[writer.finished :]:
        writer.write_block(index, {site.name: source.qtensor(site) for site in block.sites if site.name in source.plan})
        opened.reader.release()
    outside = {site.name: source.qtensor(site) for site in writer.structure.after if site.name in source.plan}

    def compare(stage: Path) -> Mapping[str, Any]:
        _verify(source, stage, format)
        return check(stage)

    return writer.finish(facts, outside=outside, check=compare)


def _same(wanted: QTensor, found: QTensor) -> bool:
    """Say whether a weight was read back bit for bit.

    A file without a name for its grid may be read on another one with the same numbers: one of ``mlx`` whose zero points are
    all the middle code looks like a symmetric one.
    """
    here = regridded(found, wanted.spec) if isinstance(wanted.spec, QuantSpec) and wanted.spec != found.spec else found
    if here is None or here.spec != wanted.spec:
        return False
    return all(same_bits(part, here.parts().get(key)) for key, part in wanted.parts().items())


def _verify(source: Source, stage: Path, format: str) -> None:
    """Read a written checkpoint and compare all of it with the source."""
    opened = source.opened
    stored = opened.stored if source.plan else {}
    if source.plan:
        with open_checkpoint(stage) as written:
            for name in source.plan:
                site = opened.contents.sites[name]
                if not _same(source.qtensor(site), written.qtensor(site)):
                    raise FormatError(f"{stage}: {name} differs from {opened.path}; the disk or the format lost bits")
    with FORMATS.get(format).container.reader(stage) as reader:
        for entry in opened.contents.entries:
            if entry.name not in stored and not same_bits(reader.read(entry.name), source.floats(entry)):
                raise FormatError(f"{stage}: {entry.name} differs from {opened.path}; the disk lost bits")
        for name in opened.carried:
            if not same_bits(reader.read(name), opened.reader.read(name)):
                raise FormatError(f"{stage}: {name} differs from {opened.path}; the disk lost bits")
