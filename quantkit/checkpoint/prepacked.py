"""A checkpoint's weights as the kernels want them, kept in the user's cache: a second load reads and does not repack.

One file per checkpoint, ``<cache>/prepacked/<key>-<digest>.weights``. The key hashes everything the content follows from: the
content of every file of the checkpoint, the dtype asked for, the source of the layout, and the versions of quantkit and
transformers; so a checkpoint that changed has another key, and a stale file is never looked at. The digest is the SHA-256
of the file itself, compared before anything of it is used. Both take reading everything once; afterwards
:func:`~quantkit.system.files.known_sha256` remembers, as long as size, inode and times say that nothing was written.

    weights in the kernel's layout, tensor by tensor       read into huge pages, in parallel
    unquantized tensors                                    mapped, private: read when touched, copied when written to
    index: JSON, then its length (8 bytes)

Files are written under a name of their own and renamed; what a killed process left half written goes after a day. Weights read
at every token are read into memory rather than mapped, since files have no huge pages; the rest (an embedding is most of it) is
mapped and costs memory only where it is touched.

A file that others could have written (its directory or itself belongs to another user, is a symbolic link, or is writable by
others) is not used, and said so.

The cache holds at most :data:`LIMIT_BYTES`, the oldest files go first; a checkpoint that would take more is not kept.
``quantkit cache --clear`` empties it, ``--off`` turns it off for good (a file in quantkit's cache directory says so),
``load(..., cache=False)`` once.
"""

import contextlib
import hashlib
import importlib.metadata
import json
import logging
import mmap
import shutil
import struct
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, Final

import torch
from torch import Tensor

from quantkit.kernels.cpu import huge_pages, layout
from quantkit.kernels.cpu.layout import Prepacked
from quantkit.numerics.pack import as_bytes
from quantkit.system.cores import usable_cores
from quantkit.system.files import (
    atomic_path,
    cache_dir,
    cache_switch,
    known_sha256,
    private_directory,
    remember_sha256,
    shared,
    write_atomic,
)
from quantkit.version import __version__

log = logging.getLogger(__name__)

LIMIT_BYTES: Final = 32 << 30
"""Bytes that all files of the cache may take together."""

WORTH_BYTES: Final = 16 << 20
"""A checkpoint smaller than this is loaded as fast without a cache."""

_SUFFIX: Final = ".weights"
_TAIL: Final = struct.Struct("<Q")
_READ_BYTES: Final = 32 << 20
_ABANDONED_NS: Final = 24 * 3600 * 10**9  # a file that is still written to is younger


class Weights:
    """What a file of the cache holds.

    Attributes:
        sites: site name to the prepacked matrices: one, or one per expert.
        floats: parameter or buffer name to tensor; views of the file, private to this process.
    """

    def __init__(self, sites: dict[str, list[Prepacked]], floats: dict[str, Tensor]) -> None:
        self.sites, self.floats = sites, floats


def directory() -> Path:
    """Return where the files lie."""
    return cache_dir() / "prepacked"


def enabled() -> bool:
    """Say whether the cache is in use."""
    return not cache_switch().exists()


def switch(on: bool) -> None:
    """Turn the cache on or off, for every later process too; what it holds stays."""
    if on:
        cache_switch().unlink(missing_ok=True)
    else:
        write_atomic(cache_switch(), "`quantkit cache --on` removes this file and keeps prepacked weights again\n")


def files() -> list[Path]:
    """Return the files of the cache, oldest first."""
    return [path for _, _, path in _entries() if path.suffix == _SUFFIX]


def _entries() -> list[tuple[int, int, Path]]:
    """Return time, bytes and path of whatever lies in the directory, oldest first; others may remove files meanwhile."""
    found = []
    for path in directory().glob("*"):
        with contextlib.suppress(FileNotFoundError):
            stat = path.stat()
            found.append((stat.st_mtime_ns, stat.st_size, path))
    return sorted(found)


def clear() -> int:
    """Remove every file of the cache and return the bytes that were freed; models that are loaded keep what they have."""
    freed = sum(size for _, size, _ in _entries())
    shutil.rmtree(directory(), ignore_errors=True)
    return freed


def describe() -> str:
    """Say in a line what the cache holds."""
    used = sum(size for _, size, _ in _entries())
    state = "" if enabled() else "off, "
    return f"{state}{len(files())} files, {used / 1e6:.1f} MB (limit {LIMIT_BYTES / 1e9:.1f} GB) in {directory()}"


