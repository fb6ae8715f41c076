"""The builder: what it does without a compiler, with a broken one, with a damaged cache, and when many build at once."""

import ctypes
import logging
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from quantkit.errors import KernelError
from quantkit.kernels import KERNELS, Problem, build, report, select
from quantkit.nn.linear import QuantLinear
from quantkit.numerics import grid
from quantkit.qtensor import GridTensor
from quantkit.spec import QuantSpec

SPEC = QuantSpec("int4", (1, 32), False)


@pytest.fixture
def fresh(tmp_path, monkeypatch):
    """An empty cache and a builder that remembers nothing; what the process had comes back afterwards."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    caches = (build._native, build.cache_directory, build.warn_once, build._version)
    for cache in caches:
        cache.cache_clear()
    yield tmp_path / "cache" / "quantkit" / "kernels"
    for cache in caches:
        cache.cache_clear()


@pytest.fixture
def quick(monkeypatch):
    """A stand-in for the sources that compiles in a blink."""
    source = 'extern "C" __attribute__((visibility("default"))) '
    names = [name for name in build._SIGNATURES if name != "qk_abi_version"]
    text = f"{source}int qk_abi_version() {{ return {build.ABI_VERSION}; }}\n"
    text += "".join(f'{source}const char* {name}() {{ return "fake"; }}\n' for name in names)

    def write(folder: Path, content: str = text) -> Path:
        folder.mkdir(exist_ok=True, parents=True)
        (folder / "fake.cpp").write_text(content)
        monkeypatch.setattr(build, "sources", lambda: [folder / "fake.cpp"])
        return folder / "fake.cpp"

    return write


def linear() -> tuple[QuantLinear, torch.Tensor]:
    weight = torch.randn(17, 64)
    scale, zero = grid.choose_qparams(weight, SPEC)
    return QuantLinear(GridTensor.from_codes(grid.quantize(weight, scale, zero, SPEC), scale, zero, SPEC)), torch.randn(2, 64)


def test_without_a_compiler_the_reference_runs_and_says_so_once(fresh, monkeypatch, caplog):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            module, x = linear()
            torch.testing.assert_close(module(x), x @ module.dequantize().T)
    messages = [record.getMessage() for record in caplog.records if "reference kernel" in record.getMessage()]
    assert len(messages) == 1
    assert "no C++ compiler" in messages[0]
    assert "apt install g++" in messages[0]
    row = next(row for row in report() if row["kernel"] == "cpu")
    assert not row["available"]
    assert "no C++ compiler" in row["reason"]
    monkeypatch.setenv("QUANTKIT_KERNEL", "cpu")
    with pytest.raises(KernelError, match="no C\\+\\+ compiler"):
        select(Problem(SPEC, (16, 64), "cpu", torch.float32))


def test_cxx_that_does_not_exist_is_named(fresh, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler -x")
    with pytest.raises(KernelError, match="CXX=no-such-compiler"):
        build.library()


def test_a_failing_compiler_shows_its_output_and_leaves_nothing(fresh, quick, tmp_path):
    quick(tmp_path / "src", "#error this cannot be\n")
    with pytest.raises(KernelError, match="this cannot be") as caught:
        build.library()
    assert "fake.cpp" in str(caught.value)
    assert "CXX" in str(caught.value)
    assert list(fresh.iterdir()) == []
    assert KERNELS.get("cpu").rejects(Problem(SPEC, (16, 64), "cpu", torch.float32)) is not None


def test_a_failure_is_not_tried_again(fresh, quick, tmp_path, monkeypatch):
    quick(tmp_path / "src", "#error no\n")
    tries = []
    monkeypatch.setattr(build, "load", lambda isa, load=build.load: tries.append(isa) or load(isa))
    for _ in range(3):
        with pytest.raises(KernelError):
            build.library()
    assert len(tries) == 1


def test_the_key_covers_sources_flags_and_cpu(fresh, quick, tmp_path, monkeypatch):
    source = quick(tmp_path / "src")
    keys = [build.library_key(["g++", "-O3"]), build.library_key(["g++", "-O2"])]
    source.write_text(source.read_text() + "// changed\n")
    keys.append(build.library_key(["g++", "-O3"]))
    monkeypatch.setattr(build, "_cpu", lambda: "another cpu")
    keys.append(build.library_key(["g++", "-O3"]))
    assert len(set(keys)) == len(keys)


def test_a_built_library_is_used_again(fresh, quick, tmp_path, monkeypatch):
    quick(tmp_path / "src")
    build.load("native")
    (path,) = fresh.iterdir()
    before = path.stat().st_mtime_ns
    monkeypatch.setattr(build, "_compile", lambda *arguments: pytest.fail("compiled again"))
    build.load("native")
    assert path.stat().st_mtime_ns == before


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "text"])
def test_a_damaged_library_is_built_again(fresh, quick, tmp_path, caplog, damage):
    quick(tmp_path / "src")
    build.load("native")
    (path,) = fresh.iterdir()
    content = path.read_bytes()
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 1
    path.unlink()  # a library that is mapped must not change under the process
    path.write_bytes({"truncated": content[:5000], "flipped": bytes(flipped), "empty": b"", "text": b"not a library"}[damage])
    with caplog.at_level(logging.WARNING):
        assert build.load("native").qk_abi_version() == build.ABI_VERSION
    assert "damaged" in caplog.text
    assert build.damage(path) is None


def test_a_library_of_another_interface_is_refused(fresh, quick, tmp_path):
    source = quick(tmp_path / "src")
    source.write_text(source.read_text().replace(f"return {build.ABI_VERSION};", "return 999;"))
    with pytest.raises(KernelError, match=f"interface 999, want {build.ABI_VERSION}"):
        build.load("native")
    source.write_text('extern "C" int nothing() { return 0; }')
    with pytest.raises(KernelError, match="cannot be loaded"):
        build.load("native")


def test_a_cache_that_cannot_be_written_is_replaced_and_explained(tmp_path, fresh, quick, monkeypatch, caplog):
    quick(tmp_path / "src")
    (tmp_path / "file").write_text("a file where a directory is wanted")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with caplog.at_level(logging.WARNING):
        assert build.load("native").qk_abi_version() == build.ABI_VERSION
    assert "XDG_CACHE_HOME" in caplog.text
    assert str(build.cache_directory()) in caplog.text
    assert not build.cache_directory().is_relative_to(tmp_path / "file")


def test_processes_may_build_at_once(fresh, quick, tmp_path):
    source = quick(tmp_path / "src")
    code = (
        "import sys, torch; from pathlib import Path; from quantkit.kernels import build; "
        "build.sources = lambda: [Path(sys.argv[1])]; print('ready', flush=True); input(); "
        "print(build.library().qk_abi_version())"
    )
    environment = os.environ | {"XDG_CACHE_HOME": str(fresh.parent.parent), "OMP_NUM_THREADS": "1"}
    pipes = {name: subprocess.PIPE for name in ("stdin", "stdout", "stderr")}
    runs = [subprocess.Popen([sys.executable, "-c", code, str(source)], env=environment, text=True, **pipes) for _ in range(3)]
    assert all(run.stdout.readline() == "ready\n" for run in runs)
    for run in runs:
        run.stdin.write("\n")
        run.stdin.flush()
    for run in runs:
        out, errors = run.communicate(timeout=300)
        assert out.strip() == str(build.ABI_VERSION), errors
    (path,) = fresh.iterdir()  # one library and no temporary left behind
    assert build.damage(path) is None


def test_the_library_hides_what_is_not_its_interface():
    lib = ctypes.CDLL(build.library()._name)
    assert all(hasattr(lib, name) for name in build._SIGNATURES)
    assert not hasattr(lib, "_ZN2qk12parallel_forElliPFvPKvllES1_")  # qk::parallel_for, as GCC and Clang spell it


def test_nothing_is_compiled_or_registered_by_an_import(fresh):
    code = "import torch, quantkit.kernels, quantkit.nn.linear; print(hasattr(torch.ops.quantkit, 'wq_matmul'))"
    environment = os.environ | {"XDG_CACHE_HOME": str(fresh.parent.parent)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
    assert not fresh.exists()


@pytest.mark.parametrize("chosen", ["GOMP_SPINCOUNT", "OMP_WAIT_POLICY", None])
def test_a_runtime_that_runs_already_gets_a_second_team_unless_the_user_chose(monkeypatch, chosen):
    if build._openmp() is None:
        pytest.skip("this torch brings no OpenMP runtime that is known")
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    if chosen is not None:
        monkeypatch.setenv(chosen, "5")
    started = []
    monkeypatch.setattr(threading.Thread, "start", lambda thread: started.append(thread.name))
    build._shorten_waits.__wrapped__()
    assert started == ([] if chosen else ["quantkit-second-team"])
