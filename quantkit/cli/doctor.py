"""What this machine can do for quantkit, and why it cannot do the rest: versions, processor, compilers, caches, kernels."""

import importlib.metadata
import os
import platform
from typing import Any

import torch

from quantkit import kernels
from quantkit.checkpoint import prepacked
from quantkit.checkpoint.activations import SHARE
from quantkit.engine.drafters import DRAFTERS
from quantkit.errors import KernelError
from quantkit.kernels import build
from quantkit.kernels.cuda import nvcc
from quantkit.system.cores import usable_cores
from quantkit.system.files import cache_dir
from quantkit.version import __version__

PACKAGES = ("torch", "transformers", "safetensors", "compressed-tensors", "gguf", "datasets", "numpy")


def examine() -> dict[str, Any]:
    """Return a JSON-able description of the machine; ``kernels`` is :func:`quantkit.kernels.report` (which may compile)."""
    return {
        "quantkit": __version__,
        "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "packages": {name: _version(name) for name in PACKAGES},
        "processor": f"{usable_cores()} of {os.cpu_count()} cores usable, {torch.get_num_threads()} threads, {_capability()}",
        "cuda": _cuda(),
        "nvcc": _nvcc(),
        "cache": str(cache_dir()),
        "prepacked": prepacked.describe(),
        "decoder": _decoder(),
        "int8 activations": _int8_activations(),
        "drafters": ", ".join(DRAFTERS.names()),
        "kernels": kernels.report(),
    }


def _decoder() -> str:
    try:
        build.library()
    except KernelError as error:
        return f"models run through their modules: {error}"
    return "native: a model that lowers to a program runs in one call per step"


def _int8_activations() -> str:
    try:
        build.library()
    except KernelError:
        return "never here: they need the compiled kernels"
    return (
        f"where a checkpoint records that they add less than {SHARE:.0%} to its KL (quantkit inspect says), or --compute int8"
    )


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _capability() -> str:
    return f"torch was built for {torch.backends.cpu.get_cpu_capability()}"


def _cuda() -> str:
    if torch.version.cuda is None:
        return "this torch is built without CUDA"
    if not torch.cuda.is_available():
        return f"torch is built for CUDA {torch.version.cuda}, no device is visible"
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return f"CUDA {torch.version.cuda}: {', '.join(names)}"


def _nvcc() -> str:
    found = nvcc.details()
    if "error" in found:
        return found["error"]
    return f"{found['nvcc']} ({found['nvcc_version']}); CUDA libraries in the cache: {found['built']}"
