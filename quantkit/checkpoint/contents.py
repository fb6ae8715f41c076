"""What a checkpoint of a model consists of: every tensor's name, shape and origin, in the order it is written.

Derived from the model's config alone (through an empty model), so writer and reader cannot disagree.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from quantkit.errors import FormatError, QuantkitError, SpecError
from quantkit.formats.base import Stored
from quantkit.formats.containers.base import Layout
from quantkit.hf.account import account
from quantkit.hf.experts import linears_in_place
from quantkit.hf.guard import names_source
from quantkit.hf.ledger import Ledger, keep_ledger
from quantkit.hf.load import PretrainedConfig, PreTrainedModel, empty_model
from quantkit.hf.names import CheckpointTensor, Piece, checkpoint_names
from quantkit.hf.structure import describe
from quantkit.hf.weight_files import has_weights
from quantkit.nn.sites import Site, Structure
from quantkit.numerics.pack import as_bytes
from quantkit.qtensor import QTensor, concatenate


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of the float checkpoint, and where it belongs.

    Attributes:
        name: its name in the checkpoint.
        source: which rows of which parameter it holds.
        shape: its shape in the checkpoint.
        block: index of the block it belongs to; the number of blocks for everything outside.
        site: the site it is part of; None for what is never quantized.
    """

    name: str
    source: CheckpointTensor
    shape: tuple[int, ...]
    block: int
    site: Site | None

    @property
    def module(self) -> str:
        """Name that quantized tensors get their suffix appended to."""
        return self.name.removesuffix(".weight")

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape as (out, in), or (experts, out, in) for a stack."""
        return (*self.shape[:-2], self.shape[-1], self.shape[-2]) if self.source.transposed else self.shape


@dataclass(frozen=True)
class Contents:
    """All entries of a model's checkpoint, with the empty model they come from."""

    model: PreTrainedModel
    structure: Structure
    entries: tuple[Entry, ...]
    transposed: frozenset[str]

    @property
    def sites(self) -> dict[str, Site]:
        """All sites by name, those outside the blocks included."""
        return {site.name: site for site in (*self.structure.sites, *self.structure.after)}


@names_source("cannot follow the layout of")
def contents_of(config: PretrainedConfig, *, most_weights: int | None = None, weights: str | Path | None = None) -> Contents:
    """Work out the contents of a checkpoint of the model that ``config`` describes.

    Args:
        config: config of the model.
        most_weights: more weights than this are refused before anything of their size is allocated.
        weights: where they are. If it is a directory with weight files, the tensors in them are accounted for,
            and what is carried over counts.

    Raises:
        FormatError: too many weights, a layout that cannot be followed, or files that do not hold this model.
    """
    model = empty_model(config)
    count = sum(parameter.numel() for parameter in model.parameters())
    if most_weights is not None and count > most_weights:
        raise FormatError(f"it describes a model of {count} weights, but the files can hold at most {most_weights}")
    if weights is not None and has_weights(Path(weights)):
        keep_ledger(model, account(Path(weights), model))
    structure = describe(model)
    sites = {parameter_of(site): site for site in (*structure.sites, *structure.after)}
    transposed = frozenset(name for name, site in sites.items() if site.transposed)
    blocks = [f"{block.name}." for block in structure.blocks]
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    entries = []
    for name, content in _taken_apart(model, dict(_parted(checkpoint_names(model, transposed), sites.keys())), sites):
        first = content.pieces[0].parameter
        block = next((i for i, prefix in enumerate(blocks) if first.startswith(prefix)), len(blocks))
        entries.append(Entry(name, content, _shape(content, shapes, transposed), block, sites.get(first)))
    entries.sort(key=lambda entry: entry.block)  # stable: the model's order within a block
    return Contents(model, structure, tuple(entries), transposed)


def _parted(names: Mapping[str, CheckpointTensor], sites: Collection[str]) -> Iterator[tuple[str, CheckpointTensor]]:
    """Yield name and content of every tensor, where several layers' weights are joined those of the layers instead.

    Codes and scales of several layers cannot be joined in one tensor. Each goes under its name in the model, which transformers
    knows as well when it loads.
    """
    for name, source in names.items():
        owners = list(dict.fromkeys(piece.parameter for piece in source.pieces))
        if len(owners) == 1 or not any(owner in sites for owner in owners):
            yield name, source
            continue
        for owner in owners:
            pieces = tuple(piece for piece in source.pieces if piece.parameter == owner)
            yield owner, CheckpointTensor(pieces, source.transposed)


def _taken_apart(
    model: PreTrainedModel, names: Mapping[str, CheckpointTensor], sites: Mapping[str, Site]
) -> Iterator[tuple[str, CheckpointTensor]]:
    """Yield name and content of every tensor, stacks that transformers looks for expert by expert one by one."""
    for name, source in names.items():
        site = sites.get(source.pieces[0].parameter)
        module = model.get_submodule(site.module) if site is not None and site.read else None
        config = model.config.get_text_config(decoder=True)
        linears = linears_in_place(module, site.parameter, config) if site is not None and module is not None else {}
        if not linears or site is None:
            yield name, source
            continue
        for expert in range(site.shape[0]):
            start = 0
            for linear, rows in linears.items():
                piece = Piece(parameter_of(site), expert, start, start + rows)
                yield f"{name.rpartition('.')[0]}.{expert}.{linear}.weight", CheckpointTensor((piece,), False)
                start += rows


