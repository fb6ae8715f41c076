"""The kernels on 64-bit ARM: cross-compiled, and run by an emulator, which proves results and says nothing of speed."""

import platform
import shutil

import pytest

from quantkit.kernels import build
from tests.kernels.test_cpu import run_driver

CROSS = "aarch64-linux-gnu-g++"
LEVELS = {
    "neon plain": "-march=armv8-a",
    "neon dotprod": "-march=armv8.2-a+dotprod",
    "neon i8mm bf16": "-march=armv8.6-a",
}


def needs(*programs: str) -> list[str]:
    """Return where programs lie, or skip the test."""
    for name in programs:
        if not shutil.which(name):
            pytest.skip(f"no {name} (Debian: g++-aarch64-linux-gnu and qemu-user)")
    return list(programs)


@pytest.mark.parametrize("isa", LEVELS)
def test_the_contract_holds_on_arm(isa, tmp_path):
    compiler, emulator = needs(CROSS, "qemu-aarch64")
    assert run_driver([compiler, LEVELS[isa], "-static"], tmp_path / "driver", (emulator, "-cpu", "max")) == isa


def test_the_library_builds_for_arm_as_it_will_be(tmp_path):
    (compiler,) = needs(CROSS)
    files = [path for path in build.sources() if path.suffix == ".cpp"]
    build.compile_and_link([compiler, *build.FLAGS, LEVELS["neon i8mm bf16"]], files, tmp_path / "quantkit.so", "")
    assert (tmp_path / "quantkit.so").read_bytes()[:4] == b"\x7fELF"


@pytest.mark.parametrize(("system", "flag"), [("Darwin", "-mcpu=apple-m1"), ("Linux", "-mcpu=native")])
def test_a_mac_whose_compiler_cannot_ask_the_cpu_gets_what_every_mac_has(system, flag, tmp_path, monkeypatch):
    compiler = tmp_path / "old-clang"
    compiler.write_text('#!/bin/sh\nfor word; do [ "$word" = -mcpu=native ] && exit 1; done\nexit 0\n')
    compiler.chmod(0o755)
    monkeypatch.setattr(platform, "system", lambda: system)
    monkeypatch.setitem(build.ISA_FLAGS, "native", ("-mcpu=native",))
    assert build.isa_flags([str(compiler)], "native") == (flag,)
    assert build.isa_flags([str(compiler)], "portable") == ()
