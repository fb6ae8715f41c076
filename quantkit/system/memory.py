"""Giving memory back to the system in the middle of a long run, where resident memory is what a user runs out of.

Two kinds linger although nobody needs them: heap that was freed in pieces, and pages of a mapped checkpoint. Weights loaded
from safetensors are such pages: read from the file at the first touch and resident ever after, although the file could
give them again. All of this is Linux's; where the system has no such call, nothing happens.
"""

import contextlib
import ctypes
import mmap
import os
from bisect import bisect_right
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from torch import Tensor

PAGE_BYTES = mmap.PAGESIZE
_FILE_BIT = 61  # of a pagemap entry: the page is the file's own (or shared); bit 63: it is present


def resident_bytes() -> int:
    """Return the memory of this process that is resident now; 0 where the system does not say."""
    with contextlib.suppress(OSError):
        return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE_BYTES
    return 0


def available_bytes(meminfo: str = "/proc/meminfo") -> int | None:
    """Return the memory that programs can still have, caches that would make room included; None where no one says."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path(meminfo).read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_AVPHYS_PAGES") * PAGE_BYTES if "SC_AVPHYS_PAGES" in getattr(os, "sysconf_names", {}) else None


def return_freed_memory() -> None:
    """Give freed heap back: a block frees hundreds of megabytes in pieces that fragment glibc's heap."""
    with contextlib.suppress(AttributeError, OSError):  # only glibc has malloc_trim
        ctypes.CDLL(None).malloc_trim(0)


class HeapWatch:
    """Give freed heap back whenever the process has grown by ``step_bytes``.

    Holes that tensors leave in glibc's heap are not reused by tensors of the same size (before 2.38 an aligned allocation
    looks for more than it needs), so a loop that keeps one of every two tensors it makes holds twice what it keeps.
    """

    def __init__(self, step_bytes: int = 128 << 20) -> None:
        self._step, self._last = step_bytes, resident_bytes()

    def check(self) -> None:
        """Look, and trim if it is time."""
        now = resident_bytes()
        if now > self._last + self._step:
            return_freed_memory()
            now = resident_bytes()
            self._last = now
        self._last = min(self._last, now)


def mapped_pages(tensors: Iterable[Tensor]) -> list[tuple[int, int]]:
    """Return the page-aligned address ranges (start, end) of those tensors that are mapped from a file.

    Addresses rather than tensors, so that noting them keeps no weight alive.
    """
    regions = _file_regions()
    starts = [start for start, _ in regions]
    pages = []
    for tensor in tensors:
        if tensor.device.type != "cpu" or not tensor.numel() or not tensor.is_contiguous():
            continue
        region = bisect_right(starts, tensor.data_ptr()) - 1
        if region >= 0:
            end = min(tensor.data_ptr() + tensor.nbytes, regions[region][1])
            first, last = -(-tensor.data_ptr() // PAGE_BYTES) * PAGE_BYTES, end // PAGE_BYTES * PAGE_BYTES
            if first < last:
                pages.append((first, last))
    return pages


def drop_pages(pages: Iterable[tuple[int, int]]) -> None:
    """Let go of mapped pages that are as they are in the file; who touches them next reads them again.

    Pages that were written to are this process's own copies and stay. Nobody may write to the ranges meanwhile.
    """
    with contextlib.suppress(AttributeError, OSError), open("/proc/self/pagemap", "rb") as pagemap:
        advise = ctypes.CDLL(None).madvise
        for first, last in pages:
            pagemap.seek(first // PAGE_BYTES * 8)
            entries = np.frombuffer(pagemap.read((last - first) // PAGE_BYTES * 8), np.uint64)
            unchanged = np.concatenate([[False], (entries >> np.uint64(_FILE_BIT)) & np.uint64(5) == 5, [False]])
            edges = np.flatnonzero(unchanged[1:] != unchanged[:-1]) * PAGE_BYTES + first
            for start, end in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True):
                advise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), mmap.MADV_DONTNEED)


def _file_regions() -> list[tuple[int, int]]:
    """Return (start, end) of this process's mappings of files, ascending; nothing where there is no /proc."""
    regions = []
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/maps").read_text().splitlines():
            addresses, _, _, _, inode, *_ = line.split(maxsplit=5)
            if inode != "0":
                start, end = addresses.split("-")
                regions.append((int(start, 16), int(end, 16)))
    return regions
