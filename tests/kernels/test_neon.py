"""The kernels on 64-bit ARM: cross-compiled, and run by an emulator, which proves results and says nothing of speed."""

import platform
import shutil

import pytest

from quantkit.kernels import build
from tests.kernels.test_cpu import run_driver

LEVELS = {"neon dotprod": ("-march=armv8.2-a+dotprod", "-O1"), "neon i8mm bf16": ("-march=armv8.6-a", "-O3")}


@pytest.mark.parametrize("isa", LEVELS)
def test_the_contract_holds_on_arm(isa, tmp_path):
    compiler, emulator = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")
    if not compiler or not emulator:
        pytest.skip("no aarch64-linux-gnu-g++ or no qemu-aarch64 (Debian: g++-aarch64-linux-gnu, qemu-user)")
    march, optimize = LEVELS[isa]
    assert run_driver([compiler, march, "-static"], tmp_path / "driver", (emulator, "-cpu", "max"), optimize) == isa


@pytest.mark.parametrize(("system", "flag"), [("Darwin", "-mcpu=apple-m1"), ("Linux", "-mcpu=native")])
def test_a_mac_whose_compiler_cannot_ask_the_cpu_gets_what_every_mac_has(system, flag, tmp_path, monkeypatch):
    compiler = tmp_path / "old-clang"
    compiler.write_text('#!/bin/sh\nfor word; do [ "$word" = -mcpu=native ] && exit 1; done\nexit 0\n')
    compiler.chmod(0o755)
    monkeypatch.setattr(platform, "system", lambda: system)
    monkeypatch.setitem(build.ISA_FLAGS, "native", ("-mcpu=native",))
    assert build.isa_flags([str(compiler)], "native") == (flag,)
    assert build.isa_flags([str(compiler)], "portable") == ()
