"""Files that are either wholly there or not there at all.

Everything quantkit writes goes to a temporary name in the same directory, is flushed to the disk and then renamed, so a
crash, a kill or a full disk leaves the previous state intact.

The digest of a large file is remembered in the cache, as long as the file is provably the one that was read: same path,
device, inode, size and times, and last changed well before it was read (a file system's clock ticks in milliseconds, so what
is written while it is read could otherwise go unnoticed).
"""

import contextlib
import errno
import hashlib
import json
import os
import secrets
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from quantkit.errors import DiskError, FormatError, QuantkitError

TEMPORARY = ".quantkit.tmp"
"""What the names of temporary files end in, and nobody else's files do."""

_WAYS_OUT = {
    errno.ENOSPC: "free some space and try again",
    errno.EDQUOT: "free some space and try again",
    errno.EACCES: "choose a place that you may read and write",
    errno.EPERM: "choose a place that you may read and write",
    errno.EROFS: "choose a place that you may write to",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ENOTDIR: "choose a path whose parents are directories",
    errno.EEXIST: "choose a path whose parents are directories",
}

_SETTLED_NS = 2_000_000_000
"""A file that changed less than this before it was read may have changed since without its times showing it."""


def cache_dir() -> Path:
    """Return quantkit's cache directory: ``$XDG_CACHE_HOME/quantkit``, or ``~/.cache/quantkit``."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "quantkit"


def cache_switch() -> Path:
    """Return the file whose presence says that nothing large is to be kept in the cache."""
    return cache_dir() / "prepacked.off"


def private_directory(name: str) -> Path:
    """Return directory ``name`` of the cache, made if need be, if nobody else can have put anything there.

    Raises:
        DiskError: it, or the cache's own directory, is a symbolic link, belongs to somebody else, or others may write to it; or
            the system refuses to make it.
    """
    root = cache_dir()
    with clear_errors(f"make {root / name}"):
        root.parent.mkdir(parents=True, exist_ok=True)
        for folder in (root, root / name):
            with contextlib.suppress(FileExistsError):
                folder.mkdir(mode=0o700)
            if reason := shared(folder) or (None if folder.is_dir() else "it is a file"):
                raise DiskError(f"{folder} is not used: {reason}; remove it, or set XDG_CACHE_HOME to a directory of your own")
    return root / name


def shared(path: Path) -> str | None:
    """Say why others may have written a file or directory; None if only this user can have."""
    found = path.lstat()
    if stat.S_ISLNK(found.st_mode):
        return "it is a symbolic link"
    if not (stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode)):
        return "it is neither a file nor a directory"
    if not hasattr(os, "geteuid"):  # a system whose files have other owners
        return None
    if found.st_uid != os.geteuid():
        return f"it belongs to another user ({found.st_uid})"
    return f"others may write to it (mode {found.st_mode & 0o777:o})" if found.st_mode & 0o022 else None


@contextlib.contextmanager
def clear_errors(action: str) -> Iterator[None]:
    """Raise what the system refuses inside as an error that says what could not be done, why, and the way out.

    Args:
        action: completes "cannot ...", and names the path.

    Raises:
        DiskError: instead of any :class:`OSError`.
    """
    try:
        yield
    except QuantkitError:
        raise
    except OSError as error:
        way_out = _WAYS_OUT.get(error.errno or 0, "see what the system says of that path")
        raise DiskError(f"cannot {action}: {error.strerror or error}; {way_out}") from error


def named_path(path: Any) -> Path:
    """Return what a user gave as the name of a file or directory.

    Raises:
        DiskError: it is no name.
    """
    if not isinstance(path, str | os.PathLike):
        raise DiskError(f"got a {type(path).__name__} where a path is wanted; give the name of a file or directory, as text")
    try:
        os.fsencode(path)
    except UnicodeEncodeError:
        raise DiskError(f"the path {str(path)!r} holds half a surrogate pair, which is no character; choose another") from None
    return Path(path)


def usable_path(path: str | Path) -> Path:
    """Return a path that a user gave to write to, if it can be one.

    Raises:
        DiskError: it is empty, which would mean the working directory, is no path, or holds a NUL character.
    """
    named_path(path)
    if not str(path).strip():
        raise DiskError("the path to write to is empty; give a name, or . for the working directory")
    if "\0" in str(path):
        raise DiskError(f"the path {str(path)!r} holds a NUL character, which no file name may; choose another")
    return Path(path)


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on success sync it and rename it to ``path``, on any error remove it.

    Raises:
        DiskError: the system refuses, or the disk is full.
    """
    target = usable_path(path)
    with clear_errors(f"write {target}"):
        target.parent.mkdir(parents=True, exist_ok=True)
        with temporary_file(target) as temporary:
            yield temporary
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            temporary.replace(target)
        sync_directory(target.parent)


@contextlib.contextmanager
def temporary_file(target: Path) -> Iterator[Path]:
    """Yield the path of a new empty file beside ``target``, as readable as the umask lets files be; it goes afterwards."""
    temporary = target.with_name(f".{target.name[:40]}.{secrets.token_hex(8)}{TEMPORARY}")
    os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def sync_directory(path: Path) -> None:
    """Make a rename in ``path`` durable; directories cannot be opened for this on every system, which is harmless."""
    with contextlib.suppress(OSError):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def sync_file(path: Path) -> None:
    """Make the content of a file durable."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def remove_temporaries(directory: str | Path) -> None:
    """Remove what a killed :func:`atomic_path` left in ``directory``; nobody else may be writing there."""
    for leftover in Path(directory).glob(f".*{TEMPORARY}"):
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
    path = named_path(path)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
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
    mark = _mark(path)
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # a note that is missing or damaged says nothing
        known = json.loads(_note(path).read_text(encoding="utf-8"))
        if known["mark"] == mark and max(mark[-2:]) + _SETTLED_NS < known["read_ns"]:
            return str(known["sha256"])
    digest = sha256_file(path)
    with contextlib.suppress(OSError):  # it is only a note
        write_json(_note(path), {"mark": mark, "read_ns": now, "sha256": digest})
    return digest


def remember_sha256(path: str | Path, digest: str) -> None:
    """Note the digest of a file that this process has just written, under a name that no one else writes to."""
    path = Path(path).resolve()
    mark = _mark(path)
    with contextlib.suppress(OSError):
        write_json(_note(path), {"mark": mark, "read_ns": max(mark[-2:]) + 2 * _SETTLED_NS, "sha256": digest})


def _mark(path: Path) -> list[Any]:
    """Return what tells this state of a file from others; its times come last."""
    found = path.stat()
    return [str(path), found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns]


def _note(path: Path) -> Path:
    """Return where the digest of a file is noted; an OSError if others could have noted something there."""
    return private_directory("digests") / f"{hashlib.sha256(os.fsencode(path)).hexdigest()[:32]}.json"
