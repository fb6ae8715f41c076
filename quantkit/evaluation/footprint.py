"""What a model weighs: bytes of its tensors, bits per weight, bytes on the disk, peak memory of the process.

Two numbers are called "bits per weight" and both are given: over the quantized weights alone (codes, scales, zero points,
row padding: what papers quote) and over every parameter of the model (what the disk shows; an embedding left in 16 bits
weighs a lot in a small model).
"""

import contextlib
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from quantkit.nn.linear import QuantModule


@dataclass(frozen=True, slots=True)
class Footprint:
    """Sizes of a model.

    Attributes:
        parameters: weights, counted once where tied; a quantized weight counts as the number of weights it stands for.
        stored_bytes: bytes of the weights as a checkpoint holds them, tied ones once.
        tensor_bytes: parameters and buffers in memory, counted once where shared, and quantized weights as a checkpoint holds
            them.
        bits_per_weight: stored bits of the quantized weights, or of all parameters of a model without any.
        model_bits_per_weight: stored bits of all parameters, over all parameters.
        quantized_share: share of the parameters that are quantized.
        disk_bytes: bytes of the directory it is in, tokenizer and all; None if none was named.
    """

    parameters: int
    stored_bytes: int
    tensor_bytes: int
    bits_per_weight: float
    model_bits_per_weight: float
    quantized_share: float
    disk_bytes: int | None = None


def footprint(model: nn.Module, path: str | Path | None = None) -> Footprint:
    """Measure ``model``; ``path`` is the directory or file it came from, if any."""
    quantized = [m for m in model.modules() if isinstance(m, QuantModule) and m.tied_to is None]
    weights = sum(module.numel for module in quantized)
    stored = sum(module.nbytes for module in quantized)
    plain = list({id(p): p for p in model.parameters()}.values())  # tied parameters are one object
    total = weights + sum(p.numel() for p in plain)
    total_bytes = stored + sum(p.nbytes for p in plain)
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in (*model.parameters(), *model.buffers())}
    model_bits = total_bytes * 8 / max(total, 1)
    return Footprint(
        parameters=total,
        stored_bytes=total_bytes,
        tensor_bytes=stored + sum(storages.values()),
        bits_per_weight=stored * 8 / weights if weights else model_bits,
        model_bits_per_weight=model_bits,
        quantized_share=weights / max(total, 1),
        disk_bytes=None if path is None else disk_bytes(path),
    )


def disk_bytes(path: str | Path) -> int | None:
    """Return the bytes of a file, or of all files of a directory; None if there is no such path (a hub id)."""
    path = Path(path)
    if path.is_file():
        return path.stat().st_size
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) if path.is_dir() else None


def reset_peak_memory(device: torch.device) -> None:
    """Start a new peak where the system can (Linux, CUDA); elsewhere the peak is that of the process's whole life."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory_bytes(device: torch.device) -> int:
    """Return the peak since :func:`reset_peak_memory`: of the GPU's allocator, or of the process's resident memory.

    Resident memory counts everything the process holds, other models included.
    """
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)
