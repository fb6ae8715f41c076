"""Return memory to the system during a long run, to limit the resident set size (RSS) of the process.

Two kinds of unused memory stay in the RSS: heap that was freed in small pieces, and pages of a mapped checkpoint. Weights
loaded from safetensors are such pages: they are read from the file at the first access and then stay in memory, although they
could be read again. These functions are for Linux; on other systems they have no effect.
"""

import contextlib
import ctypes
import mmap
import os
from bisect import bisect_right
from collections.abc import Iterable
from pathlib import Path
from typing import ClassVar

import numpy as np
from torch import Tensor

PAGE_BYTES = mmap.PAGESIZE
_FILE_BIT = 61  # of a pagemap entry: the page belongs to the file or is shared; bit 63: it is in memory


def resident_bytes() -> int:
    """Return the resident set size (RSS) of this process in bytes, or 0 if the system does not report it."""
    with contextlib.suppress(OSError):
        return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE_BYTES
    return 0


def available_bytes(meminfo: str = "/proc/meminfo") -> int | None:
    """Return the memory in bytes that can still be allocated, including caches that can be dropped; None if unknown."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path(meminfo).read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_AVPHYS_PAGES") * PAGE_BYTES if "SC_AVPHYS_PAGES" in getattr(os, "sysconf_names", {}) else None


def return_freed_memory() -> None:
    """Return freed heap to the system. Blocks free hundreds of megabytes in pieces, which fragment glibc's heap."""
    with contextlib.suppress(AttributeError, OSError):  # only glibc has malloc_trim
        ctypes.CDLL(None).malloc_trim(0)


class HeapWatch:
    """Return freed heap to the system whenever the process has grown by ``step_bytes``.

    In glibc before 2.38, an aligned allocation searches for more memory than it needs, so the gap that a freed tensor leaves is
    not reused for a tensor of the same size. A loop that keeps every other tensor then uses twice the memory that it needs.
    """

    def __init__(self, step_bytes: int = 128 << 20) -> None:
        self._step, self._last = step_bytes, resident_bytes()

    def check(self) -> None:
        """Check the size of the process, and return freed heap if it has grown enough."""
        now = resident_bytes()
        if now > self._last + self._step:
            return_freed_memory()
            now = resident_bytes()
            self._last = now
        self._last = min(self._last, now)


def mapped_pages(tensors: Iterable[Tensor]) -> list[tuple[int, int]]:
    """Return the page-aligned address ranges (start, end) of the tensors that are mapped from a file.

    The result has addresses rather than tensors, so it does not keep weights alive.
    """
    regions = _file_regions()
    starts = [start for start, _ in regions]
    pages = []
    for tensor in tensors:
        if tensor.device.type != "cpu" or not tensor.numel() or not tensor.is_contiguous():
            continue
        begin, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
        for start, stop in regions[max(0, bisect_right(starts, begin) - 1) : bisect_right(starts, end - 1)]:
            first, last = -(-max(begin, start) // PAGE_BYTES) * PAGE_BYTES, min(end, stop) // PAGE_BYTES * PAGE_BYTES
            if first < last:
                pages.append((first, last))
    return pages


def drop_pages(pages: Iterable[tuple[int, int]]) -> None:
    """Drop mapped pages from memory that equal the file; the next access reads them again.

    Pages that were written to are private copies and are kept. The ranges must not be written to during the call.
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


def drop_files(files: Iterable[Path]) -> None:
    """Drop from memory what this process has read of some mapped files, given by their resolved paths."""
    wanted = {str(file) for file in files}
    drop_pages((start, end) for start, end, path in _mappings() if path in wanted)


class PageRelease:
    """Drop the pages of mapped tensors as they are done with, in lots: asking costs as much as reading a megabyte."""

    LOT_BYTES: ClassVar[int] = 16 << 20

    def __init__(self) -> None:
        self._done: list[Tensor] = []
        self._bytes = 0

    def add(self, *tensors: Tensor) -> None:
        """Let go of tensors; who still uses one that is mapped reads the file again."""
        self._done += tensors
        self._bytes += sum(tensor.nbytes for tensor in tensors)
        if self._bytes >= self.LOT_BYTES:
            self.flush()

    def flush(self) -> None:
        """Drop the pages of everything that was added."""
        drop_pages(mapped_pages(self._done))
        self._done, self._bytes = [], 0


def _file_regions() -> list[tuple[int, int]]:
    """Return (start, end) of the file mappings of this process in ascending order; an empty list without /proc."""
    return [(start, end) for start, end, _ in _mappings()]


def _mappings() -> list[tuple[int, int, str]]:
    """Return (start, end, path) of the file mappings of this process in ascending order; an empty list without /proc."""
    regions = []
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/maps").read_text().splitlines():
            addresses, _, _, _, inode, *path = line.split(maxsplit=5)
            if inode != "0":
                start, end = addresses.split("-")
                regions.append((int(start, 16), int(end, 16), path[0] if path else ""))
    return regions
