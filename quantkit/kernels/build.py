"""Compile the C++ kernels at the first use, cache the library, and load it with ctypes.

The sources in ``csrc`` do not depend on torch: they define plain C functions on raw pointers. The wheel is therefore pure
Python, one build works with every Python and torch version, and a machine without a compiler still works, with the reference
kernel.

Libraries are cached in ``$XDG_CACHE_HOME/quantkit/kernels`` (``~/.cache`` by default). The name of a library is a hash of
everything it depends on: sources, flags, compiler and its version, and the features of the CPU that it is compiled for. On x86
it uses AVX2, AVX-512, VNNI and bfloat16 products, if the CPU has them; on 64-bit ARM, NEON with dotprod, i8mm and bf16 (tested
under emulation; speed not measured). With AMX, tiles multiply int8 from 32 rows on, and bfloat16 numbers from two rows on.

A library is written to a temporary file and renamed, so several processes can build at the same time. The SHA-256 of its name
and content is appended to the file (loaders ignore trailing bytes), so a damaged or exchanged file is detected before it is
mapped, and rebuilt. A directory or file that others could have written to is not used.
"""

import atexit
import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import torch

from quantkit.errors import KernelError
from quantkit.kernels import build
from quantkit.system.cores import fewer_threads, usable_cores, waits_are_chosen
from quantkit.system.files import atomic_path, private_directory, shared

logger = logging.getLogger(__name__)

ABI_VERSION: Final = 5
"""The number that ``qk_abi_version()`` of the library must return; increase both when a signature changes."""

DTYPE_CODES: Final = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
"""The number of a float dtype in the C interface."""

FLAGS: Final = ("-std=c++17", "-O3", "-fno-math-errno", "-fPIC", "-pthread", "-fvisibility=hidden", "-Wno-psabi")

_ARM: Final = platform.machine().lower() in ("aarch64", "arm64")

_AVX512: Final = ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c")

ISA_FLAGS: Final[dict[str, tuple[str, ...]]] = {
    "native": ("-mcpu=native",) if _ARM else ("-march=native",),
    "avx512-amx": (*_AVX512, "-mavx512vnni", "-mavx512bf16", "-mamx-tile", "-mamx-int8", "-mamx-bf16"),
    "avx512-bf16": (*_AVX512, "-mavx512vnni", "-mavx512bf16"),
    "avx512-vnni": (*_AVX512, "-mavx512vnni"),
    "avx512": _AVX512,
    "avx2-vnni": ("-mavx2", "-mfma", "-mf16c", "-mavxvnni"),
    "avx2": ("-mavx2", "-mfma", "-mf16c"),
    "portable": (),
}
"""Instruction sets that a library can be built for: ``native`` for this CPU, the others for tests."""

