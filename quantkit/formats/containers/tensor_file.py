"""One safetensors file whose tensors arrive one by one and go straight to their places.

    8 bytes, little-endian: length of the header
    header, JSON: {"__metadata__": ..., name: {"dtype", "shape", "data_offsets": [begin, end]}, ...}, padded with spaces to 8
    data of all tensors without gaps, in the order of the header

The header follows from names, dtypes and shapes alone, so it is written first and the file gets its full length at once (as a
hole, which takes no space until it is written). The order is that of the safetensors library, widest dtypes first, then by
name, so that the bytes are those of ``safetensors.torch.save_file``. Memory: the tensor that is being written.
"""

import json
import mmap
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantkit.errors import FormatError
from quantkit.formats.containers.base import Layout
from quantkit.numerics.pack import as_bytes
from quantkit.system.files import clear_errors

DTYPES: dict[str, torch.dtype] = {
    "I64": torch.int64,
    "F64": torch.float64,
    "F32": torch.float32,
    "U32": torch.uint32,
    "I32": torch.int32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I16": torch.int16,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Names of dtypes in a header, in the order in which the library sorts tensors."""

_METADATA = {"format": "pt"}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_RANKS = {dtype: rank for rank, dtype in enumerate(DTYPES.values())}
_ALIGNMENT = 8


class TensorFile:
    """A safetensors file with a place for every tensor of ``layout``.

    Args:
        path: created, unless it is there already with the same layout; then what it holds stays.
        layout: name to dtype and shape.

    Raises:
        FormatError: a dtype that safetensors has no name for, or the disk refuses.
    """

    def __init__(self, path: Path, layout: Layout) -> None:
        self.path, self.layout = path, layout
        header, begins = _plan(path, layout)
        self._begins = {name: len(header) + begin for name, begin in begins.items()}
        self._mapped: Tensor | None = None
        size = max((self._begins[name] + _nbytes(*layout[name]) for name in layout), default=len(header))
        try:
            path.touch()
            with path.open("r+b") as file:
                if path.stat().st_size != size or file.read(len(header)) != header:
                    file.truncate(0)
                    file.truncate(size)
                    file.seek(0)
                    file.write(header)
        except OSError as error:
            raise _cannot_write(path, error) from error

    def write(self, name: str, tensor: Tensor) -> None:
        """Put a CPU tensor into its place.

        Raises:
            FormatError: another dtype or shape than the layout says, or the disk is full or refuses.
        """
        dtype, shape = self.layout[name]
        if tensor.dtype != dtype or tuple(tensor.shape) != shape:
            raise FormatError(f"{self.path}: {name} is {tensor.dtype} {tuple(tensor.shape)}, its place is for {dtype} {shape}")
        content: Any = as_bytes(tensor).numpy()
        try:
            with self.path.open("r+b") as file:
                file.seek(self._begins[name])
                file.write(memoryview(content))
        except OSError as error:
            raise _cannot_write(self.path, error) from error

    def read(self, name: str) -> Tensor:
        """Return a copy of what is in the place of ``name``; zeros where nothing was written."""
        dtype, shape = self.layout[name]
        data = torch.empty(_nbytes(dtype, shape), dtype=torch.uint8)
        content: Any = data.numpy()
        with clear_errors(f"read {self.path}"), self.path.open("rb") as file:
            file.seek(self._begins[name])
            if file.readinto(memoryview(content)) < len(content):
                raise FormatError(f"{self.path}: it ends within {name}; start over with resume=False")
        return data.view(dtype).view(shape)

    def view(self, name: str) -> Tensor:
        """Return the place of ``name`` itself, mapped: it shows what is written there, and takes memory only while it is used.

        It outlives this object and the name of the file. Writing to it changes a private copy.
        """
        if self._mapped is None:
            with clear_errors(f"map {self.path}"), self.path.open("rb") as file:
                self._mapped = torch.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY), dtype=torch.uint8)
        dtype, shape = self.layout[name]
        place = self._mapped[self._begins[name] :][: _nbytes(dtype, shape)]
        return place.view(dtype).view(shape)

    def begin(self, name: str) -> int:
        """Return the offset in the file of the first byte of ``name``."""
        return self._begins[name]

    def flush(self) -> None:
        """Make everything written so far durable."""
        try:
            with self.path.open("r+b") as file:
                os.fsync(file.fileno())
        except OSError as error:
            raise _cannot_write(self.path, error) from error


def _plan(path: Path, layout: Layout) -> tuple[bytes, dict[str, int]]:
    """Return everything that comes before the data, and where each tensor's data begin, counted from the first data byte."""
    header: dict[str, Any] = {"__metadata__": _METADATA}
    begins: dict[str, int] = {}
    position = 0
    if odd := next((name for name, (dtype, _) in layout.items() if dtype not in _NAMES), None):
        raise FormatError(f"{path}: {odd} is {layout[odd][0]}; a safetensors file holds {', '.join(DTYPES)}")
    for name in sorted(layout, key=lambda name: (_RANKS[layout[name][0]], name)):
        dtype, shape = layout[name]
        begins[name], position = position, position + _nbytes(dtype, shape)
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [begins[name], position]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text, begins


def _nbytes(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    return dtype.itemsize * torch.Size(shape).numel()


def _cannot_write(path: Path, error: OSError) -> FormatError:
    return FormatError(f"cannot write {path}: {error}; free some space or choose another directory and run again")
