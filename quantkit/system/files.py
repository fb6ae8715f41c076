"""Files that are either wholly there or not there at all.

Everything quantkit writes goes to a temporary name in the same directory, is flushed to the disk and then renamed, so a
crash, a kill or a full disk leaves the previous state intact.

The digest of a large file is remembered in the cache, as long as the file is provably the one that was read: same path,
device, inode, size and times, and last changed well before it was read (a file system's clock ticks in milliseconds, so what
is written while it is read could otherwise go unnoticed).
"""

import contextlib
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from quantkit.errors import FormatError

_SETTLED_NS = 2_000_000_000
"""A file that changed less than this before it was read may have changed since without its times showing it."""


def cache_dir() -> Path:
    """Return quantkit's cache directory: ``$XDG_CACHE_HOME/quantkit``, or ``~/.cache/quantkit``."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "quantkit"


def cache_switch() -> Path:
    """Return the file whose presence says that nothing large is to be kept in the cache."""
    return cache_dir() / "prepacked.off"


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on success sync it and rename it to ``path``, on any error remove it."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)  # mkstemp makes private files; a checkpoint should be as readable as any other file
        temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_directory(target.parent)


def sync_directory(path: Path) -> None:
    """Make a rename in ``path`` durable; directories cannot be opened for this on every system, which is harmless."""
    with contextlib.suppress(OSError):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def remove_temporaries(directory: str | Path) -> None:
    """Remove what a killed :func:`atomic_path` left in ``directory``; nobody else may be writing there."""
    for leftover in Path(directory).glob(".*.tmp"):
        leftover.unlink(missing_ok=True)


def write_atomic(path: str | Path, data: bytes | str) -> None:
    """Write ``data`` to ``path`` atomically (text as UTF-8)."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)


def write_json(path: str | Path, value: Any) -> None:
    """Write ``value`` to ``path`` atomically as indented JSON; NaN and infinity are refused, since JSON has neither."""
    write_atomic(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: str | Path) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises:
        FormatError: the file is missing or holds something else.
    """
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise FormatError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise FormatError(f"{path}: holds a JSON {type(value).__name__}, want an object")
    return value


def sha256_file(path: str | Path) -> str:
    """Return the hexadecimal SHA-256 of a file's content."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def known_sha256(path: str | Path) -> str:
    """Return :func:`sha256_file` of ``path``, read again only if the file may have changed since it was last asked for."""
    path, now = Path(path).resolve(), time.time_ns()
    note, mark = _note(path)
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # a note that is missing or damaged says nothing
        known = json.loads(note.read_text(encoding="utf-8"))
        if known["mark"] == mark and max(mark[-2:]) + _SETTLED_NS < known["read_ns"]:
            return str(known["sha256"])
    digest = sha256_file(path)
    with contextlib.suppress(OSError):  # it is only a note
        write_json(note, {"mark": mark, "read_ns": now, "sha256": digest})
    return digest


def remember_sha256(path: str | Path, digest: str) -> None:
    """Note the digest of a file that this process has just written, under a name that no one else writes to."""
    note, mark = _note(Path(path).resolve())
    with contextlib.suppress(OSError):
        write_json(note, {"mark": mark, "read_ns": max(mark[-2:]) + 2 * _SETTLED_NS, "sha256": digest})


def _note(path: Path) -> tuple[Path, list[Any]]:
    """Return where the digest of a file is noted, and what tells this state of it from others; its times come last."""
    stat = path.stat()
    where = cache_dir() / "digests" / f"{hashlib.sha256(os.fsencode(path)).hexdigest()[:32]}.json"
    return where, [str(path), stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]
