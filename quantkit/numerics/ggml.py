r"""Blocks of ggml: how a GGUF file holds codes, and scales of two levels.

A block is a run of 32 or 256 weights of one row. Its weights are

.. math:: w = s_j l - m_j, \qquad s_j = d\,c_j, \qquad m_j = d_{min}\,u_j

with the level :math:`l` of a code (the code itself where there are minimums, the code minus the middle one where there are not,
a table's value for IQ4), float16 numbers :math:`d, d_{min}` of the whole block, and small integers :math:`c_j, u_j` of its
sub-block j. Blocks of 32 have one sub-block and no such integers. All products are exact in float32, so there is one value and
no order of operations to agree on: :func:`values` equals what every reader of these files computes.

The layouts are facts of ggml's ``ggml-common.h`` and ``ggml-quants.c``; ``gguf.quants`` is the reader that the tests compare
with.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from quantkit.dtypes import DTYPES, table
from quantkit.spec import BLOCK_GRIDS


class Content(NamedTuple):
    """What blocks hold; leading dimensions (...) are blocks.

    Attributes:
        codes: uint8 (..., block), in the order of the weights.
        d: float16 (...,).
        scales: int16 (..., sub-blocks), or None: all one.
        low: float16 (...,), what minimums are multiples of, or None.
        minimums: int16 (..., sub-blocks), or None: all one.
    """

    codes: Tensor
    d: Tensor
    scales: Tensor | None = None
    low: Tensor | None = None
    minimums: Tensor | None = None


@dataclass(frozen=True, slots=True)
class BlockType:
    """One type of blocks.

    Attributes:
        name: as ggml calls it.
        number: in a GGUF file.
        dtype: of codes.
        size: weights of a block.
        group: weights of a sub-block.
        nbytes: of a block.
        scales: smallest and largest integer scale that are chosen; None where ``d`` is the scale.
        minimums: largest integer minimum; 1 where the block's is the only one, None where there are none.
        unpack: bytes (..., nbytes) to :class:`Content`.
        pack: the reverse.
    """

    name: str
    number: int
    dtype: str
    size: int
    group: int
    nbytes: int
    scales: tuple[int, int] | None
    minimums: int | None
    unpack: Callable[[Tensor], Content]
    pack: Callable[[Content], Tensor]

    @property
    def zero(self) -> int:
        """The code of level zero on integer grids without minimums."""
        return 0 if self.minimums is not None else 1 << (DTYPES[self.dtype].bits - 1)


def levels(codes: Tensor, kind: BlockType) -> Tensor:
    """Return the float32 level of every code."""
    if DTYPES[kind.dtype].values is not None:
        return table(kind.dtype)[0].to(codes.device)[codes.int()]
    return codes.float() - kind.zero


def steps(content: Content) -> tuple[Tensor, Tensor | None]:
    """Return float32 scales (..., sub-blocks) and minimums of that shape, or None."""
    scale = content.d.float().unsqueeze(-1)
    scale = scale if content.scales is None else scale * content.scales.float()
    if content.low is None:
        return scale, None
    low = content.low.float().unsqueeze(-1)
    return scale, low if content.minimums is None else low * content.minimums.float()


def values(data: Tensor, kind: BlockType) -> Tensor:
    """Return the float32 weights (..., weights) of blocks, uint8 (..., bytes)."""
    content = kind.unpack(data.unflatten(-1, (-1, kind.nbytes)))
    scale, minimum = steps(content)
    found = levels(content.codes, kind).unflatten(-1, (-1, kind.group)) * scale.unsqueeze(-1)
    if minimum is not None:
        found = found - minimum.unsqueeze(-1)
    flat: Tensor = found.flatten(-3)
    return flat


def _halves(data: Tensor) -> Tensor:
    return data.contiguous().view(torch.float16)


def _bytes(value: Tensor) -> Tensor:
    """Return float16 (...,) as uint8 (..., 2)."""
    return value.unsqueeze(-1).contiguous().view(torch.uint8)


def _nibbles(data: Tensor) -> Tensor:
    """Return the codes of uint8 (..., n): low halves first, then high halves (..., 2n)."""
    return torch.cat([data & 15, data >> 4], -1)


def _from_nibbles(codes: Tensor) -> Tensor:
    low, high = codes.chunk(2, -1)
    return low | (high << 4)


def _bits(data: Tensor) -> Tensor:
    """Return the bits of uint8 (..., n), lowest first, (..., 8n)."""
    shifts = torch.arange(8, dtype=torch.uint8, device=data.device)
    return (data.unsqueeze(-1) >> shifts & 1).flatten(-2)


def _from_bits(bits: Tensor) -> Tensor:
    shifts = torch.arange(8, dtype=torch.uint8, device=bits.device)
    packed: Tensor = (bits.unflatten(-1, (-1, 8)) << shifts).sum(-1, dtype=torch.uint8)
    return packed


def _planes(data: Tensor, width: int, count: int) -> Tensor:
    """Return fields of ``width`` bits of uint8 (..., n): field 0 of all bytes, then field 1, ... (..., count, n)."""
    mask = (1 << width) - 1
    return torch.stack([data >> (width * i) & mask for i in range(count)], -2)


def _from_planes(fields: Tensor, width: int) -> Tensor:
    """Reverse :func:`_planes`."""
    count = fields.shape[-2]
    shifts = torch.arange(0, width * count, width, dtype=torch.uint8, device=fields.device).unsqueeze(-1)
    return (fields << shifts).sum(-2, dtype=torch.uint8)


def _unpack_simple(high: bool, minimum: bool) -> Callable[[Tensor], Content]:
    """Blocks of 32 with 4-bit codes: d, [m], [4 bytes of fifth bits], 16 bytes. The files' m is added: -minimum."""

    def unpack(data: Tensor) -> Content:
        head = 4 if minimum else 2
        codes = _nibbles(data[..., -16:])
        if high:
            codes = codes | _bits(data[..., head : head + 4]) << 4
        low = -_halves(data[..., 2:4]).squeeze(-1) if minimum else None
        return Content(codes, _halves(data[..., :2]).squeeze(-1), None, low)

    return unpack


