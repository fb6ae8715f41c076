"""Where the parameters lie that transformers makes as it loads: joined experts, weights in another dtype than the files'.

Everything else is a view of a mapped file, which is in memory only while somebody looks at it. What is made is in memory from
then on: of a mixture of 30 billion weights that is all of it. Where it is much, a parameter that is nothing but tensors of the
files, one after the other, becomes a view of the files (:mod:`quantkit.system.joined`). Every other goes to a nameless file on
the disk as soon as it is made (:mod:`quantkit.system.scratch`), and is a view of that; the file goes when the parameter does.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from quantkit.formats.containers.directory import Place, places_of
from quantkit.hf.building import parameters_kept
from quantkit.hf.ledger import Ledger
from quantkit.system.joined import Piece, copied_bytes, join
from quantkit.system.memory import PAGE_BYTES, PageRelease, drop_files, mapped_pages
from quantkit.system.scratch import Scratch

LARGE_BYTES = 1 << 30
"""What is made of more than this lies on the disk."""

_BEGINNING_BYTES, _COMPARED = 256, 16 << 20
"""Bytes by which tensors are told apart, and that are compared at a time."""


def made_bytes(model: nn.Module, ledger: Ledger) -> int:
    """Return the bytes of the parameters of an empty model that are no views of the files that it is loaded from."""
    return sum(one.nbytes for name, one in model.named_parameters() if not _is_view(name, one, ledger))


def _is_view(name: str, parameter: nn.Parameter, ledger: Ledger) -> bool:
    return len(ledger.fills.get(name, ())) == 1 and ledger.source_dtype(name) == parameter.dtype


def lies_on_disk(model: nn.Module, ledger: Ledger) -> bool:
    """Say whether what is made as an empty model is loaded had better lie on the disk."""
    return made_bytes(model, ledger) >= LARGE_BYTES


def written_bytes(model: nn.Module, ledger: Ledger) -> int:
    """Return how much of what is made as an empty model is loaded has to be written to the disk, if it is to lie there."""
    places = _places(ledger)
    total = 0
    for name, parameter in model.named_parameters():
        if not _is_view(name, parameter, ledger):
            pieces = _pieces(ledger.fills.get(name, ()), parameter.dtype, parameter.nbytes, places, ledger.path)
            total += parameter.nbytes if pieces is None else copied_bytes(pieces)
    return total


@contextmanager
def made_in(folder: Path | None, ledger: Ledger) -> Iterator[None]:
    """Have what this thread makes as it loads lie in the files of the source, or in nameless files in ``folder``.

    In memory, if ``folder`` is None.

    Raises:
        DiskError: the disk is full or refuses.
    """
    if folder is None:
        yield
        return
    scratch, joins = Scratch(folder), _Joins(ledger, folder)
    sources = [(ledger.path / file).resolve() for file in {header.file for header in ledger.headers.values()}]

    def keep(made: Tensor) -> Tensor:
        if made.nbytes < Scratch.LEAST_BYTES or mapped_pages([made]):
            return made
        drop_files(sources)
        kept = joins.found(made)
        return scratch.keep(made) if kept is None else kept

    with parameters_kept(keep):
        yield


class _Joins:
    """Finds the tensors of a source that a parameter consists of, one after the other: by what they hold.

    transformers says neither which parameter it has made nor in which order it has joined what. So the beginnings of tensors
    are looked for in the parameter where they would be, and then all of it is compared.
    """

    def __init__(self, ledger: Ledger, folder: Path) -> None:
        self.folder = folder
        places = _places(ledger)
        fills = {names for names in ledger.fills.values() if len(names) > 1 and all(name in places for name in names)}
        self.waiting: dict[tuple[torch.dtype, int], list[dict[bytes, Piece]]] = {}
        for names in sorted(fills):
            dtype, total = places[names[0]].dtype, sum(ledger.headers[name].nbytes for name in names)
            if (pieces := _pieces(names, dtype, total, places, ledger.path)) is not None:
                beginnings = {_beginning(piece): piece for piece in pieces}
                if len(beginnings) == len(pieces):  # else their order cannot be told
                    self.waiting.setdefault((dtype, total), []).append(beginnings)

    def found(self, made: Tensor) -> Tensor | None:
        """Return a view of the source's files that equals a parameter; None if there is none."""
        waiting = self.waiting.get((made.dtype, made.nbytes), [])
        for beginnings in waiting if made.is_contiguous() else ():
            parts = made.view(torch.uint8).view(len(beginnings), -1)[:, :_BEGINNING_BYTES]
            order = [beginnings.get(bytes(part.tolist())) for part in parts]
            pieces = [piece for piece in order if piece is not None]
            if len(set(pieces)) != len(beginnings):
                continue
            joined = join(pieces, made.dtype, made.shape, self.folder)
            if joined is not None and _equal(joined, made):
                waiting.remove(beginnings)
                return joined
        return None


def _beginning(piece: Piece) -> bytes:
    with piece.path.open("rb") as file:
        file.seek(piece.begin)
        return file.read(_BEGINNING_BYTES)


def _equal(mapped: Tensor, made: Tensor) -> bool:
    """Say whether two tensors have the same bytes, with little of the mapped one in memory at a time."""
    release = PageRelease()
    for one, other in zip(*(tensor.view(torch.uint8).view(-1).split(_COMPARED) for tensor in (mapped, made)), strict=True):
        if not torch.equal(one, other):
            return False
        release.add(one)
    release.flush()
    return True


def largest_made(model: nn.Module, ledger: Ledger) -> int:
    """Return the bytes of the largest parameter of an empty model that consists of several tensors of the files."""
    return max((one.nbytes for name, one in model.named_parameters() if len(ledger.fills.get(name, ())) > 1), default=0)


def _places(ledger: Ledger) -> Mapping[str, Place]:
    """Return where the tensors of a source are; nothing for files that are no safetensors."""
    names = {header.file for header in ledger.headers.values()}
    return places_of(ledger.path, "model") if all(name.endswith(".safetensors") for name in names) else {}


def _pieces(
    names: Sequence[str], dtype: torch.dtype, nbytes: int, places: Mapping[str, Place], folder: Path
) -> list[Piece] | None:
    """Return the pieces of a parameter that may consist of whole tensors of equal size, in no order; None if it does not."""
    if len(names) < 2 or not all(name in places and places[name].dtype == dtype for name in names):
        return None
    size = nbytes // len(names)
    shapes = {places[name].shape for name in names}
    if (
        size % PAGE_BYTES
        or size * len(names) != nbytes
        or {torch.Size(one).numel() * dtype.itemsize for one in shapes} != {size}
    ):
        return None
    return [Piece(folder / places[name].file, places[name].begin, size) for name in names]
