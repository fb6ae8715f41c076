"""Compile the CUDA kernels: find nvcc, name the architectures, keep the library where the CPU's is kept.

nvcc is looked for on the PATH, in ``$CUDA_HOME``, and in the PyPI packages that carry it (``pip install quantkit[cuda]``), in
this order. Like the C++ kernels the sources know no torch: a library depends on sources, flags, architectures and nvcc's
version, and its name hashes them. It is compiled for the GPU at hand, or ahead of time for a list of architectures.
"""

import ctypes
import functools
import importlib.util
import logging
import os
import shutil
from pathlib import Path
from typing import Any, Final

import torch

from quantkit.errors import KernelError
from quantkit.kernels import build

logger = logging.getLogger(__name__)

ABI_VERSION: Final = 3
"""What ``qk_abi_version()`` of a fitting CUDA library returns; raise both when a signature changes."""

RELEASE: Final = ("80", "86", "89", "90a", "100", "80-ptx", "100-ptx")
"""What a library for every supported GPU contains: Ampere to Blackwell, and PTX for what comes after."""

FLAGS: Final = ("-std=c++17", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden", "-cudart=static", "-cudadevrt=none")
_WAY_OUT: Final = (
    "pip install 'quantkit[cuda]' brings nvcc along (a C++ compiler is needed too), or put a CUDA 13 toolkit's nvcc on the "
    "PATH or set CUDA_HOME; QUANTKIT_KERNEL=reference does without"
)


def find_nvcc() -> Path:
    """Return the nvcc to use.

    Raises:
        KernelError: if there is none.
    """
    candidates = [shutil.which("nvcc")]
    if home := os.environ.get("CUDA_HOME"):
        candidates.append(shutil.which("nvcc", path=str(Path(home) / "bin")))
    packages = importlib.util.find_spec("nvidia")
    for folder in sorted(packages.submodule_search_locations or () if packages else ()):
        candidates += [shutil.which("nvcc", path=str(path)) for path in sorted(Path(folder).glob("cu*/bin"), reverse=True)]
    found = next((path for path in candidates if path), None)
    if found is None:
        raise KernelError(f"nvcc is not on the PATH, not in CUDA_HOME and not installed as a package; {_WAY_OUT}")
    return Path(found)


def source_directory() -> Path:
    """Return the folder with the CUDA sources: inside the package when installed, beside it in a checkout.

    Raises:
        KernelError: if it is in neither place.
    """
    here = Path(__file__).parent.parent  # quantkit/kernels
    for folder in (here / "kernels_cuda", here.parent.parent / "kernels_cuda"):
        if folder.is_dir():
            return folder
    raise KernelError(f"the CUDA sources are not beside {here}; install quantkit again")


def sources() -> list[Path]:
    """Return every CUDA source and header, sorted by name."""
    return sorted(path for path in source_directory().iterdir() if path.suffix in (".cu", ".cuh"))


def device_arch(device: int = 0) -> str:
    """Return the architecture of a CUDA device as in :data:`RELEASE`, e.g. ``"90a"``."""
    major, minor = torch.cuda.get_device_capability(device)
    return f"{major}{minor}a" if (major, minor) == (9, 0) else f"{major}{minor}"


def check_arch(name: str) -> str:
    """Return ``name`` without a leading ``sm_``.

    Raises:
        KernelError: if it does not look like ``90a`` or ``80-ptx``, or is older than 80.
    """
    bare = name.removeprefix("sm_")
    digits = bare.removesuffix("-ptx").rstrip("af")
    if not digits.isdigit() or int(digits) < 80:
        raise KernelError(f"architecture {name!r}: want {', '.join(RELEASE)}, or another from 80 on")
    return bare


def command(archs: tuple[str, ...]) -> list[str]:
    """Return nvcc's command line for ``archs``."""
    nvcc = find_nvcc()
    flags = []
    for arch in archs:
        number = arch.removesuffix("-ptx")
        kind = "compute" if arch.endswith("-ptx") else "sm"
        flags.append(f"-gencode=arch=compute_{number},code={kind}_{number}")
    own = nvcc.resolve().parent.parent / "lib"  # where the packages keep the runtime; toolkits' nvcc knows its own folder
    return [str(nvcc), *FLAGS, *flags, *([f"-L{own}"] if own.is_dir() else [])]


def library_path(archs: tuple[str, ...]) -> Path:
    """Return where the library for ``archs`` lies or will lie."""
    line = command(archs)
    name = "release" if archs == RELEASE else "+".join(archs)
    return build.cache_directory() / f"quantkit-cuda-{name}-{build.digest(sources(), *line, build.version(line[0]))}.so"


def make(archs: tuple[str, ...]) -> Path:
    """Build the library for ``archs`` unless the cache has it, and return its path.

    Raises:
        KernelError: with nvcc's output, if it cannot be built.
    """
    path = library_path(archs)

    def compile_it() -> None:
        logger.info("compiling the CUDA kernels into %s (half a minute per architecture, once)", path)
        files = [source for source in sources() if source.suffix == ".cu"]
        build.compile_and_link(command(archs), files, path, _WAY_OUT)

    build.find_or_make(path, compile_it)
    return path


def library() -> ctypes.CDLL:
    """Return the library for the current CUDA device, building it if need be. The outcome is kept for the process.

    Raises:
        KernelError: if there is no device, or the library cannot be built or loaded.
    """
    if not torch.cuda.is_available():
        raise KernelError("no CUDA device is visible to torch")
    outcome = _for_arch(device_arch(torch.cuda.current_device()))
    if isinstance(outcome, KernelError):
        raise outcome
    return outcome


@functools.cache
def _for_arch(arch: str) -> ctypes.CDLL | KernelError:
    try:
        release = library_path(RELEASE)
        path = release if arch in RELEASE and release.exists() else make((arch,))
        return build.open_library(path, signatures(), ABI_VERSION)
    except KernelError as error:
        return error


def signatures() -> dict[str, tuple[Any, list[Any]]]:
    """Return the functions of the library: those that launch take a struct's address, and a stream."""
    pointer, integer = ctypes.c_void_p, ctypes.c_int32
    launches = ("qk_expand", "qk_norm", "qk_activate", "qk_append", "qk_sample", "qk_attend", "qk_attend_prompt", "qk_arrange")
    products = (*(f"qk_matmul_{kind}" for kind in ("codes4", "codes8", "int8", "fp8")), "qk_prompt")
    return {
        "qk_abi_version": (integer, []),
        "qk_error_text": (ctypes.c_char_p, [integer]),
        **{name: (integer, [pointer, pointer]) for name in launches},
        **{name: (integer, [pointer, integer, pointer]) for name in products},
    }


def details() -> dict[str, str]:
    """Return nvcc, sources and the libraries in the cache, for ``quantkit doctor``; what is missing says so."""
    try:
        path = find_nvcc()
        release = next((line.strip() for line in build.version(str(path)).splitlines() if "release" in line), "")
        built = sorted(path.name for path in build.cache_directory().glob("quantkit-cuda-*.so"))
        return {"nvcc": str(path), "nvcc_version": release, "built": ", ".join(built) or "none yet"}
    except KernelError as error:
        return {"error": str(error)}