def parameter_of(site: Site) -> str:
    """Return the full name of a site's parameter."""
    return f"{site.module}.{site.parameter}"


def _shape(source: CheckpointTensor, shapes: Mapping[str, tuple[int, ...]], transposed: frozenset[str]) -> tuple[int, ...]:
    first = source.pieces[0]
    shape = shapes[first.parameter]
    if len(shape) < 2:
        return (sum(p.stop - p.start for p in source.pieces),) if shape else ()
    if first.parameter in transposed:
        shape = (*shape[:-2], shape[-1], shape[-2])
    if first.matrices is not None:
        return (sum(p.matrices[1] - p.matrices[0] for p in source.pieces if p.matrices), *shape[-2:])
    whole = first.expert is None
    rows = shape[-2] if whole and len(source.pieces) == 1 and len(shape) > 2 else sum(p.stop - p.start for p in source.pieces)
    oriented = (*(shape[:-2] if whole else ()), rows, shape[-1])
    return (*oriented[:-2], oriented[-1], oriented[-2]) if source.transposed else oriented


def rejections_of(
    contents: Contents, chosen: Iterable[str], check: Callable[[str, tuple[int, ...]], str | None]
) -> dict[str, str]:
    """Ask ``check(site name, shape)`` about every checkpoint tensor of the chosen sites; return site name to reason."""
    chosen = set(chosen)
    refused: dict[str, str] = {}
    for entry in contents.entries:
        if entry.site is None or entry.site.name not in chosen:
            continue
        if any(piece.matrices for piece in entry.source.pieces):
            reason: str | None = f"the checkpoint holds a part of its stack in {entry.name}; leave it unquantized"
        else:
            reason = check(entry.site.name, entry.weight_shape)
        if reason is not None:
            refused.setdefault(entry.site.name, reason)
    return refused


def carried_linears(ledger: Ledger | None) -> list[str]:
    """Return the names of the modules that a reader may take for linear layers, of what is carried over."""
    kept = ledger.carried_headers if ledger is not None else {}
    return [n.removesuffix(".weight") for n, header in kept.items() if n.endswith(".weight") and len(header.shape) == 2]


def carried_layout(ledger: Ledger | None) -> Layout:
    """Return name to dtype and shape of everything that is carried over from a source."""
    return {name: (header.dtype, header.shape) for name, header in (ledger.carried_headers if ledger else {}).items()}


def linear_modules(contents: Contents, quantized: Iterable[str]) -> list[str]:
    """Return the names of modules that a reader may take for linear layers and that are not quantized.

    Both names where they differ: transformers matches the module in memory, everybody else the checkpoint.
    """
    quantized = set(quantized)
    names = []
    for entry in contents.entries:
        if entry.name in quantized or len(entry.shape) != 2 or not entry.name.endswith(".weight"):
            continue
        owner = contents.model.get_submodule(entry.source.pieces[0].parameter.rpartition(".")[0])
        if not isinstance(owner, nn.Embedding):
            names += aliases(entry)
    for tied in contents.model.all_tied_weights_keys:
        module, _, attribute = tied.rpartition(".")
        if attribute == "weight" and isinstance(contents.model.get_submodule(module), nn.Linear):
            names.append(module)
    return sorted(set(names))


def aliases(entry: Entry) -> list[str]:
    """Return the module's name in the checkpoint, and the one in memory if it is another."""
    first = entry.source.pieces[0]
    in_memory = first.parameter.removesuffix(".weight")
    return [entry.module] if first.expert is not None or in_memory == entry.module else [entry.module, in_memory]


def lookup(model: nn.Module, name: str) -> Tensor:
    """Return the parameter or buffer called ``name``, detached."""
    module, _, attribute = name.rpartition(".")
    try:
        tensor = getattr(model.get_submodule(module), attribute)
    except AttributeError:
        tensor = None
    if not isinstance(tensor, Tensor):
        raise FormatError(f"the model has no float tensor {name}; it does not match its config, or the layer is quantized")
    return tensor.detach()


def same_bits(a: Tensor | None, b: Tensor | None) -> bool:
    """Say whether two tensors have the same dtype, shape and bytes; None is only the same as None."""
    if a is None or b is None:
        return a is b
    b = b.cpu()
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(as_bytes(a), as_bytes(b))  # so NaN equals itself


def float_tensor(model: nn.Module, entry: Entry, transposed: frozenset[str], *, copy: bool = True) -> Tensor:
    """Assemble an unquantized checkpoint tensor from the model, on the CPU, in storage of its own.

    Without ``copy`` it may be a view of the model's, good to look at.
    """
    parts = []
    for piece in entry.source.pieces:
        tensor = lookup(model, piece.parameter)
        if piece.parameter in transposed:
            tensor = tensor.transpose(-1, -2)
        parts.append(_slice(tensor, piece))
    joined = parts[0] if len(parts) == 1 else torch.cat(parts, 0)
    joined = (joined.transpose(-1, -2) if entry.source.transposed else joined).cpu().contiguous()
    return joined if not copy or joined.untyped_storage().nbytes() == joined.nbytes else joined.clone()


