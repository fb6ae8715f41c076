"""Instruction sets and threads to run the CPU kernels on."""

from pathlib import Path

import pytest
import torch

from quantkit.kernels import build

AVX512, AVX2 = {"avx512f", "avx512bw", "avx512vl", "avx512dq"}, {"avx2", "fma", "f16c"}
NEEDED = {
    "avx512-amx": AVX512 | {"avx512_vnni", "avx512_bf16", "amx_tile", "amx_int8", "amx_bf16"},
    "avx512-bf16": AVX512 | {"avx512_vnni", "avx512_bf16"},
    "avx512-vnni": AVX512 | {"avx512_vnni"},
    "avx512": AVX512,
    "avx2-vnni": AVX2 | {"avx_vnni"},
    "avx2": AVX2,
    "portable": set(),
}


@pytest.fixture
def threads():
    """Restore torch's number of threads."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(params=NEEDED)
def isa(request, monkeypatch):
    """Run on the library for one instruction set."""
    flags = set(Path("/proc/cpuinfo").read_text().split()) if Path("/proc/cpuinfo").exists() else set()
    if not NEEDED[request.param] <= flags:
        pytest.skip(f"this CPU has no {request.param}")
    library = build.load(request.param)
    monkeypatch.setattr(build, "library", lambda: library)
    return request.param
