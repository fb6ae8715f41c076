"""GGUF files: the header of one that anybody wrote, and a writer whose tensors come one by one.

    4 bytes "GGUF", u32 version 3, u64 number of tensors, u64 number of keys, little-endian
    keys: string, u32 type, value; a string is u64 length and UTF-8
    tensors: name, u32 number of dimensions, u64 dimensions (the innermost first), u32 type, u64 offset
    padding to general.alignment (32), then the data of all tensors, each at its offset

What is read is not trusted: nothing is allocated by a number in the file, every length is compared with what is left of it, and
tensors lie inside the file. The writer is the ``gguf`` package's.
"""

import mmap
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from quantkit.errors import FormatError
from quantkit.formats.gguf.codec import MXFP4_BLOCK
from quantkit.numerics.ggml import BLOCK_TYPES
from quantkit.numerics.pack import as_bytes
from quantkit.system.files import clear_errors

FLOATS: Final = {"F32": (0, torch.float32), "F16": (1, torch.float16), "BF16": (30, torch.bfloat16)}
"""Types of plain numbers: number in a file, and dtype."""

_SCALARS: Final = ("B", "b", "H", "h", "I", "i", "f", "?", None, None, "Q", "q", "d")
_STRING, _ARRAY = 8, 9
BLOCKS: Final = {k.name: (k.number, k.size, k.nbytes) for k in BLOCK_TYPES.values()} | {"MXFP4": MXFP4_BLOCK}
"""Number, weights and bytes of a block, by the name of its type."""

_NAMES: Final[dict[int, str]] = {number: name for name, (number, _) in FLOATS.items()} | {
    number: name for name, (number, _, _) in BLOCKS.items()
}
_SIZES: Final[dict[int, tuple[int, int]]] = {number: (1, dtype.itemsize) for number, dtype in FLOATS.values()} | {
    number: (size, nbytes) for number, size, nbytes in BLOCKS.values()
}
"""Weights and bytes of a block, by the type's number."""

_MOST_TENSORS, _MOST_DIMENSIONS, _MOST_VALUES = 1 << 20, 4, 1 << 23


class Stored(NamedTuple):
    """What a file says of one tensor: its type, shape in torch's order (outermost first), and where its bytes are."""

    type: str
    shape: tuple[int, ...]
    begin: int
    nbytes: int


