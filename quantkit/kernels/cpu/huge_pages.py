"""Memory for weights, keys and values in large anonymous mappings with huge pages.

A decode step reads every weight once. With pages of 4 KB, that takes a quarter of a million address translations per gigabyte;
with pages of 2 MB, which Linux provides on request (``madvise(MADV_HUGEPAGE)``), it takes five hundred. If the request is
refused, or on other systems, this is ordinary memory. A mapping is released together with the last tensor in it.
"""

import contextlib
import mmap
from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

ALIGNMENT: Final = 64
"""Alignment of tensors in bytes: a cache line, and the widest vector register."""

HUGE_PAGE: Final = 2 << 20
CHUNK_BYTES: Final = 64 << 20


def allocate(nbytes: int) -> Tensor:
    """Return ``nbytes`` zero bytes (uint8) that start at a huge page; memory is used only once it is written to."""
    if not nbytes:
        return torch.empty(0, dtype=torch.uint8)
    private = (
        {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
    )  # shared mappings get no huge pages
    memory = mmap.mmap(-1, nbytes + HUGE_PAGE, **private)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a system without huge pages
            memory.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    start = -whole.data_ptr() % HUGE_PAGE
    return whole[start : start + nbytes]


def padded(nbytes: int, alignment: int = ALIGNMENT) -> int:
    """Return ``nbytes`` rounded up to a multiple of ``alignment``."""
    return -(-nbytes // alignment) * alignment


class Arena:
    """Allocate tensors next to each other, in mappings of at least :data:`CHUNK_BYTES`."""

    def __init__(self) -> None:
        self._chunk = torch.empty(0, dtype=torch.uint8)
        self._used = 0

    def copy(self, tensor: Tensor) -> Tensor:
        """Return a contiguous copy of ``tensor``."""
        return self.empty(tensor.shape, tensor.dtype).copy_(tensor)

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return an uninitialized tensor."""
        nbytes = torch.Size(shape).numel() * dtype.itemsize
        if self._used + nbytes > len(self._chunk):
            self._chunk, self._used = allocate(max(CHUNK_BYTES, padded(nbytes))), 0
        start, self._used = self._used, self._used + padded(nbytes)
        return self._chunk[start : start + nbytes].view(dtype).view(shape)


def in_huge_pages(tensor: Tensor) -> Tensor:
    """Return a copy of a large tensor in a mapping of its own; a small tensor is returned unchanged."""
    return tensor if tensor.nbytes < HUGE_PAGE else allocate(tensor.nbytes).view(tensor.dtype).view(tensor.shape).copy_(tensor)
