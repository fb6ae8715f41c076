"""Files are wholly there or not at all."""

import json
import os
from pathlib import Path

import pytest

from quantkit.errors import QuantkitError
from quantkit.registry import Registry
from quantkit.system.files import TEMPORARY, atomic_path, remove_temporaries, sha256_file, write_atomic, write_json


def test_a_failure_leaves_the_previous_file_and_no_litter(tmp_path: Path) -> None:
    target = tmp_path / "a" / "file"
    write_atomic(target, "first")

    def interrupted() -> None:
        with atomic_path(target) as temporary:
            temporary.write_text("second, half wri")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        interrupted()
    assert target.read_text() == "first"
    assert [p.name for p in target.parent.iterdir()] == ["file"]


def test_a_full_disk_leaves_the_previous_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "file"
    write_atomic(target, b"first")

    def full(_handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomic(target, b"second")
    assert target.read_bytes() == b"first"
    assert len(list(tmp_path.iterdir())) == 1


def test_readable_by_others_as_the_umask_says(tmp_path: Path) -> None:
    write_atomic(tmp_path / "file", "x")
    mask = os.umask(0)
    os.umask(mask)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o666 & ~mask


def test_json_and_hash(tmp_path: Path) -> None:
    write_json(tmp_path / "j", {"ä": [1, None]})
    assert json.loads((tmp_path / "j").read_text()) == {"ä": [1, None]}
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "j", float("nan"))
    write_atomic(tmp_path / "h", "abc")
    assert sha256_file(tmp_path / "h") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_leftovers_of_a_kill_are_swept(tmp_path: Path) -> None:
    """And nothing else: a user's own temporary file is not ours."""
    (tmp_path / f".config.json.abc{TEMPORARY}").write_text("")
    others = {"kept.tmp", ".config.json.abc.tmp", ".notes.tmp"}
    for name in others:
        (tmp_path / name).write_text("")
    remove_temporaries(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == others


def test_a_name_is_registered_once() -> None:
    registry: Registry[type] = Registry("thing", package="quantkit.numerics")
    registry.register("a")(int)
    registry.register("a")(int)
    with pytest.raises(QuantkitError, match="'a' is registered twice"):
        registry.register("a")(str)
    assert registry.names() == ["a"]
    assert list(registry) == [("a", int)]
    with pytest.raises(QuantkitError, match="unknown thing 'b'"):
        registry.get("b")