_POINTER, _LONG, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
_SIGNATURES: Final[dict[str, tuple[Any, list[Any]]]] = {
    "qk_abi_version": (_INT, []),
    "qk_isa": (ctypes.c_char_p, []),
    "qk_multiplies_bfloat16": (_INT, []),
    "qk_use_openmp": (None, [_POINTER] * 3),
    "qk_linear": (_INT, [_POINTER] * 4 + [_LONG] * 2 + [_INT] * 2),
    "qk_decoder_bytes": (_LONG, [_POINTER] + [_LONG] * 2 + [_INT] * 2),
    "qk_decoder_run": (None, [_POINTER] * 4 + [_INT]),
    "qk_tape_bytes": (_LONG, [_POINTER] + [_LONG] * 2 + [_INT] * 2),
    "qk_tape_run": (None, [_POINTER] * 5 + [_INT]),
    "qk_search": (_INT, [_POINTER] * 5 + [_LONG] * 4 + [_INT] * 5),
    "qk_round": (_INT, [_POINTER] * 6 + [_LONG] * 4 + [_INT] * 5),
    "qk_sweep_rows": (_INT, []),
    "qk_sweep": (_INT, [_POINTER] * 5 + [_LONG] * 2 + [_INT] * 3),
    "qk_descend": (_INT, [_POINTER] * 5 + [_LONG] * 2 + [_INT] * 3),
    "qk_moment": (_INT, [_POINTER] * 3 + [_LONG] * 2 + [_INT] * 2),
    "qk_draw_scratch": (_LONG, [_LONG]),
    "qk_draw": (_INT, [_POINTER] * 9 + [_LONG] * 2 + [_INT] * 2),
    "qk_divergence": (_INT, [_POINTER] * 4 + [_LONG] * 2 + [_INT] * 2),
    "qk_drift": (_INT, [_POINTER] * 2 + [ctypes.c_float] + [_LONG] * 2 + [_INT] * 2),
    "qk_settle": (_INT, [_POINTER] * 3 + [_INT] + [_LONG] * 2 + [_INT]),
    "qk_fake": (_INT, [_POINTER] * 4 + [ctypes.c_float] + [_LONG] * 2 + [_INT] * 3),
    "qk_fake_gradient": (_INT, [_POINTER] * 7 + [ctypes.c_float] + [_LONG] * 2 + [_INT] * 3),
    "qk_expand_groups": (_INT, [_POINTER] * 3 + [_LONG] * 2 + [_INT] * 2),
    "qk_reduce_groups": (_INT, [_POINTER] * 3 + [_LONG] * 2 + [_INT] * 2),
}
_WAY_OUT: Final = (
    "install a C++ compiler (apt install g++, dnf install gcc-c++, conda install gxx, xcode-select --install) "
    "or set CXX to one; QUANTKIT_KERNEL=reference needs none"
)


def library() -> ctypes.CDLL:
    """Return the library for this CPU, building it at the first use. A failure is remembered as well.

    Raises:
        KernelError: the library cannot be built or loaded; the message has the compiler's output.
    """
    outcome = _native()
    if isinstance(outcome, KernelError):
        raise outcome
    return outcome


@functools.cache
def _native() -> ctypes.CDLL | KernelError:
    try:
        return load("native")
    except KernelError as error:
        return error


def load(isa: str) -> ctypes.CDLL:
    """Load the library for one of :data:`ISA_FLAGS`, building it unless it is in the cache.

    Raises:
        KernelError: there is no compiler, it fails, or the library cannot be loaded.
    """
    command = [*compiler(), *FLAGS, *isa_flags(compiler(), isa)]
    path = cache_directory() / f"quantkit-{isa}-{library_key(command)}.so"
    find_or_make(path, lambda: _compile(command, path))
    return _open(path)


def isa_flags(command: list[str], isa: str) -> tuple[str, ...]:
    """Return the compiler flags for one of :data:`ISA_FLAGS`.

    Older compilers on a Mac do not know ``-mcpu=native``; they get the flags of the M1, whose instructions all later chips
    have.
    """
    flags = ISA_FLAGS[isa]
    if flags == ("-mcpu=native",) and platform.system() == "Darwin":
        tried = [*command, *flags, "-x", "c++", "-E", os.devnull]
        if subprocess.run(tried, capture_output=True, timeout=60, check=False).returncode:
            return ("-mcpu=apple-m1",)
    return flags


def find_or_make(path: Path, make: Callable[[], None]) -> None:
    """Call ``make`` unless there is an undamaged library at ``path``."""
    if path.exists() and (reason := damage(path)):
        logger.warning("kernel library %s is damaged (%s); building it again", path, reason)
        path.unlink(missing_ok=True)
    if not path.exists():
        make()


def compiler() -> list[str]:
    """Return the command line of the compiler: ``$CXX``, or the first of g++, c++ and clang++ on the PATH.

    Raises:
        KernelError: there is none.
    """
    named = shlex.split(os.environ.get("CXX", ""))
    found = [path for name in (named[:1] or ["g++", "c++", "clang++"]) if (path := shutil.which(name))]
    if not found:
        raise KernelError(f"no C++ compiler: {f'CXX={named[0]}' if named else 'g++, c++, clang++'} not found; {_WAY_OUT}")
    return [found[0], *named[1:]]


