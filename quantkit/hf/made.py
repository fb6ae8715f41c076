"""Where the parameters lie that transformers makes as it loads: joined experts, weights in another dtype than the files'.

Everything else is a view of a mapped file, which is in memory only while somebody looks at it. What is made is in memory from
then on: of a mixture of 30 billion weights that is all of it. Where it is much, each parameter goes to a nameless file on the
disk as soon as it is made (:mod:`quantkit.system.scratch`), and is a view of that; the file goes when the parameter does.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor, nn

from quantkit.hf.building import parameters_kept
from quantkit.hf.ledger import Ledger
from quantkit.system.memory import drop_files, mapped_pages
from quantkit.system.scratch import Scratch

LARGE_BYTES = 1 << 30
"""What is made of more than this lies on the disk."""


def made_bytes(model: nn.Module, ledger: Ledger) -> int:
    """Return the bytes of the parameters of an empty model that are no views of the files that it is loaded from."""
    return sum(one.nbytes for name, one in model.named_parameters() if not _is_view(name, one, ledger))


def _is_view(name: str, parameter: nn.Parameter, ledger: Ledger) -> bool:
    return len(ledger.fills.get(name, ())) == 1 and ledger.source_dtype(name) == parameter.dtype


def lies_on_disk(model: nn.Module, ledger: Ledger) -> bool:
    """Say whether what is made as an empty model is loaded had better lie on the disk."""
    return made_bytes(model, ledger) >= LARGE_BYTES


@contextmanager
def made_in(folder: Path | None, ledger: Ledger) -> Iterator[None]:
    """Have what this thread makes as it loads lie in nameless files in ``folder``; in memory if that is None.

    Raises:
        DiskError: the disk is full or refuses.
    """
    if folder is None:
        yield
        return
    scratch = Scratch(folder)
    sources = [(ledger.path / file).resolve() for file in {header.file for header in ledger.headers.values()}]

    def keep(made: Tensor) -> Tensor:
        if made.nbytes < Scratch.LEAST_BYTES or mapped_pages([made]):
            return made
        kept = scratch.keep(made)
        drop_files(sources)
        return kept

    with parameters_kept(keep):
        yield
