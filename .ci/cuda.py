"""Compile the CUDA sources and look at what came out; run by .ci/run where nvcc is.

    python .ci/cuda.py [--release] [architecture ...]

For each source, on sm_90a, with `--release` on everything a release contains, one architecture after another: no warning, no
spilled register, no stack. Then, if cuobjdump is there (PATH or the packages nvidia-cuda-cuobjdump and nvidia-cuda-nvdisasm),
the machine code of the hot kernels: tensor-core instructions of the right kind, weights copied 16 bytes at a time past the
first cache, no local memory.
"""

import importlib.util
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from quantkit.kernels.cuda import nvcc

ARCH = "90a"
WANTED = {  # source -> instructions that each of its hot kernels has
    "matmul_codes4": ("HMMA.16816.F32", "LDGSTS.E.BYPASS.128"),
    "matmul_codes8": ("HMMA.16816.F32", "LDGSTS.E.BYPASS.128"),
    "matmul_int8": ("IMMA.16832.S8.S8", "LDGSTS.E.BYPASS.128"),
    "matmul_fp8": ("HMMA.16816.F32", "LDGSTS.E.BYPASS.128"),  # Hopper's mma.sync turns fp8 into half first
    "prompt": ("HGMMA.64x128x16.F32", "LDGSTS.E.BYPASS.128"),
    "attend": ("HMMA.16816.F32", "LDGSTS.E"),
    "attend_prompt": ("HMMA.16816.F32", "LDGSTS.E"),
}
OTHERWISE = {  # the same where an architecture has others
    ("matmul_fp8", "80"): (),  # no fp8: compiled to nothing, and never called
    ("matmul_fp8", "86"): (),
    **{("prompt", arch): () for arch in ("80", "86", "89", "100")},  # Hopper's alone: elsewhere it traps, and is never called
    ("matmul_fp8", "89"): ("QMMA.16832.F32.E4M3.E4M3", "LDGSTS.E.BYPASS.128"),
}


def find(tool: str) -> str | None:
    """Return a tool on the PATH or in the packages of NVIDIA."""
    packages = importlib.util.find_spec("nvidia")
    folders = sorted(packages.submodule_search_locations or ()) if packages else []
    paths = [str(path) for folder in folders for path in Path(folder).glob("cu*/bin")]
    return shutil.which(tool) or shutil.which(tool, path=":".join(paths))


def compile_one(source: Path, folder: Path, arch: str) -> tuple[Path, str, float]:
    """Compile one source; return the object, what the assembler said, and the seconds it took."""
    made, start = folder / f"{source.stem}.{arch}.o", time.monotonic()
    line = [*nvcc.command((arch,)), "-Xptxas=-v", "-Werror=all-warnings", "-c", str(source), "-o", str(made)]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{source.name} does not compile for {arch}:\n{done.stderr}")
    return made, done.stderr, time.monotonic() - start


def spills(said: str) -> list[str]:
    """Return the assembler's lines about kernels that spill or use a stack."""
    found = re.findall(r"\d+ bytes stack frame, \d+ bytes spill stores, \d+ bytes spill loads", said)
    return [line for line in found if any(int(number) for number in re.findall(r"\d+", line))]


def kernels(made: Path, cuobjdump: str, nvdisasm: str) -> dict[str, str]:
    """Return the machine code of every kernel in an object, by name."""
    folder = made.parent / f"{made.stem}.cubins"
    folder.mkdir()
    subprocess.run([cuobjdump, "-xelf", "all", str(made)], cwd=folder, capture_output=True, check=True)
    code = "".join(
        subprocess.run([nvdisasm, "-c", str(cubin)], capture_output=True, text=True, check=True).stdout
        for cubin in folder.glob("*.cubin")
    )
    parts = re.split(r"^\s*\.section\s+\.text\.", code, flags=re.MULTILINE)[1:]
    return {part.partition(",")[0].strip(): part for part in parts}


def inspect(made: Path, stem: str, arch: str, cuobjdump: str, nvdisasm: str) -> list[str]:
    """Return what is wrong with the machine code of a source's kernels."""
    wrong, found = [], kernels(made, cuobjdump, nvdisasm)
    if not found:
        return [f"{stem}: no kernels found"]
    for name, code in found.items():
        wanted = OTHERWISE.get((stem, arch), WANTED[stem])
        wrong += [f"{stem}, {arch}: {name} has no {want}" for want in wanted if not re.search(want, code)]
        if local := re.findall(r"\b(?:STL|LDL)\b", code):
            wrong.append(f"{stem}, {arch}: {name} uses local memory {len(local)} times")
    return wrong


def main() -> None:
    """Compile, check, and print a line per source."""
    named = [arch for arch in sys.argv[1:] if not arch.startswith("-")]
    archs = named or (nvcc.RELEASE if "--release" in sys.argv else (ARCH,))
    jobs = [(path, arch) for arch in archs for path in nvcc.sources() if path.suffix == ".cu"]
    tools = [find("cuobjdump"), find("nvdisasm")]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:
        wrong = []
        results = pool.map(lambda job: compile_one(job[0], Path(folder), job[1]), jobs)
        for (source, arch), (made, said, seconds) in zip(jobs, results, strict=True):
            registers = [int(number) for number in re.findall(r"Used (\d+) registers", said)]
            most = max(registers, default=0)
            print(f"{source.name}, {arch}: {seconds:.0f} s, {len(registers)} kernels, at most {most} registers", flush=True)
            wrong += [f"{source.name}, {arch}: {line}" for line in spills(said)]
            if not arch.endswith("-ptx") and source.stem in WANTED and tools[0] and tools[1]:
                wrong += inspect(made, source.stem, arch, tools[0], tools[1])
        if not all(tools):
            print("machine code not inspected: cuobjdump or nvdisasm is missing")
    if wrong:
        sys.exit("\n".join(wrong))


if __name__ == "__main__":
    main()