def _pack_simple(high: bool) -> Callable[[Content], Tensor]:
    def pack(content: Content) -> Tensor:
        parts = [_bytes(content.d)]
        parts += [] if content.low is None else [_bytes(-content.low)]
        parts += [_from_bits(content.codes >> 4)] if high else []
        return torch.cat([*parts, _from_nibbles(content.codes & 15)], -1)

    return pack


def _unpack_q8(data: Tensor) -> Content:
    return Content(data[..., 2:] ^ 128, _halves(data[..., :2]).squeeze(-1))


def _pack_q8(content: Content) -> Tensor:
    return torch.cat([_bytes(content.d), content.codes ^ 128], -1)


def _unpack_six_bits(data: Tensor) -> tuple[Tensor, Tensor]:
    """Return the 8 scales and 8 minimums that Q4_K and Q5_K keep in 12 bytes."""
    first, second, rest = data.split(4, -1)
    scales = torch.cat([first & 63, (rest & 15) | (first >> 6) << 4], -1)
    minimums = torch.cat([second & 63, (rest >> 4) | (second >> 6) << 4], -1)
    return scales.short(), minimums.short()


def _pack_six_bits(scales: Tensor, minimums: Tensor) -> Tensor:
    s, m = scales.to(torch.uint8), minimums.to(torch.uint8)
    first = s[..., :4] | (s[..., 4:] >> 4) << 6
    second = m[..., :4] | (m[..., 4:] >> 4) << 6
    return torch.cat([first, second, (s[..., 4:] & 15) | (m[..., 4:] & 15) << 4], -1)


def _unpack_k45(high: bool) -> Callable[[Tensor], Content]:
    """Q4_K, Q5_K: d, dmin, 12 bytes of scales, [32 bytes of fifth bits], 4 times 32 bytes: two sub-blocks each."""

    def unpack(data: Tensor) -> Content:
        scales, minimums = _unpack_six_bits(data[..., 4:16])
        codes = _planes(data[..., -128:].unflatten(-1, (4, 32)), 4, 2).flatten(-3)
        if high:
            codes = codes | _planes(data[..., 16:48], 1, 8).flatten(-2) << 4
        d, low = _halves(data[..., :4]).unbind(-1)
        return Content(codes, d, scales, low, minimums)

    return unpack


def _pack_k45(high: bool) -> Callable[[Content], Tensor]:
    def pack(content: Content) -> Tensor:
        assert content.scales is not None and content.low is not None and content.minimums is not None  # noqa: PT018
        parts = [_bytes(content.d), _bytes(content.low), _pack_six_bits(content.scales, content.minimums)]
        parts += [_from_planes((content.codes >> 4).unflatten(-1, (8, 32)), 1)] if high else []
        codes = _from_planes((content.codes & 15).unflatten(-1, (4, 2, 32)), 4).flatten(-2)
        return torch.cat([*parts, codes], -1)

    return pack


def _unpack_q6(data: Tensor) -> Content:
    low = _planes(data[..., :128].unflatten(-1, (2, 64)), 4, 2).flatten(-3)
    high = _planes(data[..., 128:192].unflatten(-1, (2, 32)), 2, 4).flatten(-3)
    scales = data[..., 192:208].contiguous().view(torch.int8).short()
    return Content(low | high << 4, _halves(data[..., 208:]).squeeze(-1), scales)


def _pack_q6(content: Content) -> Tensor:
    assert content.scales is not None
    low = _from_planes((content.codes & 15).unflatten(-1, (2, 2, 64)), 4).flatten(-2)
    high = _from_planes((content.codes >> 4).unflatten(-1, (2, 4, 32)), 2).flatten(-2)
    return torch.cat([low, high, content.scales.to(torch.int8).view(torch.uint8), _bytes(content.d)], -1)


