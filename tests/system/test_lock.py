"""One process at a time, and nobody is stopped by a lock that nobody holds."""

import json
import os
import signal
import socket
import threading
import time
from pathlib import Path

import pytest

from quantkit.errors import BusyError, DiskError
from quantkit.system import lock as module
from quantkit.system.lock import NAME, lock


def in_child(directory: Path, hold_s: float = 0.0, kill: bool = False) -> int:
    """Take the lock in another process; return 0 if it got it, 3 if somebody was at work."""
    child = os.fork()
    if child == 0:
        status = 4
        try:
            with lock(directory, "testing"):
                time.sleep(hold_s)
                if kill:
                    os.kill(os.getpid(), signal.SIGKILL)
            status = 0
        except BusyError:
            status = 3
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.fixture(params=["flock", "file"])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With and without locks of the file system."""
    if request.param == "file":
        monkeypatch.setattr(module, "fcntl", None)
    return str(request.param)


pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")


def test_the_second_is_told_who_is_first(tmp_path: Path, kind: str) -> None:
    out = tmp_path / "a" / "out"
    with lock(out, "quantizing"), lock(out, "the same thread, once more"):
        assert in_child(out) == 3
        found: list[str] = []

        def other() -> None:
            try:
                with lock(out, "another thread"):
                    found.append("got it")
            except BusyError as error:
                found.append(str(error))

        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        who = f"(quantizing, process {os.getpid()} on {socket.gethostname()}, since "
        assert found[0].startswith(f"{out}: another quantkit process is at work there {who}")
    assert not (tmp_path / "a").exists(), "what it made for itself goes, as long as it is empty"
    assert in_child(out) == 0


def test_a_killed_holder_stops_nobody(tmp_path: Path, kind: str) -> None:
    assert in_child(tmp_path, kill=True) == -signal.SIGKILL
    assert any(tmp_path.iterdir())
    assert in_child(tmp_path) == 0
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "stale"),
    [
        ({"boot": "another"}, True),
        ({"started": "1"}, True),  # the process id is another process's by now
        ({"pid": "4194305"}, True),
        ({"host": "elsewhere"}, False),
        ({}, False),
    ],
)
def test_without_locks_of_the_file_system_a_holder_is_known_to_be_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, str], stale: bool
) -> None:
    monkeypatch.setattr(module, "fcntl", None)
    record = {**module._this_process(), "since": time.time(), "doing": "sleeping", **change}
    (tmp_path / f"{NAME}.owner").write_text(json.dumps(record))
    if stale:
        with lock(tmp_path, "testing"):
            pass
        assert not list(tmp_path.iterdir())
    else:
        with pytest.raises(BusyError, match="delete .*owner" if change else "sleeping"), lock(tmp_path, "testing"):
            pass


def test_a_file_system_that_refuses_locks_is_used_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(module.fcntl, "flock", refuse)
    with lock(tmp_path, "testing"):
        assert [file.name for file in tmp_path.iterdir()] == [f"{NAME}.owner"]
        assert in_child(tmp_path) == 3


def test_a_lock_that_is_damaged_or_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / NAME).write_text("nonsense")
    with lock(tmp_path, "testing"):
        pass
    (tmp_path / "elsewhere").write_text("mine")
    (tmp_path / NAME).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DiskError, match="cannot write to"), lock(tmp_path, "testing"):
        pass
    assert (tmp_path / "elsewhere").read_text() == "mine"


@pytest.mark.parametrize("name", ["x" * 300, "file/below"])
def test_a_directory_that_cannot_be_is_an_error_that_says_so(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DiskError, match=r"cannot make the directory .*; choose"), lock(tmp_path / name, "testing"):
        pass
