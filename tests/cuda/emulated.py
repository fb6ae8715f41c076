"""The CUDA kernels compiled for the CPU: the sources of ``kernels_cuda`` on the machine that ``host.h`` imitates."""

import contextlib
import ctypes
import functools
from pathlib import Path

import torch

from quantkit.kernels import build
from quantkit.kernels.cuda import calls, nvcc, prefill

HERE = Path(__file__).parent
FLAGS = ("-x", "c++", "-std=c++17", "-O2", "-fPIC", "-w", f"-I{HERE}", "-ffp-contract=off")


@functools.cache
def library() -> ctypes.CDLL:
    """Build (once per change of a source) and load the kernels; on a processor they run a few million times slower."""
    command = [*build.compiler(), *FLAGS]
    files = [*nvcc.sources(), HERE / "host.h", HERE / "host.cu"]
    path = build.cache_directory() / f"quantkit-emulated-{build.digest(files, *command, build.version(command[0]))}.so"
    units = [file for file in files if file.suffix == ".cu"]
    build.find_or_make(path, lambda: link(command, units, path))
    return build.open_library(path, nvcc.signatures(), nvcc.ABI_VERSION)


def link(command: list[str], units: list[Path], path: Path) -> None:
    plain = [part for part in command if part not in ("-x", "c++")]
    build.compile_and_link(plain, units, path, "the emulator needs g++", ("-x", "c++"))


@contextlib.contextmanager
def machine(monkeypatch, processors: int = 8, capability: tuple[int, int] = (8, 6), last_block_first: bool = False):
    """Let calls go to the emulated library, with CPU tensors."""
    built = library()
    built.qk_host_last_block_first(last_block_first)
    monkeypatch.setattr(nvcc, "library", lambda: built)
    monkeypatch.setattr(calls, "on_device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(calls, "stream_of", lambda device: 0)
    monkeypatch.setattr(calls, "multiprocessors", lambda device: processors)
    monkeypatch.setattr(calls, "slice_bytes", lambda device: calls.SLICE_BYTES)
    monkeypatch.setattr(calls, "runs_on", lambda x: True)
    monkeypatch.setattr(calls, "capturing", lambda: False)
    monkeypatch.setattr(prefill, "capability", lambda device: capability)
    monkeypatch.setattr(prefill, "_known", {})
    calls._counters.pop((torch.device("cpu"), 0), None)
    yield
    counters = calls._counters.pop((torch.device("cpu"), 0), None)
    assert counters is None or not counters.any()  # every kernel leaves them as it found them
