"""A format in a file of its own: codec, dialect, and a container that keeps everything in one file.

    data of all tensors | index and config, JSON | length of the JSON, 8 bytes

An installed package names it in ``[project.entry-points."quantkit.formats"]``: ``one-file = "outside_format:FORMAT"``.
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantkit.dtypes import SCALE_DTYPES
from quantkit.errors import FormatError
from quantkit.formats.base import Format, Held, Matcher, Stored, check_layout
from quantkit.formats.containers.base import UNFINISHED, Header, Layout, Reader, Writer
from quantkit.numerics import grid
from quantkit.qtensor import GridTensor
from quantkit.spec import QuantSpec, Scheme


class ByteCodec:
    """One byte per code."""

    def layout(self, spec: QuantSpec, shape: tuple[int, ...]) -> Layout:
        """See :class:`quantkit.formats.base.Codec`."""
        rows, columns = grid.block_size(spec, shape)
        blocks = (*shape[:-2], shape[-2] // rows, shape[-1] // columns)
        layout: Layout = {"codes": (torch.uint8, shape), "scales": (SCALE_DTYPES[spec.scale_dtype], blocks)}
        return layout if spec.symmetric else {**layout, "zeros": (torch.uint8, blocks)}

    def encode(self, qtensor: GridTensor) -> dict[str, Tensor]:
        """See :class:`quantkit.formats.base.Codec`."""
        zeros = {} if qtensor.zero_point is None else {"zeros": qtensor.zero_point.contiguous()}
        return {"codes": qtensor.codes(), "scales": qtensor.scale.contiguous(), **zeros}

    def decode(self, tensors: Mapping[str, Tensor], spec: QuantSpec, shape: tuple[int, ...]) -> GridTensor:
        """See :class:`quantkit.formats.base.Codec`."""
        check_layout(tensors, self.layout(spec, shape))
        return GridTensor.from_codes(tensors["codes"], tensors["scales"], tensors.get("zeros"), spec)


class OneFile:
    """The container."""

    patterns = ("weights.one",)
    key_file = "weights.one"

    def writer(self, path: Path, parts: Sequence[Layout]) -> Writer:
        """See :class:`quantkit.formats.containers.base.Container`."""
        return OneFileWriter(path / self.key_file, {name: what for part in parts for name, what in part.items()})

    def config(self, path: Path) -> dict[str, Any] | None:
        """See :class:`quantkit.formats.containers.base.Container`."""
        file = path / self.key_file
        return read_tail(file)["config"] if file.is_file() else None

    def reader(self, path: Path) -> Reader:
        """See :class:`quantkit.formats.containers.base.Container`."""
        return OneFileReader(path / self.key_file)


class OneFileWriter:
    """See :class:`quantkit.formats.containers.base.Writer`."""

    def __init__(self, path: Path, layout: Layout) -> None:
        self.path, self.unfinished, self.layout = path, path.with_name(path.name + UNFINISHED), layout
        self.begins: dict[str, int] = {}
        self.size = 0
        for name, (dtype, shape) in layout.items():
            self.begins[name] = self.size
            self.size += dtype.itemsize * torch.Size(shape).numel()
        if path.exists():
            path.replace(self.unfinished)
        self.unfinished.touch()
        os.truncate(self.unfinished, self.size)

    def write(self, tensors: Mapping[str, Tensor]) -> None:
        """Put tensors into their places."""
        with self.unfinished.open("r+b") as file:
            for name, tensor in tensors.items():
                file.seek(self.begins[name])
                file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())

    def read(self, name: str) -> Tensor:
        """Return a copy of what was written."""
        return read_tensor(self.unfinished, self.begins[name], *self.layout[name])

    def flush(self) -> None:
        """Make it durable."""
        with self.unfinished.open("r+b") as file:
            os.fsync(file.fileno())

    def finish(self, config: Mapping[str, Any]) -> None:
        """Add or replace what comes after the data."""
        if self.path.exists():
            self.path.replace(self.unfinished)
        places = {
            name: [str(dtype).removeprefix("torch."), shape, self.begins[name]] for name, (dtype, shape) in self.layout.items()
        }
        text = json.dumps({"tensors": places, "config": config}).encode()
        os.truncate(self.unfinished, self.size)
        with self.unfinished.open("ab") as file:
            file.write(text + len(text).to_bytes(8, "little"))
        self.flush()
        self.unfinished.replace(self.path)


class OneFileReader:
    """See :class:`quantkit.formats.containers.base.Reader`."""

    def __init__(self, path: Path) -> None:
        self.path, self.places = path, read_tail(path)["tensors"]
        self.headers = {name: Header(path.name, getattr(torch, d), tuple(shape)) for name, (d, shape, _) in self.places.items()}

    def __enter__(self) -> "OneFileReader":
        return self

    def __exit__(self, *error: object) -> None:
        return None

    def read(self, name: str, *, copy: bool = True) -> Tensor:
        """Return a copy of a tensor."""
        return read_tensor(self.path, self.places[name][2], self.headers[name].dtype, self.headers[name].shape)

    def release(self) -> None:
        """Nothing is mapped."""


def read_tensor(path: Path, begin: int, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """Return a tensor of a file."""
    data = torch.empty(dtype.itemsize * torch.Size(shape).numel(), dtype=torch.uint8)
    with path.open("rb") as file:
        file.seek(begin)
        file.readinto(data.numpy())
    return data.view(dtype).view(shape)


def read_tail(path: Path) -> dict[str, Any]:
    """Return what comes after the data."""
    with path.open("rb") as file:
        file.seek(-8, os.SEEK_END)
        length = int.from_bytes(file.read(), "little")
        file.seek(-8 - length, os.SEEK_END)
        tail: dict[str, Any] = json.loads(file.read(length))
    return tail


class Plain:
    """The dialect: module name to scheme."""

    quant_method = "one-file"
    conv1d = True
    embeddings = True

    def rejects(self, scheme: Scheme, shape: tuple[int, ...], dtype: str | None = None) -> str | None:
        """Reject all but weights on integer grids."""
        if scheme.activation is not None or not scheme.weight.is_integer:
            return "one-file stores integer weights only; use format native"
        return scheme.weight.rejects(shape)

    def dump_config(self, plan: Mapping[str, Scheme], ignore: Sequence[str], dtype: str) -> dict[str, Any]:
        """Write down the plan."""
        return {"quant_method": self.quant_method, "modules": {name: scheme.to_dict() for name, scheme in plan.items()}}

    def load_config(self, config: Mapping[str, Any], dtype: str, tensors: Mapping[str, Held]) -> Matcher:
        """Read it back."""
        if not isinstance(modules := config.get("modules"), dict):
            raise FormatError("quantization_config.modules is malformed: it is no mapping")
        return {name: Stored(Scheme.from_dict(scheme), ByteCodec()) for name, scheme in modules.items()}.get


FORMAT = Format(codec=lambda scheme: ByteCodec(), container=OneFile(), dialect=Plain())
