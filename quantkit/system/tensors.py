"""Files of tensors that are wholly there or not at all."""

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from quantkit.errors import DiskError
from quantkit.system.files import atomic_path


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file atomically.

    Args:
        path: of the file.
        tensors: by name; contiguous, each in storage of its own.
        metadata: for the header.

    Raises:
        DiskError: the disk refuses or is full, which the library says in an exception of its own.
    """
    with atomic_path(path) as temporary:
        try:
            save_file(dict(tensors), temporary, metadata=dict(metadata) if metadata else None)
        except SafetensorError as error:
            raise DiskError(
                f"cannot write {path}: {error}; free some space or choose another directory and run again"
            ) from error
