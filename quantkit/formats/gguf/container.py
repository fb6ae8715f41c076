"""The container of format ``gguf``: ``model.gguf`` beside config.json.

A GGUF file begins with everything that is said of its tensors, and joins what a checkpoint of transformers has apart (the
experts of a layer). So tensors go to their places in safetensors files first, as in any other format, and the file is made of
those when all are there; for that moment the disk holds both. Rows are turned, and experts joined, on the way out, and the
reader gives them back as they were (:mod:`.architectures`).
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Final, Self

import torch
from torch import Tensor

from quantkit.errors import FormatError
from quantkit.formats.containers.base import UNFINISHED, Header, Layout, Reader, Writer
from quantkit.formats.containers.directory import CONFIG, DirectoryWriter
from quantkit.formats.gguf.architectures import Target, add_keys, architecture_of, extra_tensors, targets, turned
from quantkit.formats.gguf.file import BLOCKS, FLOATS, GgufHeader, Planned, write_gguf
from quantkit.formats.gguf.tokenizer import add_tokenizer
from quantkit.system.files import read_json, sync_directory, sync_file, write_json

FILE: Final = "model.gguf"
_PARTS: Final = "gguf-parts"

_TYPES: Final = {dtype: name for name, (_, dtype) in FLOATS.items()}
_DTYPES: Final = {str(dtype).removeprefix("torch."): dtype for _, dtype in FLOATS.values()} | {"float64": torch.float64}


class GgufFile:
    """The container."""

    key_file: ClassVar[str] = CONFIG

    @property
    def patterns(self) -> tuple[str, ...]:
        """See :class:`quantkit.formats.containers.base.Container`."""
        digits = "[0-9]" * 5
        return (CONFIG, FILE, f"{_PARTS}.safetensors", f"{_PARTS}-{digits}-of-{digits}.safetensors")

    def writer(self, path: Path, parts: Sequence[Layout]) -> Writer:
        """See :class:`quantkit.formats.containers.base.Container`."""
        return GgufWriter(path, parts)

    def config(self, path: Path) -> dict[str, Any] | None:
        """See :class:`quantkit.formats.containers.base.Container`."""
        return read_json(path / CONFIG) if (path / CONFIG).is_file() and (path / FILE).is_file() else None

    def reader(self, path: Path) -> Reader:
        """See :class:`quantkit.formats.containers.base.Container`."""
        return GgufReader(path)


class GgufWriter:
    """Gathers tensors, and makes one file of them; see :class:`quantkit.formats.containers.base.Writer`."""

    def __init__(self, path: Path, parts: Sequence[Layout]) -> None:
        self.path = path
        self._layout = {name: what for part in parts for name, what in part.items()}
        finished = _finished(path)
        self._parts = DirectoryWriter(path, _PARTS, parts)
        if finished is not None:  # written and finished before: what it holds is what goes on
            for name in finished.headers.keys() & self._layout.keys():
                self._parts.write({name: finished.read(name)})
            self._parts.flush()
        (path / FILE).unlink(missing_ok=True)

    def write(self, tensors: Mapping[str, Tensor]) -> None:
        """See :class:`quantkit.formats.containers.base.Writer`."""
        self._parts.write(tensors)

    def read(self, name: str) -> Tensor:
        """See :class:`quantkit.formats.containers.base.Writer`."""
        return self._parts.read(name)

    def view(self, name: str) -> Tensor:
        """See :class:`quantkit.formats.containers.base.Writer`; the file stays, without a name, while there is a view."""
        return self._parts.view(name)

    def flush(self) -> None:
        """See :class:`quantkit.formats.containers.base.Writer`."""
        self._parts.flush()

    def finish(self, config: Mapping[str, Any]) -> None:
        """See :class:`quantkit.formats.containers.base.Writer`; the file is made once, later calls replace the config."""
        whole = dict(config)
        types = _types(config["quantization_config"])
        whole["quantization_config"] = {**config["quantization_config"], "tensors": self._names(config, types)}
        if (self.path / FILE).is_file():
            write_json(self.path / CONFIG, whole)
            return
        temporary = self.path / f"{FILE}{UNFINISHED}"
        self._compose(temporary, config, types)
        sync_file(temporary)
        write_json(self.path / CONFIG, whole)
        temporary.replace(self.path / FILE)
        sync_directory(self.path)
        for file in self.path.glob(f"{_PARTS}*.safetensors{UNFINISHED}"):
            file.unlink()

    def _names(self, config: Mapping[str, Any], types: Mapping[str, str]) -> dict[str, list[str]]:
        """Return names in the checkpoint to names in the file and dtypes, numbers of layers and experts left open.

        The dtype is that of the layers which have floats; what the others are the file says.
        """
        found: dict[str, list[str]] = {}
        for name, target in targets(config, self._layout).items():
            blocks, dtype = name.removesuffix(".weight") in types, str(self._layout[name][0]).removeprefix("torch.")
            one = found.setdefault(_open(name), [_open(target.name), dtype])
            one[1] = one[1] if blocks else dtype
        return found

    def _compose(self, path: Path, config: Mapping[str, Any], types: Mapping[str, str]) -> None:
        members: dict[str, list[tuple[str, Target]]] = {}
        for name, target in targets(config, self._layout).items():
            members.setdefault(target.name, []).append((name, target))
        for together in members.values():
            together.sort(key=lambda one: one[1].expert or 0)
        extras = extra_tensors(config)
        planned = {name: Planned("F32", tuple(tensor.shape)) for name, tensor in extras.items()}
        planned |= {name: self._planned(name, together, types) for name, together in members.items()}

        def pieces() -> Any:
            yield from ([tensor] for tensor in extras.values())
            for name, together in members.items():
                yield (self._turned(one, target, planned[name].type) for one, target in together)

        def fill(writer: Any) -> None:
            add_keys(writer, config)
            add_tokenizer(writer, self.path, int(config["vocab_size"]))
            writer.add_quantization_version(2)

        write_gguf(path, architecture_of(config).name, fill, planned, pieces())

    def _planned(self, name: str, together: list[tuple[str, Target]], types: Mapping[str, str]) -> Planned:
        """Return type and shape of a tensor of the file."""
        kinds = {types.get(one.removesuffix(".weight")) for one, _ in together}
        layouts = {self._layout[one] for one, _ in together}
        experts = [target.expert for _, target in together]
        if len(kinds) > 1 or len(layouts) > 1:
            raise FormatError(f"{name}: experts of one layer with different types are one tensor in a GGUF file; give them one")
        if experts != [None] and experts != list(range(len(experts))):
            raise FormatError(f"{name}: experts {experts[:8]} are not all of a layer's")
        (dtype, shape), kind = next(iter(layouts)), next(iter(kinds))
        if kind is not None:
            _, size, nbytes = BLOCKS[kind]
            shape = (*shape[:-1], shape[-1] // nbytes * size)
        elif len(shape) < 2 or name.endswith("ffn_gate_inp.weight"):
            kind = "F32"  # what llama.cpp's operations want of norms, biases and routers
        else:
            kind = _TYPES.get(dtype, "F32")
        return Planned(kind, shape if experts == [None] else (len(experts), *shape))

    def _turned(self, name: str, target: Target, kind: str) -> Tensor:
        tensor = self._parts.read(name)
        if target.heads is not None:
            tensor = tensor[turned(tensor.shape[0], target.heads)]
        return tensor.to(FLOATS[kind][1]) if kind in FLOATS else tensor


class GgufReader:
    """Reads ``model.gguf`` as the checkpoint's tensors; see :class:`quantkit.formats.containers.base.Reader`."""

    def __init__(self, path: Path) -> None:
        config = read_json(path / CONFIG)
        self._file = GgufHeader(path / FILE)
        where = path / CONFIG
        quantization = config.get("quantization_config")
        names = quantization.get("tensors") if isinstance(quantization, dict) else None
        if not isinstance(names, dict) or not all(isinstance(one, list) and len(one) == 2 for one in names.values()):
            raise FormatError(f"{where}: quantization_config.tensors does not say what is in {FILE}; copy the whole checkpoint")
        layers = config.get("num_hidden_layers")
        if not isinstance(layers, int) or not 0 <= layers <= len(self._file.tensors):
            raise FormatError(f"{where}: {layers!r} layers, but {FILE} holds {len(self._file.tensors)} tensors")
        self.headers: dict[str, Header] = {}
        self._target: dict[str, Target] = {}
        found = {name: dtype for name, dtype in _expanded(names, self._file)}
        try:
            self._target = targets(config, found)
        except (KeyError, TypeError, ValueError) as error:
            raise FormatError(f"{where}: malformed ({error!r})") from error
        for name, dtype in found.items():
            self.headers[name] = self._header(name, dtype)

    def _header(self, name: str, dtype: str) -> Header:
        target = self._target[name]
        stored = self._file.tensors.get(target.name)
        if stored is None:
            raise FormatError(f"{self._file.path}: {target.name} is missing")
        shape = stored.shape if target.expert is None else stored.shape[1:]
        if target.expert is not None and (len(stored.shape) != 3 or target.expert >= stored.shape[0]):
            raise FormatError(f"{self._file.path}: {target.name} {stored.shape} has no expert {target.expert}")
        if target.heads is not None and (target.heads < 1 or not shape or shape[0] % (2 * target.heads)):
            raise FormatError(f"{self._file.path}: {target.name} {shape} does not divide into {target.heads} heads")
        if (block := BLOCKS.get(stored.type)) is not None:
            _, size, nbytes = block
            return Header(FILE, torch.uint8, (*shape[:-1], shape[-1] // size * nbytes))
        if dtype not in _DTYPES:
            raise FormatError(f"{self._file.path}: {target.name} is {stored.type}, config.json says {dtype}")
        return Header(FILE, _DTYPES[dtype], shape)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()

    def read(self, name: str, *, copy: bool = True) -> Tensor:
        """See :class:`quantkit.formats.containers.base.Reader`."""
        header, target = self.headers[name], self._target[name]
        stored = self._file.tensors[target.name]
        data = self._file.data(target.name) if target.expert is None else self._file.part(target.name, target.expert)
        if stored.type in FLOATS:
            tensor = data.view(FLOATS[stored.type][1]).view(header.shape).to(header.dtype)
        else:
            tensor = data.view(header.shape)
        return tensor if target.heads is None else tensor[turned(header.shape[0], target.heads).argsort()]

    def release(self) -> None:
        """Nothing is held: everything that is read is a copy."""


def _finished(path: Path) -> GgufReader | None:
    """Return a reader of what an earlier writer has finished, unless its parts are still there."""
    parts = any(path.glob(f"{_PARTS}*.safetensors{UNFINISHED}"))
    return GgufReader(path) if not parts and (path / FILE).is_file() and (path / CONFIG).is_file() else None


def _types(quantization: Mapping[str, Any]) -> dict[str, str]:
    """Return module to type of its blocks."""
    return {module: kind for kind, modules in quantization["types"].items() for module in modules}


def _open(name: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.)", "{}", name)


def _filled(name: str, numbers: Sequence[str]) -> str:
    for number in numbers:
        name = name.replace("{}", number, 1)
    return name


def _expanded(names: Mapping[str, Any], file: GgufHeader) -> list[tuple[str, str]]:
    """Return every tensor of the checkpoint with its dtype, as far as the file has what it says."""
    found = []
    of: dict[str, list[tuple[str, str]]] = {}
    for name, (stored, dtype) in names.items():
        of.setdefault(str(stored), []).append((name, str(dtype)))
    for stored, what in file.tensors.items():
        layer = re.search(r"(?<=\.)\d+(?=\.)", stored)
        for name, dtype in of.get(_open(stored), []):
            numbers = [layer[0]] if layer else []
            if name.count("{}") == len(numbers):
                found.append((_filled(name, numbers), dtype))
            elif name.count("{}") == len(numbers) + 1 and len(what.shape) == 3:
                found += [(_filled(name, [*numbers, str(expert)]), dtype) for expert in range(what.shape[0])]
            else:
                raise FormatError(f"{file.path}: {stored} {what.shape} cannot be {name}")
    return found
