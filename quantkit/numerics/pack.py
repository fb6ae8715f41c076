"""Codes to bits and back: a dense little-endian bit stream per row.

Element ``i`` of a row occupies bits ``i*bits .. (i+1)*bits`` of the row's stream, least significant bit first, crossing
32-bit word boundaries where ``bits`` does not divide 32; each row is padded with zero bits to a whole word. For every
width this is the layout that compressed-tensors >= 0.18 calls ``pack-quantized``. Hosts are assumed little-endian.
"""

import math

import torch
from torch import Tensor

from quantkit.errors import SpecError


def packed_words(columns: int, bits: int) -> int:
    """Return how many 32-bit words a row of ``columns`` codes takes."""
    return -(-columns * bits // 32)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack unsigned codes of ``bits`` bits.

    Args:
        codes: uint8 (..., n), each below ``2**bits``.
        bits: 1 to 8.

    Returns:
        int32 (..., ceil(n * bits / 32)).

    Raises:
        SpecError: if ``bits`` is out of range or ``codes`` is not uint8.
    """
    if not 1 <= bits <= 8 or codes.dtype != torch.uint8:
        raise SpecError(f"pack: bits={bits}, dtype={codes.dtype}; want 1 to 8 bits and uint8 codes")
    words = packed_words(codes.shape[-1], bits)
    # `period` codes fill a whole number of bytes: 8 codes make `bits` bytes, fewer when bits and 8 share a factor.
    period = 8 // math.gcd(8, bits)
    span = period * bits // 8
    groups = -(-words * 4 // span)
    padded = torch.nn.functional.pad(codes, (0, groups * period - codes.shape[-1]))
    grouped = padded.unflatten(-1, (groups, period))  # (..., groups, period)
    stream = grouped.new_zeros((*grouped.shape[:-1], span))  # (..., groups, span) bytes
    for i in range(period):
        byte, shift = divmod(i * bits, 8)
        stream[..., byte] |= grouped[..., i] << shift
        if shift + bits > 8:
            stream[..., byte + 1] |= grouped[..., i] >> (8 - shift)
    # clone, not contiguous: a single row counts as contiguous whatever its stride, and view refuses an odd one
    packed: Tensor = stream.flatten(-2)[..., : words * 4].clone(memory_format=torch.contiguous_format).view(torch.int32)
    return packed


def unpack(packed: Tensor, bits: int, columns: int) -> Tensor:
    """Reverse :func:`pack`.

    Args:
        packed: int32 (..., words).
        bits: 1 to 8.
        columns: codes per row.

    Returns:
        uint8 (..., columns).

    Raises:
        SpecError: if the number of words is not what ``columns`` codes of ``bits`` bits take.
    """
    if not 1 <= bits <= 8 or packed.dtype != torch.int32:
        raise SpecError(f"unpack: bits={bits}, dtype={packed.dtype}; want 1 to 8 bits and int32 words")
    if packed.shape[-1] != packed_words(columns, bits):
        raise SpecError(
            f"unpack: {packed.shape[-1]} words per row, but {columns} codes of {bits} bits take {packed_words(columns, bits)}"
        )
    period = 8 // math.gcd(8, bits)
    span = period * bits // 8
    groups = -(-columns // period)
    stream = as_bytes(packed).view(*packed.shape[:-1], 4 * packed.shape[-1])
    stream = torch.nn.functional.pad(stream, (0, max(0, groups * span - stream.shape[-1])))[..., : groups * span]
    stream = stream.unflatten(-1, (groups, span))
    codes = stream.new_empty((*stream.shape[:-1], period))
    mask = (1 << bits) - 1
    for i in range(period):
        byte, shift = divmod(i * bits, 8)
        value = stream[..., byte] >> shift
        if shift + bits > 8:
            value = value | (stream[..., byte + 1] << (8 - shift))
        codes[..., i] = value & mask
    flat: Tensor = codes.flatten(-2)[..., :columns].contiguous()
    return flat


def as_bytes(tensor: Tensor) -> Tensor:
    """Return the bytes of ``tensor``, uint8 (nbytes,), sharing its memory where that is contiguous."""
    flat = tensor.detach().contiguous().reshape(-1)
    return flat.as_strided(flat.shape, (1,)).view(torch.uint8)  # a single number may have any stride, which view refuses