def key_of(weights: Iterable[Path], config: Mapping[str, Any], dtype: torch.dtype | None) -> str:
    """Return the key of a checkpoint: its weight files, the content of its config.json, and the dtype of what stays float."""
    source = hashlib.sha256(Path(layout.__file__).read_bytes()).hexdigest()
    shards = [(path.name, known_sha256(path)) for path in sorted(weights)]
    parts = [shards, config, str(dtype), source, __version__, importlib.metadata.version("transformers")]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def find(key: str) -> Weights | None:
    """Return what the cache has for ``key``, or None. A damaged file is removed, and said so."""
    for path in directory().glob(f"{key}-*{_SUFFIX}"):
        try:
            if reason := shared(directory()) or shared(path):
                log.warning("%s is not used: %s; loading from the checkpoint", path, reason)
                continue
            if known_sha256(path) == path.stem.partition("-")[2]:
                return _read(path)
            log.warning("%s is damaged (its content does not have the digest of its name); made again", path)
            path.unlink(missing_ok=True)
        except OSError as error:
            log.warning("%s cannot be read (%s); loading from the checkpoint", path, error)
    return None


def write(key: str, sites: Iterable[tuple[str, Sequence[Prepacked]]], floats: Iterable[tuple[str, Tensor]]) -> Weights:
    """Write a file for ``key`` and return what it holds; items are taken one at a time, so nothing large is held.

    Raises:
        OSError: the cache cannot be written to.
    """
    target = private_directory("prepacked") / f"{key}-{uuid.uuid4().hex}"  # others may be writing the same
    with atomic_path(target) as temporary, temporary.open("wb") as file:
        out = _Out(file)
        index: dict[str, Any] = {"sites": {}, "floats": {}}
        for name, parts in sites:
            index["sites"][name] = [
                [out.put(value) if isinstance(value, Tensor) else value for value in part] for part in parts
            ]
        out.pad(mmap.ALLOCATIONGRANULARITY)
        index["weights_bytes"] = out.position
        for name, tensor in floats:
            index["floats"][name] = out.put(tensor)
        text = json.dumps(index).encode()
        out.write(text + _TAIL.pack(len(text)))
        digest = out.digest.hexdigest()
    path = target.replace(directory() / f"{key}-{digest}{_SUFFIX}")
    remember_sha256(path, digest)
    _evict(path)
    return _read(path)


class _Out:
    """A file that is hashed as it is written."""

    def __init__(self, file: BinaryIO) -> None:
        self.position, self.digest, self._file = 0, hashlib.sha256(), file

    def write(self, data: Any) -> None:
        self._file.write(data)
        self.digest.update(data)
        self.position += len(data)

    def pad(self, alignment: int) -> None:
        self.write(bytes(-self.position % alignment))

    def put(self, tensor: Tensor) -> dict[str, Any]:
        """Write a tensor and return where and what it is."""
        self.pad(huge_pages.ALIGNMENT)
        where = {"at": self.position, "dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape)}
        content: Any = as_bytes(tensor).numpy()
        self.write(memoryview(content))
        return where


def _read(path: Path) -> Weights:
    size = path.stat().st_size
    with path.open("rb") as file:
        file.seek(size - _TAIL.size)
        (length,) = _TAIL.unpack(file.read())
        file.seek(size - _TAIL.size - length)
        index = json.loads(file.read(length))
        split = index["weights_bytes"]
        mapped = mmap.mmap(file.fileno(), size - split, offset=split, access=mmap.ACCESS_COPY)
    weights, rest = huge_pages.allocate(split), torch.frombuffer(mapped, dtype=torch.uint8)
    _fill(path, weights)

    def matrix(part: Sequence[Any]) -> Prepacked:
        fields: Any = (_view(weights, value) if isinstance(value, dict) else value for value in part)
        return Prepacked(*fields)

    sites = {name: [matrix(part) for part in parts] for name, parts in index["sites"].items()}
    return Weights(sites, {name: _view(rest, where, split) for name, where in index["floats"].items()})


def _view(memory: Tensor, where: Mapping[str, Any], start: int = 0) -> Tensor:
    dtype, shape, at = getattr(torch, where["dtype"]), where["shape"], where["at"] - start
    return memory[at : at + torch.Size(shape).numel() * dtype.itemsize].view(dtype).view(shape)


def _fill(path: Path, memory: Tensor) -> None:
    """Read the file's first bytes into ``memory``, several pieces at once."""
    content: Any = memory.numpy()
    view = memoryview(content)

    def read(start: int) -> None:
        piece, done = view[start : start + _READ_BYTES], 0
        with path.open("rb", buffering=0) as file:
            file.seek(start)
            while done < len(piece):
                count = file.readinto(piece[done:])
                if not count:
                    raise OSError("it is shorter than its index says")
                done += count

    with ThreadPoolExecutor(usable_cores()) as pool:
        list(pool.map(read, range(0, len(view), _READ_BYTES)))


def _evict(newest: Path) -> None:
    """Remove the oldest files until the rest fits, and what nobody writes to any more."""
    kept = 0
    for written, size, path in reversed(_entries()):
        if path.suffix != _SUFFIX:
            if time.time_ns() - written > _ABANDONED_NS:
                path.unlink(missing_ok=True)
            continue
        kept += size
        if kept > LIMIT_BYTES and path != newest:
            path.unlink(missing_ok=True)
