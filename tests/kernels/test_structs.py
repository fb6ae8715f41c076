"""Structs that Python fills for the kernels have the size and the fields that the compiler sees in their C++ declarations."""

import ctypes
import subprocess
from pathlib import Path

import pytest

from quantkit.kernels import build
from quantkit.kernels.cpu import layout, structs, tables, tape_structs
from quantkit.kernels.cuda import attention, calls, norms, nvcc, prefill, sampling
from tests.cuda import emulated

CPU = {
    "qk::Linear": layout.LinearStruct,
    "qk::Table": tables.TableStruct,
    "qk::Inputs": tables.InputsStruct,
    "qk::Norm": structs.NormStruct,
    "qk::Attention": structs.AttentionStruct,
    "qk::Mlp": structs.MlpStruct,
    "qk::Layer": structs.LayerStruct,
    "qk::Rotary": structs.RotaryStruct,
    "qk::Program": structs.ProgramStruct,
    "qk::Kv": structs.KvStruct,
    "qk::Batch": structs.BatchStruct,
    "qk::Operand": tape_structs.OperandStruct,
    "qk::TapeStep": tape_structs.TapeStepStruct,
    "qk::TapeProducts": tape_structs.TapeProductsStruct,
    "qk::TapeAttend": tape_structs.TapeAttendStruct,
    "qk::TapeSteps": tape_structs.TapeStepsStruct,
    "qk::TapeMixture": tape_structs.TapeMixtureStruct,
    "qk::TapeStage": tape_structs.TapeStageStruct,
    "qk::Tape": tape_structs.TapeStruct,
    "qk::TapeStates": tape_structs.TapeStatesStruct,
}
CUDA = {
    "append.cu": {"qk::Append": attention.AppendStruct},
    "arrange.cu": {"qk::Arrange": prefill.ArrangeStruct},
    "attend.cuh": {"qk::Attend": attention.AttendStruct},
    "expand.cu": {"qk::Expand": calls.ExpandStruct},
    "fused.cu": {"qk::Norm": norms.NormStruct, "qk::Activate": norms.ActivateStruct},
    "matmul.cuh": {"qk::Matmul": calls.MatmulStruct},
    "sample.cu": {"qk::Sample": sampling.SampleStruct},
}
"""Every struct that is mirrored, by the source that declares it."""

Mirrors = dict[str, type[ctypes.Structure]]


def check(mirrors: Mirrors, include: str, flags: list[str], folder: Path) -> None:
    """Compile assertions that the C++ declarations have the sizes and offsets that ctypes uses."""
    lines = ["#include <cstddef>", f'#include "{include}"']
    for name, mirror in mirrors.items():
        lines.append(f'static_assert(sizeof({name}) == {ctypes.sizeof(mirror)}, "{name}");')
        for field, *_ in mirror._fields_:
            place = getattr(mirror, field)
            same = f"offsetof({name}, {field}) == {place.offset} && sizeof({name}::{field}) == {place.size}"
            lines.append(f'static_assert({same}, "{name}.{field}");')
    source = folder / "assertions.cpp"
    source.write_text("\n".join(lines) + "\n")
    command = [*build.compiler(), *flags, "-fsyntax-only", str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def test_structs_of_the_cpu_kernels(tmp_path):
    flags = ["-std=c++17", f"-I{build.sources()[0].parent}"]
    check(CPU, "tape.h", flags, tmp_path)


def test_a_wrong_mirror_is_noticed(tmp_path):
    class Shifted(ctypes.Structure):
        _fields_ = (("shift", ctypes.c_void_p), *(field for field in structs.NormStruct._fields_ if field[0] != "shift"))

    with pytest.raises(AssertionError, match=r"qk::Norm.shift"):
        check({"qk::Norm": Shifted}, "decoder.h", ["-std=c++17", f"-I{build.sources()[0].parent}"], tmp_path)


@pytest.mark.parametrize("source", CUDA)
def test_structs_of_the_cuda_kernels(source, tmp_path):
    flags = [*emulated.FLAGS, f"-I{nvcc.source_directory()}"]
    check(CUDA[source], source, flags, tmp_path)


def test_no_mirror_is_left_out():
    known = {mirror.__name__ for mirrors in (CPU, *CUDA.values()) for mirror in mirrors.values()}
    modules = (layout, structs, tables, tape_structs, attention, calls, norms, prefill, sampling)
    found = {value.__name__ for module in modules for value in vars(module).values() if _is_struct(value)}
    assert found == known


def _is_struct(value: object) -> bool:
    return isinstance(value, type) and issubclass(value, ctypes.Structure) and value is not ctypes.Structure
