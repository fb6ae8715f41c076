"""Parts of files as one tensor, mapped one behind the other: nothing is read before somebody looks, and nothing is copied.

Memory is mapped by pages, so a part can lie at an address only if that has the same place in its page as the part has in its
page of the file. Where all parts are whole pages long, that is so for all of one file, or for none; others are copied to a
nameless file first. A page in which one part ends and the next begins is a private copy.
"""

import ctypes
import functools
import mmap
import os
import tempfile
import weakref
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import IO, NamedTuple

import torch
from torch import Tensor

from quantkit.system.files import clear_errors
from quantkit.system.memory import PAGE_BYTES

_FAILED = ctypes.c_void_p(-1).value
_SHARE_OF_MAPPINGS = 0.75
"""Of the mappings that a process may have; allocating memory takes some, too."""


class Piece(NamedTuple):
    """Bytes of a file: its path, where they begin, and how many there are."""

    path: Path
    begin: int
    nbytes: int


def place_in_page(pieces: Sequence[Piece]) -> int:
    """Return where in its page a tensor of such pieces had better begin: as most of them do, all whole pages long."""
    return Counter(piece.begin % PAGE_BYTES for piece in pieces).most_common(1)[0][0]


def copied_bytes(pieces: Sequence[Piece]) -> int:
    """Return the bytes of the pieces, all whole pages long, that have to be copied."""
    place = place_in_page(pieces)
    return sum(piece.nbytes for piece in pieces if piece.begin % PAGE_BYTES != place)


def join(pieces: Sequence[Piece], dtype: torch.dtype, shape: Sequence[int], folder: Path | None) -> Tensor | None:
    """Return the pieces, in order, as one tensor; None if that is not possible here.

    Args:
        pieces: all whole pages long; together as long as the tensor.
        dtype: of the tensor, with ``shape``.
        folder: where pieces are copied that do not fit; None for nowhere, so that they must fit.

    Writing to the tensor leaves the files alone. It keeps what it maps, whatever becomes of the names of the files.

    Raises:
        DiskError: a file is gone, or the disk of ``folder`` is full.
    """
    if (
        not _has_room(len(pieces))
        or (folder is None and copied_bytes(pieces))
        or any(one.nbytes % PAGE_BYTES for one in pieces)
    ):
        return None
    place, total = place_in_page(pieces), sum(piece.nbytes for piece in pieces)
    reserved = _map(None, _whole_pages(place + total), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
    if reserved is None:
        return None
    start = reserved + place
    memory = (ctypes.c_char * total).from_address(start)
    weakref.finalize(memory, _unmap, reserved, _whole_pages(place + total))
    at = start
    for piece in pieces:
        with clear_errors(f"map {piece.path}"), piece.path.open("rb") as source:
            if os.fstat(source.fileno()).st_size < piece.begin + piece.nbytes:  # reading beyond it would be a signal
                raise OSError(f"{piece.path} ends before byte {piece.begin + piece.nbytes}")
            fits = piece.begin % PAGE_BYTES == place
            with source if fits else _copied(piece, source.fileno(), place, folder) as file:
                head = ctypes.string_at(at - place, place) if at > start else b""  # the end of the piece before
                begin = piece.begin - place if fits else 0
                if _map(at - place, _whole_pages(place + piece.nbytes), _OVER, file.fileno(), begin) is None:
                    return None
                ctypes.memmove(at - place, head, len(head))
        at += piece.nbytes
    return torch.frombuffer(memory, dtype=dtype).view(*shape)


_OVER = mmap.MAP_PRIVATE | 0x10  # MAP_FIXED, which Python has no name for


def _copied(piece: Piece, source: int, place: int, folder: Path | None) -> IO[bytes]:
    """Return a nameless file that holds a piece at ``place`` of its first page."""
    file = tempfile.TemporaryFile(dir=folder, prefix=".quantkit-")  # noqa: SIM115  # the caller closes it
    os.posix_fallocate(file.fileno(), 0, _whole_pages(place + piece.nbytes))  # a full disk shall be an error, not a signal
    os.pwrite(file.fileno(), os.pread(source, piece.nbytes, piece.begin), place)
    return file


def _whole_pages(nbytes: int) -> int:
    return -(-nbytes // PAGE_BYTES) * PAGE_BYTES


def _has_room(count: int) -> bool:
    """Say whether this process may have so many mappings more. False on systems that do not tell."""
    try:
        most = int(Path("/proc/sys/vm/max_map_count").read_text())
        with open("/proc/self/maps", "rb") as maps:
            return sum(1 for _ in maps) + count < _SHARE_OF_MAPPINGS * most
    except (OSError, ValueError):
        return False


@functools.cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype, libc.munmap.restype = ctypes.c_void_p, ctypes.c_int
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    return libc


def _map(at: int | None, nbytes: int, flags: int, file: int, begin: int) -> int | None:
    found: int | None = _libc().mmap(at, nbytes, mmap.PROT_READ | mmap.PROT_WRITE, flags, file, begin)
    return None if found == _FAILED else found


def _unmap(at: int, nbytes: int) -> None:
    _libc().munmap(at, nbytes)
