"""One process at a time works in a directory; the next one is told who is at work.

A lock is a file, :data:`NAME`, that says which process holds it, on which machine, and since when. What locks is ``flock(2)``:
the system lets go of it when the process ends, however it ends, so what a killed process or a power cut leaves behind stops
nobody; network file systems pass it on to the server. Where a file system knows no such locks, the file itself is the lock
(made by ``link(2)``, which is atomic everywhere): it is taken over when its process is gone, which on the same machine is known
by process id, start time and boot, so that a reused id is not mistaken for the holder. Of another machine nothing is known,
and the message says which file to delete.

A thread may hold the same lock several times; it is free again after the last.
"""

import contextlib
import errno
import itertools
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from quantkit.errors import BusyError
from quantkit.system.files import clear_errors

try:
    import fcntl as _fcntl
except ImportError:  # a system without flock
    fcntl: ModuleType | None = None
else:
    fcntl = _fcntl

NAME = ".quantkit.lock"
"""Name of the file; it is there while somebody is at work, and after a kill."""

_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
_FACTS = ("pid", "host", "boot", "started", "doing", "since")
_ATTEMPTS = 20
_PAUSE_S = 0.02  # between attempts, and for a holder to write who it is


class _Held:
    """A lock of this process: who has it, how often, and what to undo."""

    def __init__(self, handle: int | None, file: Path) -> None:
        self.thread, self.depth, self.handle, self.file = threading.get_ident(), 1, handle, file

    def free(self) -> None:
        with contextlib.suppress(OSError):
            self.file.unlink()  # before the lock is let go: whoever waits notices that the file is not the one it opened
        self.forget()

    def forget(self) -> None:
        if self.handle is not None:
            os.close(self.handle)


_held: dict[Path, _Held] = {}
_guard = threading.Lock()


def _forget_all() -> None:
    """Let a forked child have none of its parent's locks."""
    global _guard
    _guard = threading.Lock()
    for one in _held.values():
        one.forget()
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_all)


@contextlib.contextmanager
def lock(directory: Path, doing: str) -> Iterator[None]:
    """Hold the lock of a directory, which is made if need be, and removed if it is empty afterwards.

    Args:
        directory: where work is done.
        doing: what is done there, for whoever comes second.

    Raises:
        BusyError: another process, or another thread of this one, holds it.
        DiskError: the directory cannot be made or written to.
    """
    made = _make(directory)
    try:
        path = directory.resolve() / NAME
        _take(path, doing)
        try:
            yield
        finally:
            with _guard:
                one = _held[path]
                one.depth -= 1
                if not one.depth:
                    del _held[path]
                    one.free()
    finally:
        _remove_empty(made)


def _make(directory: Path) -> list[Path]:
    """Make a directory and return what had to be made, innermost first."""
    with clear_errors(f"make the directory {directory}"):
        missing = list(itertools.takewhile(lambda folder: not folder.exists(), (directory, *directory.parents)))
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError:
            _remove_empty(missing)
            raise
    return missing


def _remove_empty(folders: Iterable[Path]) -> None:
    for folder in folders:
        with contextlib.suppress(OSError):  # it is in use, or was never made
            folder.rmdir()


def _take(path: Path, doing: str) -> None:
    with _guard:
        one = _held.get(path)
        if one is not None and one.thread == threading.get_ident():
            one.depth += 1
            return
        if one is not None:
            raise _busy(path, one.file)
        record = json.dumps({**_this_process(), "since": time.time(), "doing": doing})
        with clear_errors(f"write to {path.parent}"):
            _held[path] = _flock(path, record) or _link(path.with_name(f"{NAME}.owner"), record)


def _flock(path: Path, record: str) -> _Held | None:
    """Take the lock by ``flock``; None where there is no such thing."""
    if fcntl is None:
        return None
    for _ in range(_ATTEMPTS):
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(handle, path):  # and was not removed by a holder that has just finished
                os.ftruncate(handle, 0)
                os.pwrite(handle, record.encode(), 0)
                return _Held(handle, path)
        except BlockingIOError:
            os.close(handle)
            raise _busy(path, path) from None
        except OSError as error:
            os.close(handle)
            if error.errno not in _NO_LOCKS:
                raise
            path.unlink(missing_ok=True)
            return None
        os.close(handle)
    raise _busy(path, path)


def _is_at(handle: int, path: Path) -> bool:
    try:
        there = path.stat()
    except FileNotFoundError:
        return False
    own = os.fstat(handle)
    return (own.st_dev, own.st_ino) == (there.st_dev, there.st_ino)


def _link(path: Path, record: str) -> _Held:
    """Take the lock by making its file, and take it over from a process that is gone."""
    own = path.with_name(f"{NAME}.{secrets.token_hex(8)}")
    own.write_text(record, encoding="utf-8")
    try:
        for _ in range(_ATTEMPTS):
            try:
                path.hardlink_to(own)
                return _Held(None, path)
            except FileExistsError:
                found = _read(path)
                if found and _is_alive(found):
                    raise _busy(path, path) from None
                aside = path.with_name(f"{NAME}.{secrets.token_hex(8)}")
                with contextlib.suppress(FileNotFoundError):
                    path.rename(aside)  # one of those who want to take it over succeeds
                    if _read(aside) != found:  # and it was no longer the dead one's
                        aside.rename(path)
                    aside.unlink(missing_ok=True)
                time.sleep(_PAUSE_S)
    finally:
        own.unlink(missing_ok=True)
    raise _busy(path, path)


def _busy(path: Path, file: Path) -> BusyError:
    found = _read(file)
    for _ in range(_ATTEMPTS):
        if found:
            break
        time.sleep(_PAUSE_S)  # the holder has not yet written who it is
        found = _read(file)
    who = "it does not say which"
    way_out = "wait until it has finished, stop it, or choose another directory"
    if found:
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(found["since"]))
        ago = max(0, round(time.time() - found["since"]))
        who = f"{found['doing']}, process {found['pid']} on {found['host']}, since {since} ({ago} seconds ago)"
        if found["host"] != socket.gethostname():
            way_out += f"; if that process is gone, delete {file}"
    return BusyError(f"{path.parent}: another quantkit process is at work there ({who}); {way_out}")


def _read(path: Path) -> dict[str, Any]:
    """Return who holds a lock; nothing if the file does not say it (yet)."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return {
            **{name: str(found[name]) for name in ("pid", "host", "boot", "started", "doing")},
            "since": float(found["since"]),
        }
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _this_process() -> dict[str, str]:
    pid = os.getpid()
    return {"pid": str(pid), "host": socket.gethostname(), "boot": _boot(), "started": _started(str(pid))}


def _is_alive(found: dict[str, Any]) -> bool:
    """Say whether the process that wrote a lock may still run; of another machine's this is not known, so it may."""
    if found["host"] != socket.gethostname():
        return True
    if found["boot"] != _boot() or not found["pid"].isdigit():
        return False
    try:
        os.kill(int(found["pid"]), 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return bool(found["started"] == _started(found["pid"]))


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""


def _started(pid: str) -> str:
    """Return when a process started, in ticks since the machine did; empty where the system does not say it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""
