"""The file level: shards of safetensors behind one mapping, and the marker of an unfinished directory.

Nothing here is trusted: headers are validated by the safetensors library (length, overlap, gaps, truncation) and an index
may only name plain files of its own directory.
"""

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from quantkit.errors import FormatError
from quantkit.system.files import atomic_path, write_json
from quantkit.system.memory import drop_pages, mapped_pages

INCOMPLETE = "INCOMPLETE.json"
"""Name of the marker: a directory that has it is not a checkpoint."""


def single_name(stem: str) -> str:
    """Return the name of the weight file of an unsharded checkpoint."""
    return f"{stem}.safetensors"


def index_name(stem: str) -> str:
    """Return the name of the file that says which shard holds which tensor."""
    return f"{stem}.safetensors.index.json"


DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class Header(NamedTuple):
    """What a file says about one tensor."""

    file: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor's data."""
        return self.dtype.itemsize * torch.Size(self.shape).numel()


class Shards:
    """The tensors of a checkpoint directory, by name; data is read when it is asked for.

    Args:
        path: the directory.
        stem: first part of the names of its weight files, see :class:`quantkit.formats.base.Format`.

    Raises:
        FormatError: a file is missing, damaged, or outside the directory, or a tensor is in two files.
    """

    def __init__(self, path: Path, stem: str) -> None:
        self._open = contextlib.ExitStack()
        self._handles: dict[str, Any] = {}
        self._lent: list[Tensor] = []
        self.headers: dict[str, Header] = {}
        index_path = path / index_name(stem)
        index = _read_index(index_path)
        files = sorted(set(index.values())) if index is not None else [single_name(stem)]
        try:
            for name in files:
                self._add(path / name, name)
        except BaseException:
            self._open.close()
            raise
        for tensor, file in (index or {}).items():
            if tensor not in self.headers or self.headers[tensor].file != file:
                self._open.close()
                raise FormatError(f"{index_path}: {tensor} should be in {file}, which does not have it")

    def __enter__(self) -> "Shards":
        return self

    def __exit__(self, *error: object) -> None:
        self._open.close()

    def read(self, name: str, *, copy: bool = True) -> Tensor:
        """Return a copy of tensor ``name`` that does not depend on the file; without ``copy``, a view of the open file."""
        header = self.headers[name]
        try:
            tensor: Tensor = self._handles[header.file].get_tensor(name)
        except (SafetensorError, OSError, RuntimeError) as error:
            raise FormatError(f"{header.file}: cannot read {name}: {error}") from error
        if copy:
            return tensor.clone()
        self._lent.append(tensor)
        return tensor

    def let_go(self) -> None:
        """Give back the memory of every view lent since the last call; who still reads one reads the file again."""
        drop_pages(mapped_pages(self._lent))
        self._lent.clear()

    def _add(self, path: Path, file: str) -> None:
        if not path.is_file():
            raise FormatError(f"{path}: the file is missing; copy the whole checkpoint again")
        try:
            handle = self._open.enter_context(safe_open(path, "pt"))
            for name in handle.keys():  # noqa: SIM118 - not a mapping
                view = handle.get_slice(name)
                if name in self.headers:
                    raise FormatError(f"{path}: {name} is also in {self.headers[name].file}")
                if view.get_dtype() not in DTYPES:
                    raise FormatError(f"{path}: {name} has dtype {view.get_dtype()}, known: {', '.join(DTYPES)}")
                self.headers[name] = Header(file, DTYPES[view.get_dtype()], tuple(view.get_shape()))
        except (SafetensorError, OSError) as error:
            raise FormatError(f"{path}: not a valid safetensors file ({error}); copy or download it again") from error
        self._handles[file] = handle


def _read_index(path: Path) -> dict[str, str] | None:
    """Return the weight map of a sharded checkpoint, or None if there is one file."""
    if not path.exists():
        return None
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise FormatError(f"{path}: weight_map is missing or empty")
    for tensor, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise FormatError(f"{path}: {tensor} points at {file!r}; want the name of a .safetensors file beside the index")
    return weight_map


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises:
        FormatError: the file is missing or holds something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FormatError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise FormatError(f"{path}: holds a JSON {type(value).__name__}, want an object")
    return value


def write_shard(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write one safetensors file atomically; the same tensors give the same bytes.

    Raises:
        FormatError: the disk is full or refuses.
    """
    try:
        with atomic_path(path) as temporary:
            save_file(dict(tensors), temporary, metadata={"format": "pt"})
    except (OSError, SafetensorError) as error:
        raise FormatError(f"cannot write {path}: {error}; free some space or choose another directory and run again") from error


def mark_incomplete(path: Path, reason: str) -> None:
    """Put the marker into ``path``: from now on no quantkit loads it."""
    write_json(path / INCOMPLETE, {"incomplete": reason})