@functools.cache
def cache_directory() -> Path:
    """Return the directory of the cached libraries, which is created if it does not exist.

    If it is not writable, or others could write to it, this is a temporary directory of the process instead, with a warning.
    """
    try:
        directory = private_directory("kernels")
        with tempfile.TemporaryFile(dir=directory):
            return directory
    except OSError as error:
        temporary = Path(tempfile.mkdtemp(prefix="quantkit-kernels-"))
        atexit.register(shutil.rmtree, temporary, ignore_errors=True)
        warn_once(
            f"cannot use the kernel cache ({error}): compiling into {temporary} for this process only; "
            "set XDG_CACHE_HOME to a writable directory of your own"
        )
        return temporary


@functools.cache
def warn_once(message: str) -> None:
    """Log ``message`` as a warning, once per process."""
    logger.warning("%s", message)


def details() -> dict[str, str]:
    """Return compiler, cache, instruction set and threads, or an error, for ``quantkit doctor``."""
    facts = {"cache": str(cache_directory())}
    try:
        command = compiler()
        facts |= {"compiler": shlex.join(command), "compiler_version": _version(tuple(command)).partition("\n")[0]}
        facts["isa"] = library().qk_isa().decode()
        facts["threads"] = (
            f"{torch.get_num_threads()}, {'in the OpenMP team of torch' if _openmp() else 'started by the library'}"
        )
    except KernelError as error:
        facts["error"] = str(error)
    return facts


def sources() -> list[Path]:
    """Return every file of ``csrc``, sorted by name."""
    return sorted(path for path in (Path(__file__).parent / "csrc").iterdir() if path.suffix in (".cpp", ".h"))


def library_key(command: list[str]) -> str:
    """Return a hash of everything that determines the library which ``command`` compiles."""
    return digest(sources(), "sealed with its name", shlex.join(command), _version(tuple(command)), _cpu())


def digest(files: list[Path], *facts: str) -> str:
    """Return a hash of the names and contents of ``files`` and of ``facts``, as 24 hexadecimal digits."""
    whole = hashlib.sha256()
    for part in (*(path.name.encode() + b"\0" + path.read_bytes() for path in files), *(fact.encode() for fact in facts)):
        whole.update(hashlib.sha256(part).digest())
    return whole.hexdigest()[:24]


def version(compiler_path: str) -> str:
    """Return the output of a compiler's ``--version``."""
    return _version((compiler_path,))


