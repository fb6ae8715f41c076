"""Compile the CUDA kernels with nvcc and cache the library.

nvcc is searched on the PATH, in ``$CUDA_HOME``, and in the PyPI packages that contain it (``pip install quantkit[cuda]``), in
this order. Like the C++ kernels, the sources do not depend on torch: a library is determined by sources, flags, architectures
and nvcc's version, and its name is a hash of them. It is compiled for the GPU of this machine, or in advance for a list of
architectures.
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
"""The number that ``qk_abi_version()`` of the CUDA library must return; increase both when a signature changes."""

RELEASE: Final = ("80", "86", "89", "90a", "100", "80-ptx", "100-ptx")
"""Architectures of a library for all supported GPUs: Ampere to Blackwell, and PTX for later ones."""

FLAGS: Final = ("-std=c++17", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden", "-cudart=static", "-cudadevrt=none")
_WAY_OUT: Final = (
    "install nvcc with pip install 'quantkit[cuda]' (a C++ compiler is needed too), or put the nvcc of a CUDA 13 toolkit on "
    "the PATH, or set CUDA_HOME; QUANTKIT_KERNEL=reference needs none"
)


def find_nvcc() -> Path:
    """Return the path of nvcc.

    Raises:
        KernelError: there is none.
    """
    candidates = [shutil.which("nvcc")]
    if home := os.environ.get("CUDA_HOME"):
        candidates.append(shutil.which("nvcc", path=str(Path(home) / "bin")))
    packages = importlib.util.find_spec("nvidia")
    for folder in sorted(packages.submodule_search_locations or () if packages else ()):
        candidates += [shutil.which("nvcc", path=str(path)) for path in sorted(Path(folder).glob("cu*/bin"), reverse=True)]
    found = next((path for path in candidates if path), None)
    if found is None:
        raise KernelError(f"nvcc is neither on the PATH nor in CUDA_HOME nor installed as a package; {_WAY_OUT}")
    return Path(found)


def source_directory() -> Path:
    """Return the folder with the CUDA sources, which is in the package when installed, and next to it in a checkout.

    Raises:
        KernelError: there is no such folder.
    """
    here = Path(__file__).parent.parent  # quantkit/kernels
    for folder in (here / "kernels_cuda", here.parent.parent / "kernels_cuda"):
        if folder.is_dir():
            return folder
    raise KernelError(f"the CUDA sources are missing from {here}; install quantkit again")


def sources() -> list[Path]:
    """Return every CUDA source and header, sorted by name."""
    return sorted(path for path in source_directory().iterdir() if path.suffix in (".cu", ".cuh"))


def device_arch(device: int = 0) -> str:
    """Return the architecture of a CUDA device, in the notation of :data:`RELEASE`, for instance ``"90a"``."""
    major, minor = torch.cuda.get_device_capability(device)
    return f"{major}{minor}a" if (major, minor) == (9, 0) else f"{major}{minor}"


def check_arch(name: str) -> str:
    """Return the name of an architecture without a leading ``sm_``.

    Raises:
        KernelError: the name is not of the form ``90a`` or ``80-ptx``, or the architecture is older than 80.
    """
    bare = name.removeprefix("sm_")
    digits = bare.removesuffix("-ptx").rstrip("af")
    if not digits.isdigit() or int(digits) < 80:
        raise KernelError(f"architecture {name!r}: want one of {', '.join(RELEASE)}, or another of at least 80")
    return bare


def command(archs: tuple[str, ...]) -> list[str]:
    """Return nvcc's command line for ``archs``."""
    nvcc = find_nvcc()
    flags = []
    for arch in archs:
        number = arch.removesuffix("-ptx")
        kind = "compute" if arch.endswith("-ptx") else "sm"
        flags.append(f"-gencode=arch=compute_{number},code={kind}_{number}")
    own = nvcc.resolve().parent.parent / "lib"  # the runtime of the PyPI packages; the nvcc of a toolkit finds its own
    return [str(nvcc), *FLAGS, *flags, *([f"-L{own}"] if own.is_dir() else [])]


def library_path(archs: tuple[str, ...]) -> Path:
    """Return the path of the library for ``archs`` in the cache, whether it exists or not."""
    line = command(archs)
    name = "release" if archs == RELEASE else "+".join(archs)
    return build.cache_directory() / f"quantkit-cuda-{name}-{build.digest(sources(), *line, build.version(line[0]))}.so"


def make(archs: tuple[str, ...]) -> Path:
    """Build the library for ``archs`` unless it is in the cache, and return its path.

    Raises:
        KernelError: the build failed; the message has nvcc's output.
    """
    path = library_path(archs)

    def compile_it() -> None:
        logger.info("compiling the CUDA kernels into %s (half a minute per architecture, once)", path)
        files = [source for source in sources() if source.suffix == ".cu"]
        build.compile_and_link(command(archs), files, path, _WAY_OUT)

    build.find_or_make(path, compile_it)
    return path


def library() -> ctypes.CDLL:
    """Return the library for the current CUDA device, building it at the first use. A failure is remembered as well.

    Raises:
        KernelError: there is no device, or the library cannot be built or loaded.
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
    """Return result and argument types of the library's functions. Launching functions take a struct's address and a stream."""
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
    """Return nvcc's path and version and the libraries in the cache, or an error, for ``quantkit doctor``."""
    try:
        path = find_nvcc()
        release = next((line.strip() for line in build.version(str(path)).splitlines() if "release" in line), "")
        built = sorted(path.name for path in build.cache_directory().glob("quantkit-cuda-*.so"))
        return {"nvcc": str(path), "nvcc_version": release, "built": ", ".join(built) or "none yet"}
    except KernelError as error:
        return {"error": str(error)}
