"""Files are wholly there or not at all."""

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from quantkit.errors import DiskError, QuantkitError
from quantkit.registry import Registry
from quantkit.system import files
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


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "quantkit"


def test_a_cache_is_made_for_its_user_alone(cache: Path) -> None:
    assert files.private_directory("kernels") == cache / "kernels"
    assert files.private_directory("kernels") == cache / "kernels"
    assert (cache.stat().st_mode & 0o777, (cache / "kernels").stat().st_mode & 0o777) == (0o700, 0o700)


@pytest.mark.parametrize("name", [".", "kernels"])
@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("group", "mode 770"),
        ("all", "mode 777"),
        ("link", "symbolic link"),
        ("owner", "belongs to another user"),
        ("file", "it is a file|parents are directories"),
    ],
)
def test_a_cache_that_others_could_have_filled_is_not_used(
    cache: Path, monkeypatch: pytest.MonkeyPatch, name: str, kind: str, reason: str
) -> None:
    folder = cache / name
    folder.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    if kind == "link":
        (cache.parent / "elsewhere" / "kernels").mkdir(parents=True, mode=0o700)
        if folder.exists():
            folder.rmdir()
        folder.symlink_to(cache.parent / "elsewhere")
    elif kind == "file":
        if folder.exists():
            folder.rmdir()
        folder.write_text("")
    else:
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod({"group": 0o770, "all": 0o777, "owner": 0o700}[kind])
    if kind == "owner":
        monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(DiskError, match=reason):
        files.private_directory("kernels")
    with pytest.raises(OSError, match=reason):
        files.private_directory("kernels")


def test_notes_of_digests_that_others_could_have_written_say_nothing(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("content")
    os.utime(tmp_path / "file", (1, 1))
    monkeypatch.setattr(files, "_SETTLED_NS", -(10**12))  # old enough to be remembered
    right = files.known_sha256(tmp_path / "file")
    monkeypatch.setattr(files, "sha256_file", lambda path: "read again")
    assert files.known_sha256(tmp_path / "file") == right
    (cache / "digests").chmod(0o777)
    assert files.known_sha256(tmp_path / "file") == "read again"


def test_threads_that_write_leave_the_umask_alone(tmp_path: Path) -> None:
    def write(index: int) -> None:
        for number in range(50):
            write_atomic(tmp_path / f"{index}-{number}", "x")

    mask = os.umask(0o027)
    try:
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(write, range(8)))
        assert {file.stat().st_mode & 0o777 for file in tmp_path.iterdir()} == {0o640}
        assert os.umask(0o027) == 0o027
    finally:
        os.umask(mask)


@pytest.mark.parametrize("path", ["", " ", "a\0b", "x" * 300, "file/below"])
def test_a_path_that_cannot_be_written_is_a_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(DiskError, match=r"empty|NUL|shorter name|parents are directories"):
        write_json(path, {})
    assert [file.name for file in tmp_path.iterdir()] == ["file"]
