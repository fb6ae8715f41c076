"""SHA-256 of tensors: of each alone, and of many in order."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any

from torch import Tensor

from quantkit.numerics.pack import as_bytes
from quantkit.system.cores import usable_cores
from quantkit.system.memory import PageRelease


class Digest:
    """A SHA-256 over names, dtypes, shapes and checksums of tensors, in the order in which they are added.

    Attributes:
        sums: SHA-256 of every tensor's bytes, by name.
    """

    def __init__(self) -> None:
        self._hash = hashlib.sha256()
        self.sums: dict[str, str] = {}

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        """Add CPU tensors."""
        for name, digest in sums(tensors.items()):
            self.sums[name] = digest
            self._hash.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)} {digest}\n".encode())

    def hexdigest(self) -> str:
        """Return the digest of what was added."""
        return self._hash.hexdigest()


def digest_of(tensors: Mapping[str, Tensor]) -> str:
    """Return the :class:`Digest` of CPU tensors, in the order of their names."""
    digest = Digest()
    digest.add(dict(sorted(tensors.items())))
    return digest.hexdigest()


def sums(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, str]]:
    """Yield the SHA-256 of the bytes of every tensor by its name; several at once, since hashing keeps a core busy.

    Mapped tensors are read and their pages dropped again.

    Args:
        tensors: name and tensor, on any device; taken a few at a time, so that they may be read as they are asked for.
    """
    workers, waiting, pages = usable_cores(), iter(tensors), PageRelease()
    with ThreadPoolExecutor(workers) as pool:
        while some := list(islice(waiting, workers)):
            yield from zip((name for name, _ in some), list(pool.map(_sum, (tensor for _, tensor in some))), strict=True)
            pages.add(*(tensor for _, tensor in some))
    pages.flush()


def _sum(tensor: Tensor) -> str:
    return hashlib.sha256(_content(tensor.detach().cpu())).hexdigest()


def _content(tensor: Tensor) -> memoryview:
    content: Any = as_bytes(tensor).numpy()
    return memoryview(content)
