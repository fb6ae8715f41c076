"""Tensors that lie on the disk because they do not fit memory, in files without a name.

A file without a name takes space only as long as somebody has it open or mapped: whatever way the process ends, nothing stays.
A tensor in such a file is used like any other; the system reads and writes its pages. Their place in the memory of the process
is given back by :meth:`Scratch.check`, time and again.
"""

import mmap
import os
import tempfile
import weakref
from pathlib import Path

import torch
from torch import Tensor

from quantkit.system.files import clear_errors
from quantkit.system.memory import drop_pages, mapped_pages, resident_bytes


class Scratch:
    """Where large tensors lie: in memory if ``folder`` is None, else on the disk.

    Args:
        folder: an existing directory on a disk with enough space.
    """

    LEAST_BYTES = 1 << 20
    STEP_BYTES = 128 << 20

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        self._alive: dict[int, weakref.ref[Tensor]] = {}
        self._last = resident_bytes()

    def keep(self, tensor: Tensor) -> Tensor:
        """Return a tensor of the same content: itself, or a copy on the disk of what is large and in the CPU's memory.

        Raises:
            DiskError: the disk is full or refuses.
        """
        if self.folder is None or tensor.device.type != "cpu" or tensor.nbytes < max(self.LEAST_BYTES, 1):
            return tensor
        with (
            clear_errors(f"write {tensor.nbytes:,} bytes to {self.folder}"),
            tempfile.TemporaryFile(dir=self.folder, prefix=".quantkit-") as file,
        ):
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, tensor.nbytes)  # a full disk shall be an error, not a signal
            else:
                file.truncate(tensor.nbytes)
            place = mmap.mmap(file.fileno(), tensor.nbytes)
        found = torch.frombuffer(place, dtype=tensor.dtype).view(tensor.shape)
        found.copy_(tensor)
        drop_pages(mapped_pages([found]))
        self._alive[id(found)] = weakref.ref(found)
        return found

    def move(self, tensor: Tensor) -> None:
        """Let a tensor lie where :meth:`keep` would put it; it stays the same object."""
        if self.folder is None or self._is_here(tensor):
            return
        kept = self.keep(tensor)
        if kept is not tensor:
            tensor.data = kept
            self._alive[id(tensor)] = weakref.ref(tensor)

    def _is_here(self, tensor: Tensor) -> bool:
        ref = self._alive.get(id(tensor))
        return ref is not None and ref() is tensor

    def check(self) -> None:
        """Give back the memory of tensors on the disk, if the process has grown by more than :data:`STEP_BYTES`."""
        if self.folder is None:
            return
        now = resident_bytes()
        if now > self._last + self.STEP_BYTES:
            self._alive = {key: ref for key, ref in self._alive.items() if ref() is not None}
            drop_pages(mapped_pages(found for ref in self._alive.values() if (found := ref()) is not None))
            now = self._last = resident_bytes()
        self._last = min(self._last, now)


MEMORY = Scratch()
"""Everything in memory."""
