"""Finding nvcc, naming architectures, keeping libraries; compiling itself is checked where nvcc is (``.ci/cuda.py``)."""

import os
import stat
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from quantkit.cli import app
from quantkit.errors import KernelError
from quantkit.kernels import build
from quantkit.kernels.cuda import nvcc


@pytest.fixture
def nowhere(tmp_path, monkeypatch):
    """No nvcc anywhere, an empty cache."""
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(nvcc.importlib.util, "find_spec", lambda name: None)
    caches = (build.cache_directory, build._version)
    for cache in caches:
        cache.cache_clear()
    yield tmp_path
    for cache in caches:
        cache.cache_clear()


def put(folder: Path, body: str = 'echo "release 13.0"') -> Path:
    """A stand-in for nvcc: a script that writes what follows -o."""
    folder.mkdir(parents=True)
    path = folder / "nvcc"
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def test_without_nvcc_the_way_out_is_named(nowhere):
    with pytest.raises(KernelError, match=r"quantkit\[cuda\]"):
        nvcc.find_nvcc()
    assert "quantkit[cuda]" in nvcc.details()["error"]


def test_path_then_cuda_home_then_packages(nowhere, monkeypatch):
    package = put(nowhere / "site" / "nvidia" / "cu13" / "bin")

    class Spec:
        submodule_search_locations = (str(nowhere / "site" / "nvidia"),)

    monkeypatch.setattr(nvcc.importlib.util, "find_spec", lambda name: Spec)
    assert nvcc.find_nvcc() == package
    (package.parent.parent / "lib").mkdir()
    assert f"-L{package.parent.parent / 'lib'}" in nvcc.command(("90a",))
    home = put(nowhere / "home" / "bin")
    monkeypatch.setenv("CUDA_HOME", str(nowhere / "home"))
    assert nvcc.find_nvcc() == home
    on_path = put(nowhere / "path")
    monkeypatch.setenv("PATH", str(on_path.parent))
    assert nvcc.find_nvcc() == on_path


def test_architectures():
    assert nvcc.check_arch("sm_90a") == "90a"
    assert nvcc.check_arch("100-ptx") == "100-ptx"
    for name in ("75", "hopper", "", "90x"):
        with pytest.raises(KernelError, match="want one of 80, 86"):
            nvcc.check_arch(name)


def test_the_key_covers_sources_flags_archs_and_version(nowhere, monkeypatch):
    path = put(nowhere / "bin")
    monkeypatch.setenv("PATH", f"{path.parent}:{os.defpath}")
    names = {nvcc.library_path(archs).name for archs in (("90a",), ("80",), nvcc.RELEASE)}
    assert any("release" in name for name in names)
    monkeypatch.setattr(nvcc, "FLAGS", ("-O1",))
    names.add(nvcc.library_path(("90a",)).name)
    build._version.cache_clear()
    path.write_text("#!/bin/sh\necho other\n")
    names.add(nvcc.library_path(("90a",)).name)
    monkeypatch.setattr(nvcc, "sources", lambda: [Path(__file__)])
    names.add(nvcc.library_path(("90a",)).name)
    assert len(names) == 6


def test_a_library_is_made_once_and_failures_show_the_output(nowhere, monkeypatch):
    log = nowhere / "log"
    script = f'echo "$@" >> {log}\nwhile [ $# -gt 0 ]; do [ "$1" = -o ] && echo library > "$2"; shift; done'
    path = put(nowhere / "bin", script)
    monkeypatch.setenv("PATH", f"{path.parent}:{os.defpath}")
    made = nvcc.make(("90a",))
    before = log.read_text()
    assert made.exists()
    assert "arch=compute_90a,code=sm_90a" in before
    assert nvcc.make(("90a",)) == made
    assert [line for line in log.read_text()[len(before) :].splitlines() if "--version" not in line] == []
    path.write_text('#!/bin/sh\n[ "$1" = --version ] && exit 0\necho "no such arch" >&2\nexit 3\n')
    build._version.cache_clear()
    with pytest.raises(KernelError, match="no such arch"):
        nvcc.make(("80",))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
def test_without_a_device_there_is_no_library():
    with pytest.raises(KernelError, match="no CUDA device"):
        nvcc.library()


def test_the_sources_lie_in_the_checkout():
    names = {path.name for path in nvcc.sources()}
    assert {"device.cuh", "unpack.cuh", "matmul.cuh", "attend.cu"} <= names
    assert sys.modules["quantkit.kernels.cuda.nvcc"] is nvcc


def test_the_command_builds_what_is_named(nowhere, monkeypatch):
    path = put(nowhere / "bin", 'while [ $# -gt 0 ]; do [ "$1" = -o ] && echo library > "$2"; shift; done')
    monkeypatch.setenv("PATH", f"{path.parent}:{os.defpath}")
    done = CliRunner(env={"COLUMNS": "400"}).invoke(app, ["build-kernels", "--arch", "sm_90a", "--arch", "100-ptx"])
    assert done.exit_code == 0, done.output
    assert str(nvcc.library_path(("90a", "100-ptx"))) in done.output
    assert nvcc.library_path(("90a", "100-ptx")).exists()
    assert CliRunner().invoke(app, ["build-kernels", "--arch", "volta"]).exit_code == 2
