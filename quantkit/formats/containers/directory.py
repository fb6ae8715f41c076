"""A directory of safetensors files with a config.json, as transformers writes and reads it.

``<stem>.safetensors``, or where one file would exceed :data:`MAX_FILE_BYTES`, ``<stem>-00001-of-00003.safetensors`` and so on
beside ``<stem>.safetensors.index.json``, which says which file holds which tensor.

What is read is not trusted: headers are validated by the safetensors library (length, overlap, gaps, truncation) and an index
may only name plain files of its own directory.
"""

import contextlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, NamedTuple, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from quantkit.errors import FormatError
from quantkit.formats.containers.base import UNFINISHED, Header, Layout, Reader, Writer
from quantkit.formats.containers.tensor_file import DTYPES, TensorFile
from quantkit.system.files import clear_errors, read_json, sync_directory, write_json
from quantkit.system.memory import drop_pages, mapped_pages

CONFIG = "config.json"

_RELEASE_BYTES = 16 << 20
MAX_FILE_BYTES = 5_000_000_000
"""Largest file, unless one weight alone is larger."""


@dataclass(frozen=True, slots=True)
class Twin:
    """Another place where readers look for ``quantization_config``: a file beside config.json, or a key in it.

    Attributes:
        name: of the file, ending in ``.json``, or of the key.
        dump: returns what stands there, of ``quantization_config``.
        load: reverses it.
    """

    name: str
    dump: Callable[[Mapping[str, Any]], dict[str, Any]] = dict
    load: Callable[[Mapping[str, Any]], dict[str, Any]] = dict

    @property
    def is_file(self) -> bool:
        """Whether it is a file of its own."""
        return self.name.endswith(".json")


@dataclass(frozen=True, slots=True)
class SafetensorsDirectory:
    """The container.

    Attributes:
        stem: the first part of the names of its files: ``"model"`` is what transformers looks for.
        twin: where else ``quantization_config`` stands; read where config.json has none.
    """

    stem: str
    twin: Twin | None = None
    key_file: ClassVar[str] = CONFIG

    @property
    def patterns(self) -> tuple[str, ...]:
        """See :class:`quantkit.formats.containers.base.Container`; other files of safetensors are not this container's."""
        digits = "[0-9]" * 5
        twin = (self.twin.name,) if self.twin is not None and self.twin.is_file else ()
        files = (_file_name(self.stem, 0, 1), f"{self.stem}-{digits}-of-{digits}.safetensors", _index_name(self.stem))
        return (CONFIG, *twin, *files)

    def writer(self, path: Path, parts: Sequence[Layout]) -> Writer:
        """See :class:`quantkit.formats.containers.base.Container`."""
        return DirectoryWriter(path, self.stem, parts, self.twin)

    def config(self, path: Path) -> dict[str, Any] | None:
        """See :class:`quantkit.formats.containers.base.Container`."""
        if not (path / CONFIG).is_file():
            return None
        config, twin = read_json(path / CONFIG), self.twin
        if twin is None:
            return config
        if isinstance(config.get("quantization_config"), dict):
            return {key: value for key, value in config.items() if key != twin.name}  # it says the same, and is no model's
        found = read_json(path / twin.name) if twin.is_file and (path / twin.name).is_file() else config.get(twin.name)
        return {**config, "quantization_config": twin.load(found)} if isinstance(found, dict) else config

    def reader(self, path: Path) -> Reader:
        """See :class:`quantkit.formats.containers.base.Container`."""
        return DirectoryReader(path, self.stem)


class Place(NamedTuple):
    """Where the data of a tensor are: the file's final name, and the offset of the first byte in it."""

    file: str
    begin: int
    dtype: torch.dtype
    shape: tuple[int, ...]


def places_of(path: Path, stem: str) -> dict[str, Place]:
    """Return where every tensor of a written checkpoint is.

    Raises:
        FormatError: a file is missing or damaged.
    """
    found = {}
    with DirectoryReader(path, stem) as reader:  # which checks the files
        for file in {header.file for header in reader.headers.values()}:
            with clear_errors(f"read {path / file}"), (path / file).open("rb") as opened:
                length = int.from_bytes(opened.read(8), "little")
                header = json.loads(opened.read(length))
            for name, what in header.items():
                if name in reader.headers:
                    found[name] = Place(file, 8 + length + what["data_offsets"][0], *reader.headers[name][1:])
    return found


