"""What a container is: files that hold named tensors and one config, written as the tensors come.

Sizes are known before the first tensor is (a codec's layout follows from a scheme and a shape), so a container can give every
tensor its place at once and a weight goes to the disk as soon as it is quantized. What is written and flushed survives a
killed process: :meth:`Container.writer` opened again on the same directory goes on with it.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Protocol, Self

import torch
from torch import Tensor

Layout = dict[str, tuple[torch.dtype, tuple[int, ...]]]
"""Name (or suffix of a name) to dtype and shape."""

UNFINISHED = ".part"
"""What the names of files end in until :meth:`Writer.finish`: no reader looks for such names."""


class Header(NamedTuple):
    """What a file says about one tensor."""

    file: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor's data."""
        return self.dtype.itemsize * torch.Size(self.shape).numel()


class Writer(Protocol):
    """The files of one checkpoint while they are written."""

    def write(self, tensors: Mapping[str, Tensor]) -> None:
        """Put tensors into their places, over what is there already; any order, CPU tensors of the planned dtypes and shapes.

        Raises:
            FormatError: an unknown name, another dtype or shape, or the disk is full or refuses.
        """
        ...

    def read(self, name: str) -> Tensor:
        """Return a copy of what has been written as ``name``; bytes that nobody wrote are undefined."""
        ...

    def view(self, name: str) -> Tensor:
        """Return what has been written as ``name``, mapped from the file, which nobody may cut off or write to afterwards."""
        ...

    def flush(self) -> None:
        """Make what has been written durable: it is still there after the process was killed or the power failed."""
        ...

    def finish(self, config: Mapping[str, Any]) -> None:
        """Add the config and give all files their names; called again, it replaces the config.

        Args:
            config: what config.json says in a directory: the model's config with ``quantization_config``. JSON-able.
        """
        ...


class Reader(Protocol):
    """The tensors of a finished checkpoint, by name; data is read when it is asked for."""

    @property
    def headers(self) -> Mapping[str, Header]:
        """Every tensor's file, dtype and shape, by name."""
        ...

    def read(self, name: str, *, copy: bool = True) -> Tensor:
        """Return a copy of tensor ``name`` that does not depend on the file; without ``copy``, it may be a view of the file.

        Raises:
            FormatError: it cannot be read.
        """
        ...

    def release(self) -> None:
        """Give back the memory of the views returned so far, once that is worth it; who still uses one reads the file again."""
        ...

    def __enter__(self) -> Self:
        """Return the reader; leaving closes its files."""
        ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Close all files."""
        ...


class Container(Protocol):
    """A way of keeping named tensors and a config in a directory."""

    @property
    def patterns(self) -> tuple[str, ...]:
        """Globs of the files it consists of, for who replaces a checkpoint by another."""
        ...

    @property
    def key_file(self) -> str:
        """Name of the one file without which no reader takes the directory for a model; it is moved into place last."""
        ...

    def writer(self, path: Path, parts: Sequence[Layout]) -> Writer:
        """Begin in the directory ``path``, or go on with what an earlier writer of the same ``parts`` left there.

        Args:
            path: an existing directory. Until :meth:`Writer.finish` all names in it end in :data:`UNFINISHED`; a finished
                checkpoint in it becomes an unfinished one.
            parts: full names of all tensors with dtype and shape, in order; one mapping per weight, whose tensors stay in one
                file where there are several.

        Raises:
            FormatError: a dtype that the container cannot hold, or the disk refuses.
        """
        ...

    def config(self, path: Path) -> dict[str, Any] | None:
        """Return the config of the checkpoint at ``path``; None if there is nothing of this container.

        Raises:
            FormatError: it is there and cannot be read.
        """
        ...

    def reader(self, path: Path) -> Reader:
        """Open the checkpoint at ``path``.

        Raises:
            FormatError: a file is missing, damaged, or outside the directory, or a tensor is there twice.
        """
        ...