class GgufHeader:
    """The keys and tensors of a file; arrays are not read, only counted.

    Args:
        path: the file.
        every: tensors of all types that the ``gguf`` package knows are listed, not only of those that can be read here.

    Raises:
        FormatError: it is no GGUF file, of another version, damaged, or holds tensors of a type that is not known.
    """

    def __init__(self, path: Path, *, every: bool = False) -> None:
        self.path = path
        self._known, self._sizes = _types_of_the_package() if every else (_NAMES, _SIZES)
        self.keys: dict[str, Any] = {}
        self.tensors: dict[str, Stored] = {}
        with clear_errors(f"read {path}"), path.open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if path.stat().st_size else b""
        self._at = 0
        try:
            self._read()
        except (struct.error, UnicodeDecodeError, IndexError, OverflowError, MemoryError) as error:
            raise FormatError(f"{path}: not a whole GGUF file ({error}); copy or download it again") from error

    def close(self) -> None:
        """Let go of the file."""
        if isinstance(self._map, mmap.mmap):
            self._map.close()

    def data(self, name: str) -> Tensor:
        """Return the bytes of a tensor, uint8 (nbytes,), a copy."""
        stored = self.tensors[name]
        return torch.frombuffer(bytearray(self._map[stored.begin : stored.begin + stored.nbytes]), dtype=torch.uint8)

    def part(self, name: str, index: int) -> Tensor:
        """Return the bytes of one of the matrices that a tensor consists of."""
        stored = self.tensors[name]
        size = stored.nbytes // stored.shape[0]
        begin = stored.begin + index * size
        return torch.frombuffer(bytearray(self._map[begin : begin + size]), dtype=torch.uint8)

    def _take(self, form: str) -> Any:
        value = struct.unpack_from(f"<{form}", self._map, self._at)
        self._at += struct.calcsize(f"<{form}")
        return value[0]

    def _string(self) -> str:
        length = self._take("Q")
        if length > len(self._map) - self._at:
            raise IndexError(f"a string of {length} bytes in a file of {len(self._map)}")
        self._at += length
        return self._map[self._at - length : self._at].decode("utf-8")

    def _skip_string(self) -> None:
        length = self._take("Q")
        if length > len(self._map) - self._at:
            raise IndexError(f"a string of {length} bytes in a file of {len(self._map)}")
        self._at += length

    def _value(self, kind: int, *, depth: int = 0) -> Any:
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            if not 0 <= kind < len(_SCALARS) or _SCALARS[kind] is None:
                raise IndexError(f"a key of type {kind}")
            return self._take(str(_SCALARS[kind]))
        inner, count = self._take("I"), self._take("Q")
        if depth or count > min(len(self._map) - self._at, _MOST_VALUES):
            raise IndexError(f"an array of {count} values in a file of {len(self._map)} bytes")
        if inner == _STRING:
            for _ in range(count):
                self._skip_string()
        elif 0 <= inner < len(_SCALARS) and _SCALARS[inner] is not None:
            self._at += count * struct.calcsize(f"<{_SCALARS[inner]}")
        else:
            raise IndexError(f"an array of type {inner}")
        return count

    def _read(self) -> None:
        if self._map[:4] != b"GGUF":
            raise FormatError(f"{self.path}: no GGUF file: it begins with {bytes(self._map[:4])!r}")
        self._at = 4
        if (version := self._take("I")) not in (2, 3):
            raise FormatError(f"{self.path}: GGUF of version {version}, this quantkit reads 2 and 3")
        tensors, keys = self._take("Q"), self._take("Q")
        if max(tensors, keys) > min(_MOST_TENSORS, len(self._map)):
            raise IndexError(f"{tensors} tensors and {keys} keys in {len(self._map)} bytes")
        for _ in range(keys):
            name = self._string()
            self.keys[name] = self._value(self._take("I"))
        found = [self._tensor() for _ in range(tensors)]
        alignment = self.keys.get("general.alignment", 32)
        if not isinstance(alignment, int) or not 0 < alignment <= 1 << 20:
            raise IndexError(f"general.alignment {alignment!r}")
        begin = -(-self._at // alignment) * alignment
        for name, kind, shape, offset in found:
            self._place(name, kind, shape, begin + offset)

    def _tensor(self) -> tuple[str, int, tuple[int, ...], int]:
        name, dimensions = self._string(), self._take("I")
        if dimensions > _MOST_DIMENSIONS:
            raise IndexError(f"{name}: {dimensions} dimensions")
        shape = tuple(self._take("Q") for _ in range(dimensions))[::-1]
        return name, self._take("I"), shape, self._take("Q")

    def _place(self, name: str, kind: int, shape: tuple[int, ...], begin: int) -> None:
        if kind not in self._known:
            raise FormatError(f"{self.path}: {name} is of type {kind}, known: {', '.join(self._known.values())}")
        if name in self.tensors:
            raise FormatError(f"{self.path}: {name} is there twice")
        count = 1
        for size in shape:
            count *= size
        size, bytes_of_block = self._sizes[kind]
        if size > 1 and (not shape or shape[-1] % size):
            raise FormatError(f"{self.path}: {name} {shape} does not divide into {self._known[kind]} of {size}")
        nbytes = count // size * bytes_of_block
        if begin + nbytes > len(self._map):
            raise FormatError(f"{self.path}: {name} lies outside the file of {len(self._map)} bytes; copy or download it again")
        self.tensors[name] = Stored(self._known[kind], shape, begin, nbytes)


def _types_of_the_package() -> tuple[dict[int, str], dict[int, tuple[int, int]]]:
    gguf = package()
    names = {int(kind): str(kind.name) for kind in gguf.GGML_QUANT_SIZES}
    return names, {int(kind): (int(size), int(nbytes)) for kind, (size, nbytes) in gguf.GGML_QUANT_SIZES.items()}


class Planned(NamedTuple):
    """A tensor that will be written: its type, and its shape in weights, outermost first."""

    type: str
    shape: tuple[int, ...]


def write_gguf(
    path: Path, architecture: str, fill: Any, tensors: Mapping[str, Planned], data: Iterable[Iterable[Tensor]]
) -> None:
    """Write a whole file.

    Args:
        path: where; not made durable.
        architecture: llama.cpp's name of the kind of model.
        fill: called with the ``gguf.GGUFWriter``, adds keys.
        tensors: name to what it is, in order.
        data: for every tensor in that order the pieces whose bytes it consists of.

    Raises:
        FormatError: the gguf package is not there, or the disk is full or refuses.
    """
    gguf = package()
    writer = gguf.GGUFWriter(path, architecture)
    fill(writer)
    numbers = {name: number for number, name in _NAMES.items()}
    for name, (kind, shape) in tensors.items():
        size, nbytes = BLOCKS[kind][1:] if kind in BLOCKS else (1, FLOATS[kind][1].itemsize)
        whole = torch.Size(shape).numel() // size * nbytes
        writer.add_tensor_info(name, shape, None, whole, gguf.GGMLQuantizationType(numbers[kind]))
    with clear_errors(f"write {path}"):
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        file = writer.fout[0]
        file.write(b"\0" * (-file.tell() % writer.data_alignment))
        for pieces in data:
            for piece in pieces:
                content: Any = as_bytes(piece.contiguous()).numpy()
                file.write(memoryview(content))
            file.write(b"\0" * (-file.tell() % writer.data_alignment))
        writer.close()


def package() -> Any:
    """Return the gguf package.

    Raises:
        FormatError: it is not installed.
    """
    try:
        import gguf
    except ImportError as error:
        raise FormatError(f"format gguf needs the gguf package: pip install 'quantkit[demo]' ({error})") from error
    return gguf