class DirectoryWriter:
    """Writes a directory of safetensors files; see :class:`quantkit.formats.containers.base.Writer`."""

    def __init__(self, path: Path, stem: str, parts: Sequence[Layout], twin: Twin | None = None) -> None:
        self.path, self.stem, self._twin = path, stem, twin
        layouts = _split(parts)
        self._total = sum(_nbytes(layout) for layout in layouts)
        self._names = [_file_name(stem, index, len(layouts)) for index in range(len(layouts))]
        for name in (CONFIG, _index_name(stem), *((twin.name,) if twin is not None and twin.is_file else ())):
            (path / name).unlink(missing_ok=True)
        for name in self._names:
            if (path / name).exists():
                (path / name).replace(self._unfinished(name))
        self._files = [TensorFile(self._unfinished(name), layout) for name, layout in zip(self._names, layouts, strict=True)]
        self._file_of = {name: index for index, layout in enumerate(layouts) for name in layout}

    def write(self, tensors: Mapping[str, Tensor]) -> None:
        """See :class:`quantkit.formats.containers.base.Writer`."""
        if odd := sorted(tensors.keys() - self._file_of.keys()):
            raise FormatError(f"{self.path}: there is no place for {odd[0]}")
        for name, tensor in tensors.items():
            self._files[self._file_of[name]].write(name, tensor)

    def read(self, name: str) -> Tensor:
        """See :class:`quantkit.formats.containers.base.Writer`."""
        return self._files[self._file_of[name]].read(name)

    def view(self, name: str) -> Tensor:
        """See :class:`quantkit.formats.containers.base.Writer`."""
        return self._files[self._file_of[name]].view(name)

    def flush(self) -> None:
        """See :class:`quantkit.formats.containers.base.Writer`."""
        for file in self._files:
            file.flush()

    def finish(self, config: Mapping[str, Any]) -> None:
        """See :class:`quantkit.formats.containers.base.Writer`."""
        if any(self._unfinished(name).exists() for name in self._names):
            self.flush()
            for name in self._names:
                self._unfinished(name).replace(self.path / name)
            sync_directory(self.path)
        if len(self._names) > 1:
            weight_map = {name: self._names[index] for name, index in sorted(self._file_of.items())}
            write_json(self.path / _index_name(self.stem), {"metadata": {"total_size": self._total}, "weight_map": weight_map})
        if (twin := self._twin) is not None and "quantization_config" in config:
            also = twin.dump(config["quantization_config"])
            if twin.is_file:
                write_json(self.path / twin.name, also)
            else:
                config = {**config, twin.name: also}
        write_json(self.path / CONFIG, config)

    def places(self) -> dict[str, Place]:
        """Return where every tensor is, for files beside these that point into them."""
        found = {}
        for name, index in self._file_of.items():
            file = self._files[index]
            found[name] = Place(self._names[index], file.begin(name), *file.layout[name])
        return found

    def _unfinished(self, name: str) -> Path:
        return self.path / f"{name}{UNFINISHED}"


class DirectoryReader:
    """Reads a directory of safetensors files; see :class:`quantkit.formats.containers.base.Reader`."""

    def __init__(self, path: Path, stem: str) -> None:
        self._open = contextlib.ExitStack()
        self._handles: dict[str, Any] = {}
        self._views: list[Tensor] = []
        self.headers: dict[str, Header] = {}
        index_path = path / _index_name(stem)
        index = _read_index(index_path)
        files = sorted(set(index.values())) if index is not None else [_file_name(stem, 0, 1)]
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

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._open.close()

    def read(self, name: str, *, copy: bool = True) -> Tensor:
        """See :class:`quantkit.formats.containers.base.Reader`."""
        header = self.headers[name]
        try:
            tensor: Tensor = self._handles[header.file].get_tensor(name)
        except (SafetensorError, OSError, RuntimeError) as error:
            raise FormatError(f"{header.file}: cannot read {name}: {error}") from error
        if copy:
            return tensor.clone()
        self._views.append(tensor)
        return tensor

    def release(self) -> None:
        """See :class:`quantkit.formats.containers.base.Reader`."""
        if sum(view.nbytes for view in self._views) >= _RELEASE_BYTES:  # asking the system costs as much as reading a megabyte
            drop_pages(mapped_pages(self._views))
            self._views.clear()

    def _add(self, path: Path, file: str) -> None:
        if not path.is_file():
            raise FormatError(f"{path}: the file is missing; copy the whole checkpoint again")
        with clear_errors(f"read {path}"), path.open("rb"):
            pass  # the library says of any file that it cannot open that it is not there
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


def _file_name(stem: str, index: int, count: int) -> str:
    return f"{stem}.safetensors" if count == 1 else f"{stem}-{index + 1:05d}-of-{count:05d}.safetensors"


def _index_name(stem: str) -> str:
    return f"{stem}.safetensors.index.json"


def _nbytes(layout: Layout) -> int:
    return sum(dtype.itemsize * torch.Size(shape).numel() for dtype, shape in layout.values())


def _split(parts: Sequence[Layout]) -> list[Layout]:
    """Fill files in order, keeping the tensors of one part together; return the layout of each file."""
    layouts: list[Layout] = [{}]
    filled = 0
    for part in parts:
        size = _nbytes(part)
        if filled and filled + size > MAX_FILE_BYTES:
            layouts.append({})
            filled = 0
        layouts[-1].update(part)
        filled += size
    return layouts


def _read_index(path: Path) -> dict[str, str] | None:
    """Return the weight map of a checkpoint of several files, or None if there is one file."""
    if not path.exists():
        return None
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise FormatError(f"{path}: weight_map is missing or empty")
    for tensor, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise FormatError(f"{path}: {tensor} points at {file!r}; want the name of a .safetensors file beside the index")
    return weight_map
