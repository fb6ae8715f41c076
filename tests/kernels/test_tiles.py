"""The tile path of AMX: run on plain C++ in the place of the tile intrinsics, and compiled as hardware will run it."""

import platform
import subprocess
from pathlib import Path

import pytest

from quantkit.kernels import build
from tests.kernels.conftest import NEEDED
from tests.kernels.test_cpu import SANITIZE, run_driver

pytestmark = pytest.mark.skipif(platform.machine().lower() not in ("x86_64", "amd64"), reason="tiles are x86's")


def test_the_contract_holds_on_tiles(tmp_path):
    if not NEEDED["avx512-bf16"] <= set(Path("/proc/cpuinfo").read_text().split()):
        pytest.skip("this CPU lacks what remains beside tiles: AVX-512 with VNNI and bfloat16")
    stand_in = str(Path(__file__).with_name("tiles.h"))  # the driver fails where no tile was multiplied
    command = [*build.compiler(), *build.ISA_FLAGS["avx512-bf16"], *SANITIZE, "-include", stand_in]
    assert run_driver(command, tmp_path / "driver") == "avx512 vnni bf16 amx"


@pytest.mark.parametrize(
    ("name", "products"), [("linear_int8.cpp", {"tdpbsud", "tdpbssd"}), ("linear_pairs.cpp", {"tdpbf16ps"})]
)
def test_the_intrinsics_are_those_of_the_compiler(name, products):
    source = next(path for path in build.sources() if path.name == name)
    command = [*build.compiler(), *build.FLAGS, *build.ISA_FLAGS["avx512-amx"], "-O1", "-S", str(source), "-o", "-"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert {"ldtilecfg", "tileloadd", "tilestored", "tilerelease", *products} <= set(done.stdout.split())
