"""The weight files of a float model's directory, as transformers picks them: their headers, and tensors one by one.

``model.safetensors``, else ``model.safetensors.index.json`` and the files that it names, else ``pytorch_model.bin`` or
``pytorch_model.bin.index.json``. Reading headers costs milliseconds per file and no memory, also for ``.bin`` files, which are
opened with ``weights_only`` and mapped.
"""

import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from quantkit.errors import FormatError
from quantkit.formats.containers.base import Header
from quantkit.formats.containers.directory import SafetensorsDirectory
from quantkit.system.files import read_json

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
BIN, BIN_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"


class Weights(Protocol):
    """The tensors of a directory, by name."""

    @property
    def headers(self) -> Mapping[str, Header]:
        """Every tensor's file, dtype and shape."""
        ...

    def read(self, name: str, *, copy: bool = True) -> Tensor:
        """Return a copy of a tensor; without ``copy``, it may be a view of the file."""
        ...


def has_weights(path: Path) -> bool:
    """Say whether a directory has weight files, and is not just a config."""
    return any((path / name).is_file() for name in (SINGLE, INDEX, BIN, BIN_INDEX))


@contextmanager
def open_weights(path: Path) -> Iterator[Weights]:
    """Open the weight files of a directory.

    Raises:
        FormatError: there are none, one is missing, damaged or truncated, an index and its files disagree, or there are two
            sets of files of which only one would be read.
    """
    single, index = (path / SINGLE).is_file(), (path / INDEX).is_file()
    if single and index:
        named = read_json(path / INDEX).get("weight_map")
        if not isinstance(named, dict) or set(named.values()) != {SINGLE}:
            raise FormatError(f"{path} holds both {SINGLE} and {INDEX}, of which only one can be meant; remove the other")
    if single or index:
        with SafetensorsDirectory("model").reader(path) as reader:
            _refuse_strays(path, {header.file for header in reader.headers.values()})
            yield reader
    elif (path / BIN).is_file() or (path / BIN_INDEX).is_file():
        yield _open_bin(path)
    else:
        raise FormatError(f"{path}: no weight files; want {SINGLE}, {INDEX}, {BIN} or {BIN_INDEX}")


def _refuse_strays(path: Path, read: set[str]) -> None:
    """Refuse parts of a model, by their names, that the index does not name: their tensors would not be read."""
    strays = sorted(file.name for file in path.glob("model-*-of-*.safetensors") if file.name not in read)
    if strays and (path / INDEX).is_file():
        more = f" and {len(strays) - 1} more" if len(strays) > 1 else ""
        raise FormatError(
            f"{path / INDEX} names no tensor in {strays[0]}{more}, which lies beside it; copy the source again, or remove "
            "what does not belong to it"
        )


@dataclass(frozen=True)
class _BinFiles:
    """Tensors of ``.bin`` files, mapped."""

    headers: Mapping[str, Header]
    maps: dict[str, Mapping[str, Tensor]] = field(repr=False)

    def read(self, name: str, *, copy: bool = True) -> Tensor:
        found = self.maps[self.headers[name].file][name]
        return found.clone() if copy else found


def _open_bin(path: Path) -> _BinFiles:
    names = [BIN]
    if not (path / BIN).is_file():
        weight_map = read_json(path / BIN_INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise FormatError(f"{path / BIN_INDEX}: weight_map is missing or empty")
        names = sorted({str(file) for file in weight_map.values()})
    headers: dict[str, Header] = {}
    maps: dict[str, Mapping[str, Tensor]] = {}
    for file in names:
        if Path(file).name != file or not (path / file).is_file():
            raise FormatError(f"{path / file}: the file is missing; copy the whole source again")
        maps[file] = _load_bin(path / file)
        headers |= {name: Header(file, tensor.dtype, tuple(tensor.shape)) for name, tensor in maps[file].items()}
    return _BinFiles(headers, maps)


def _load_bin(path: Path) -> Mapping[str, Tensor]:
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # torch raises what its own reader of untrusted files raises, which must not be imported here
        raise FormatError(f"{path}: cannot be read as tensors: {error}; copy or download it again") from error
    if not isinstance(found, dict) or not all(isinstance(tensor, Tensor) for tensor in found.values()):
        raise FormatError(f"{path}: holds something else than tensors by name; want a state dict")
    return found