def _slice(tensor: Tensor, piece: Piece) -> Tensor:
    tensor = tensor if piece.expert is None else tensor[piece.expert]
    tensor = tensor if piece.matrices is None else tensor[piece.matrices[0] : piece.matrices[1]]
    if tensor.ndim < 2:
        return tensor if tensor.ndim == 0 else tensor[piece.start : piece.stop]
    return tensor[..., piece.start : piece.stop, :]


def quantized_slice(qtensor: QTensor, entry: Entry) -> QTensor:
    """Return the part of a site's QTensor that an entry stores."""
    parts = []
    for piece in entry.source.pieces:
        one = qtensor if piece.expert is None else qtensor[piece.expert]
        parts.append(one if (piece.start, piece.stop) == (0, one.shape[-2]) else one.rows(slice(piece.start, piece.stop)))
    return parts[0] if len(parts) == 1 else concatenate(parts)


def assemble(site: Site, stored: Iterable[tuple[Entry, QTensor]]) -> QTensor:
    """Put a site's QTensor together from what its entries hold; reverses :func:`quantized_slice`.

    Raises:
        FormatError: the parts have different grids.
    """
    parts: dict[int | None, list[tuple[int, QTensor]]] = {}
    for entry, qtensor in stored:
        offset = 0
        for piece in entry.source.pieces:
            height = piece.stop - piece.start
            rows = qtensor if height == qtensor.shape[-2] else qtensor.rows(slice(offset, offset + height))
            parts.setdefault(piece.expert, []).append((piece.start, rows))
            offset += height
    try:
        joined = []
        for expert in sorted(parts, key=lambda e: -1 if e is None else e):
            rows_of_expert = [q for _, q in sorted(parts[expert], key=lambda part: part[0])]
            joined.append(rows_of_expert[0] if len(rows_of_expert) == 1 else concatenate(rows_of_expert))
        return joined[0] if None in parts else type(joined[0]).stack(joined)
    except SpecError as error:
        raise FormatError(f"{site.name}: its parts in the checkpoint do not fit together: {error}") from error


def read_site(site: Site, entries: Iterable[Entry], stored: Mapping[str, Stored], read: Callable[[str], Tensor]) -> QTensor:
    """Read and decode the quantized weight of ``site``.

    Args:
        site: a quantized site.
        entries: all entries of the checkpoint.
        stored: entry name to how it is stored.
        read: returns a tensor of the checkpoint by its full name.

    Raises:
        FormatError: tensors contradict the scheme, or each other.
    """
    parts = []
    for entry in entries:
        if entry.site != site:
            continue
        scheme, codec = stored[entry.name].scheme, stored[entry.name].codec
        tensors = {suffix: read(f"{entry.module}.{suffix}") for suffix in codec.layout(scheme.weight, entry.weight_shape)}
        try:
            parts.append((entry, codec.decode(tensors, scheme.weight, entry.weight_shape)))
        except QuantkitError as error:
            raise FormatError(f"{entry.module}: {error}") from error
    return assemble(site, parts)


def read_floats(contents: Contents, entries: Iterable[Entry], read: Callable[[str], Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield every parameter and buffer that ``entries`` hold unquantized, by its name in the model; each is a copy."""
    sources: dict[str, list[Entry]] = {}
    for entry in entries:
        for parameter in dict.fromkeys(piece.parameter for piece in entry.source.pieces):
            sources.setdefault(parameter, []).append(entry)
    for name, holders in sources.items():
        shape = tuple(lookup(contents.model, name).shape)
        yield name, restore(name, shape, ((entry, read(entry.name)) for entry in holders), name in contents.transposed)


def restore(name: str, shape: tuple[int, ...], stored: Iterable[tuple[Entry, Tensor]], transposed: bool) -> Tensor:
    """Put a float parameter together from what its entries hold; reverses :func:`float_tensor`."""
    oriented = (*shape[:-2], shape[-1], shape[-2]) if transposed else shape
    result: Tensor | None = None
    for entry, tensor in stored:
        rows = tensor.transpose(-1, -2) if entry.source.transposed else tensor
        if result is None:
            result = torch.empty(oriented, dtype=tensor.dtype)
        offset = 0
        for piece in entry.source.pieces:
            first, last = piece.matrices or (piece.start, piece.stop)
            taken = (offset, offset + last - first)
            if piece.parameter == name:
                part = Piece(name, None, *taken) if piece.matrices is None else Piece(name, None, 0, piece.stop, taken)
                _slice(result, piece).copy_(_slice(rows, part))
            offset += last - first
    if result is None:
        raise FormatError(f"{name}: no tensor of the checkpoint holds it")
    return result.transpose(-1, -2).contiguous() if transposed else result