def _unpack_two_bits(data: Tensor) -> Tensor:
    """Return the low two bits of 256 codes in 64 bytes: Q2_K and Q3_K."""
    return _planes(data.unflatten(-1, (2, 32)), 2, 4).flatten(-3)


def _pack_two_bits(codes: Tensor) -> Tensor:
    return _from_planes((codes & 3).unflatten(-1, (2, 4, 32)), 2).flatten(-2)


def _unpack_q3(data: Tensor) -> Content:
    codes = _unpack_two_bits(data[..., 32:96]) | _planes(data[..., :32], 1, 8).flatten(-2) << 2
    scales = _nibbles(data[..., 96:104]) | _planes(data[..., 104:108], 2, 4).flatten(-2) << 4
    return Content(codes, _halves(data[..., 108:]).squeeze(-1), scales.short() - 32)


def _pack_q3(content: Content) -> Tensor:
    assert content.scales is not None
    high = _from_planes((content.codes >> 2).unflatten(-1, (8, 32)), 1)
    scales = (content.scales + 32).to(torch.uint8)
    top = _from_planes((scales >> 4).unflatten(-1, (4, 4)), 2)
    return torch.cat([high, _pack_two_bits(content.codes), _from_nibbles(scales & 15), top, _bytes(content.d)], -1)


def _unpack_q2(data: Tensor) -> Content:
    d, low = _halves(data[..., 80:]).unbind(-1)
    scales = data[..., :16]
    return Content(_unpack_two_bits(data[..., 16:80]), d, (scales & 15).short(), low, (scales >> 4).short())


def _pack_q2(content: Content) -> Tensor:
    assert content.scales is not None and content.low is not None and content.minimums is not None  # noqa: PT018
    both = content.scales.to(torch.uint8) | content.minimums.to(torch.uint8) << 4
    return torch.cat([both, _pack_two_bits(content.codes), _bytes(content.d), _bytes(content.low)], -1)


def _unpack_iq4_xs(data: Tensor) -> Content:
    codes = _nibbles(data[..., 8:].unflatten(-1, (8, 16))).flatten(-2)
    low = torch.stack([data[..., 4:8] & 15, data[..., 4:8] >> 4], -1).flatten(-2)
    high = torch.stack([data[..., 2:4] >> (2 * i) & 3 for i in range(4)], -1).flatten(-2)
    return Content(codes, _halves(data[..., :2]).squeeze(-1), (low | high << 4).short() - 32)


def _pack_iq4_xs(content: Content) -> Tensor:
    assert content.scales is not None
    scales = (content.scales + 32).to(torch.uint8)
    low = _from_planes((scales & 15).unflatten(-1, (4, 2)).transpose(-1, -2), 4)
    high = _from_planes((scales >> 4).unflatten(-1, (2, 4)).transpose(-1, -2), 2)
    codes = _from_nibbles(content.codes.unflatten(-1, (8, 32))).flatten(-2)
    return torch.cat([_bytes(content.d), high, low, codes], -1)


def _type(name: str, number: int, nbytes: int, *how: Any) -> BlockType:
    dtype, group, symmetric, size = BLOCK_GRIDS[name]
    scales, minimums, unpack, pack = how
    return BlockType(name, number, dtype, size, group, nbytes, scales, None if symmetric else minimums, unpack, pack)


BLOCK_TYPES: Final[dict[str, BlockType]] = {
    kind.name: kind
    for kind in (
        _type("Q4_0", 2, 18, None, None, _unpack_simple(False, False), _pack_simple(False)),
        _type("Q4_1", 3, 20, None, 1, _unpack_simple(False, True), _pack_simple(False)),
        _type("Q5_0", 6, 22, None, None, _unpack_simple(True, False), _pack_simple(True)),
        _type("Q5_1", 7, 24, None, 1, _unpack_simple(True, True), _pack_simple(True)),
        _type("Q8_0", 8, 34, None, None, _unpack_q8, _pack_q8),
        _type("Q2_K", 10, 84, (1, 15), 15, _unpack_q2, _pack_q2),
        _type("Q3_K", 11, 110, (-32, 31), None, _unpack_q3, _pack_q3),
        _type("Q4_K", 12, 144, (1, 63), 63, _unpack_k45(False), _pack_k45(False)),
        _type("Q5_K", 13, 176, (1, 63), 63, _unpack_k45(True), _pack_k45(True)),
        _type("Q6_K", 14, 210, (-128, 127), None, _unpack_q6, _pack_q6),
        _type("IQ4_NL", 20, 18, None, None, _unpack_simple(False, False), _pack_simple(False)),
        _type("IQ4_XS", 23, 136, (-32, 31), None, _unpack_iq4_xs, _pack_iq4_xs),
    )
}
"""Every type of blocks that is written, by ggml's name."""