@functools.cache
def _version(command: tuple[str, ...]) -> str:
    try:
        done = subprocess.run([command[0], "--version"], capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise KernelError(f"the C++ compiler {command[0]} does not run ({error}); {_WAY_OUT}") from error
    return done.stdout


@functools.cache
def _cpu() -> str:
    """Return the model and the feature flags of the CPU, on which ``-march=native`` depends."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    wanted = ("vendor_id", "cpu family", "model", "flags", "Features", "CPU part")
    return platform.machine() + "".join(sorted({line for line in lines if line.partition("\t")[0].strip(": ") in wanted}))


def _compile(command: list[str], path: Path) -> None:
    logger.info("compiling the CPU kernels into %s (a few seconds, once)", path)
    compile_and_link(command, [source for source in sources() if source.suffix == ".cpp"], path, _WAY_OUT)


def compile_and_link(
    command: list[str], files: list[Path], path: Path, way_out: str, objects_only: tuple[str, ...] = ()
) -> list[str]:
    """Compile ``files`` in parallel, link them into the library ``path`` and append its checksum.

    Args:
        command: compiler and flags.
        files: source files.
        path: path of the library.
        way_out: advice for error messages.
        objects_only: flags for compiling that are left out for linking.

    Returns:
        The output of the compiler for each file.

    Raises:
        KernelError: the compiler failed; the message has its output.
    """
    try:
        with atomic_path(path) as temporary, tempfile.TemporaryDirectory(prefix="quantkit-build-") as folder:
            objects = [str(Path(folder) / f"{source.stem}.o") for source in files]
            lines = [
                [*command, *objects_only, "-c", str(source), "-o", made] for source, made in zip(files, objects, strict=True)
            ]
            with ThreadPoolExecutor(usable_cores()) as pool:  # compilers are processes; the threads only wait
                outputs = list(pool.map(lambda line: _run(line, way_out), lines))
            _run([*command, "-shared", *objects, "-o", str(temporary)], way_out)
            content = temporary.read_bytes()
            temporary.write_bytes(content + _seal(path, content))
            return outputs
    except (OSError, subprocess.TimeoutExpired) as error:
        raise KernelError(f"the kernels could not be compiled into {path} ({error}); {way_out}") from error


def _run(line: list[str], way_out: str) -> str:
    done = subprocess.run(line, capture_output=True, text=True, timeout=600, check=False)
    if done.returncode:
        output = (done.stderr.strip() or done.stdout.strip())[-4000:]
        raise KernelError(f"the compiler failed ({done.returncode}): {shlex.join(line)}\n{output}\n{way_out}")
    return done.stderr + done.stdout


def damage(path: Path) -> str | None:
    """Return what is wrong with the file of a library; None if only this user can have written it and its checksum is right."""
    if reason := shared(path):
        return reason
    content = path.read_bytes()
    return None if _seal(path, content[:-32]) == content[-32:] else "its checksum differs"


def _seal(path: Path, content: bytes) -> bytes:
    """Return the SHA-256 of a library under its name, which says what it was made from."""
    return hashlib.sha256(path.name.encode() + b"\0" + content).digest()


def _open(path: Path) -> ctypes.CDLL:
    lib = open_library(path, _SIGNATURES, ABI_VERSION)
    lib.qk_use_openmp(*(_openmp() or (None, None, None)))
    _shorten_waits()
    if (cores := fewer_threads(os.environ, torch.get_num_threads())) is not None:
        logger.info("%d threads instead of %d: the quota of this process's control group", cores, torch.get_num_threads())
        torch.set_num_threads(cores)
    return lib


def open_library(path: Path, signatures: dict[str, tuple[Any, list[Any]]], version: int) -> ctypes.CDLL:
    """Load a library and declare its functions.

    Args:
        path: path of the library.
        signatures: function name to result type and argument types.
        version: what its function ``qk_abi_version`` must return.

    Raises:
        KernelError: the library cannot be loaded, lacks a function, or has another version.
    """
    try:
        lib = ctypes.CDLL(str(path))
        for name, (result, arguments) in signatures.items():
            function = getattr(lib, name)
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError) as error:
        raise KernelError(f"the kernel library {path} cannot be loaded ({error}); remove it to have it built again") from error
    if (found := lib.qk_abi_version()) != version:
        raise KernelError(f"the kernel library {path} has interface {found}, want {version}; remove it to have it built again")
    return lib


def _openmp() -> tuple[int | None, ...] | None:
    """Return the entry points of the OpenMP runtime in this process, which torch loads, or None if there is none."""
    process = ctypes.CDLL(None)
    try:
        entries = (process.GOMP_parallel, process.omp_get_num_threads, process.omp_get_thread_num)
    except AttributeError:
        return None
    return tuple(ctypes.cast(entry, ctypes.c_void_p).value for entry in entries)


@functools.cache
def _shorten_waits() -> None:
    """Let the threads of a GNU OpenMP runtime that was loaded before quantkit sleep soon while they wait.

    See :mod:`quantkit.system.cores`. The runtime no longer reads the environment then, but it also lets threads sleep soon if
    it has more of them than there are cores (its manual, on GOMP_SPINCOUNT). So it gets a second team, which does nothing.
    """
    process = ctypes.CDLL(None)
    if waits_are_chosen(os.environ) or _openmp() is None or hasattr(process, "__kmpc_fork_call"):  # the last one is LLVM's
        return

    def idle() -> None:
        process.GOMP_parallel(process.omp_get_num_threads, None, 2, 0)  # any function will do
        threading.Event().wait()

    threading.Thread(target=idle, name="quantkit-second-team", daemon=True).start()


def compiled(what: str) -> bool:
    """Return whether the compiled library can be loaded; if not, log once that ``what`` is slow, and why."""
    try:
        build.library()
    except KernelError as error:
        build.warn_once(f"{what}: computed in plain torch, many times slower, because: {error}")
        return False
    return True
