r"""Storage of keys and values in torch tensors: pages of floats, or pages of codes plus the most recent tokens in float.

A :class:`Pool` holds the keys or the values of one layer for all sequences: ``pages`` pages of ``page_tokens`` tokens, each
with ``heads`` vectors of ``dim`` numbers. Rows are written token by token and read by block table.

The quantized pool writes codes immediately and also keeps the last ``recent`` tokens of every running sequence in float, in a
ring buffer; reading replaces the decoded values of these tokens by the exact ones. A page of codes is therefore always
complete, and a block table means the same for every pool. A grid that shares scales between the tokens of a page (block (-1,
1), because keys have outlier *channels*: KIVI, Liu et al. 2024, arXiv 2402.02750) can only be chosen when the page is full.
Until then its tokens exist in the ring only, which must therefore hold two pages. The tokens of a shared page are read from its
codes.

Vectors can be stored multiplied by a Hadamard matrix ``R`` (orthogonal and symmetric; QuaRot, Ashkboos et al. 2024, arXiv
2404.00456). Because :math:`(Rq) \cdot (Rk) = q \cdot k`, queries are multiplied by R before they meet such keys, and the
weighted sum of such values is multiplied by R afterwards. This spreads outliers over channels, which improves per-token grids.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from quantkit.dtypes import SCALE_DTYPES
from quantkit.engine.backend import Copy, Memory, Span
from quantkit.errors import SpecError
from quantkit.numerics.grid import choose_qparams, dequantize, quantize
from quantkit.numerics.hadamard import sylvester
from quantkit.numerics.pack import pack, packed_words, unpack
from quantkit.spec import KVScheme, QuantSpec


@dataclass(frozen=True, slots=True)
class RowPlacement:
    """Where the M rows of one step are written.

    Attributes:
        pages, offsets, slots, positions: int64 (M,), of each row.
        newest: int64 (M,), the last position of the row's span.
        first: int64 (M,), the first position of the row's span.
        opened: int64, pages whose first token is among the rows; their earlier content is obsolete.
        filled: int64 (F,), indices of the rows that fill their page.
        fresh: int64, slots that have a new sequence.
    """

    pages: Tensor
    offsets: Tensor
    slots: Tensor
    positions: Tensor
    newest: Tensor
    first: Tensor
    opened: Tensor
    filled: Tensor
    fresh: Tensor

    @classmethod
    def of(cls, spans: Sequence[Span], page_tokens: int, device: torch.device) -> "RowPlacement":
        """Return the placement of the tokens of ``spans``, one span after another."""
        positions = [p for span in spans for p in range(span.start, span.start + len(span.ids))]
        owner = [span for span in spans for _ in span.ids]
        pages = [span.table[p // page_tokens] for span, p in zip(owner, positions, strict=True)]
        offsets = [p % page_tokens for p in positions]
        columns = [
            pages,
            offsets,
            [span.slot for span in owner],
            positions,
            [span.start + len(span.ids) - 1 for span in owner],
            [span.start for span in owner],
            [page for page, offset in zip(pages, offsets, strict=True) if offset == 0],
            [i for i, offset in enumerate(offsets) if offset == page_tokens - 1],
            [span.slot for span in spans if span.fresh],
        ]
        return cls(*(torch.tensor(column, dtype=torch.int64, device=device) for column in columns))


@dataclass(frozen=True, slots=True)
class Reading:
    """What to read: P consecutive entries of the block table of each of S sequences.

    Attributes:
        tables: int64 (S, P); shorter tables are padded with a page of the same sequence.
        base: int64 (S,), position of the first token of the first page.
        slots: int64 (S,).
        run: the first page, if there is a single sequence with consecutive page numbers, so that reading is a view; else None.
    """

    tables: Tensor
    base: Tensor
    slots: Tensor
    run: int | None


class Pool(Protocol):
    """Keys or values of one layer."""

    @property
    def rotation(self) -> Tensor | None:
        """The matrix (dim, dim) that stored vectors were multiplied by, or None."""
        ...

    def copy(self, copies: Sequence[Copy]) -> None:
        """Copy the first tokens of pages."""
        ...

    def write(self, rows: RowPlacement, values: Tensor) -> None:
        """Store vectors (M, heads, dim)."""
        ...

    def read(self, reading: Reading) -> Tensor:
        """Return vectors (S, P * page_tokens, heads, dim) in the pool's dtype."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        ...


class FloatPool:
    """Pages of floats (pages, page_tokens, heads, dim)."""

    rotation = None

    def __init__(self, memory: Memory, heads: int, dim: int, dtype: torch.dtype, device: torch.device) -> None:
        self._data = torch.zeros(memory.pages, memory.page_tokens, heads, dim, dtype=dtype, device=device)

    def copy(self, copies: Sequence[Copy]) -> None:
        """Copy the first tokens of pages; the rest of the target is set to zero."""
        for source, target, tokens in copies:
            self._data[target, :tokens] = self._data[source, :tokens]
            self._data[target, tokens:] = 0

    def write(self, rows: RowPlacement, values: Tensor) -> None:
        """Store vectors (M, heads, dim). Opened pages are cleared first: their old content may not be finite."""
        if len(rows.opened):
            self._data[rows.opened] = 0
        self._data[rows.pages, rows.offsets] = values

    def read(self, reading: Reading) -> Tensor:
        """Return vectors (S, P * page_tokens, heads, dim)."""
        count = reading.tables.shape[1]
        if reading.run is not None:
            return self._data[reading.run : reading.run + count].flatten(0, 1)[None]
        return self._data[reading.tables].flatten(1, 2)

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return self._data.nbytes


class QuantizedPool:
    """Pages of codes (pages, page_tokens, heads, words) with scales, and a ring of recent tokens in float.

    Args:
        memory: number and size of the pages, number of slots.
        heads: key/value heads.
        dim: channels per head.
        dtype: dtype of the vectors that are written and read.
        device: device of the pool.
        spec: the grid of codes; a row is a token, a column a channel.
        recent: tokens per slot that are also kept in float.
        rotate: store vectors multiplied by a Hadamard matrix.

    Raises:
        SpecError: ``dim`` is not a multiple of the group size, or not a power of two with ``rotate``; ``recent`` is less than
            two pages for a grid with scales per channel.
    """

    def __init__(
        self,
        memory: Memory,
        heads: int,
        dim: int,
        dtype: torch.dtype,
        device: torch.device,
        *,
        spec: QuantSpec,
        recent: int = 0,
        rotate: bool = False,
    ) -> None:
        self._spec, self._dim, self._dtype, self._recent = spec, dim, dtype, recent
        self._per_channel = spec.block[0] == -1
        if reason := spec.rejects((memory.page_tokens, dim)):
            raise SpecError(f"key/value heads of {dim} channels: {reason}")
        if self._per_channel and recent < 2 * memory.page_tokens:
            raise SpecError(
                f"recent={recent}: scales per channel are chosen when a page of {memory.page_tokens} tokens is full, and its "
                f"tokens are kept in float until then; want at least {2 * memory.page_tokens}"
            )
        if rotate and (dim < 1 or dim & (dim - 1)):
            raise SpecError(f"rotate=True: a Hadamard matrix for {dim} channels; want a power of two, or leave rotate out")
        self.rotation = (sylvester(dim) / dim**0.5).to(device, dtype) if rotate else None
        shape = (memory.pages, memory.page_tokens, heads, packed_words(dim, spec.bits))
        scales = scale_shape(spec, memory, heads, dim)
        self._words = torch.zeros(shape, dtype=torch.int32, device=device)
        self._scale = torch.ones(scales, dtype=SCALE_DTYPES[spec.scale_dtype], device=device)
        self._zero = None if spec.symmetric else torch.zeros(scales, dtype=torch.uint8, device=device)
        self._ring = torch.zeros(memory.slots, recent, heads, dim, dtype=dtype, device=device)
        self._tags = torch.full((memory.slots, recent), -1, dtype=torch.int64, device=device)

    def copy(self, copies: Sequence[Copy]) -> None:
        """Copy whole pages; all codes are finite, so there is no need to clear the rest."""
        for source, target, _ in copies:
            for stored in (self._words, self._scale, self._zero):
                if stored is not None:
                    stored[target] = stored[source]

    def write(self, rows: RowPlacement, values: Tensor) -> None:
        """Store vectors (M, heads, dim)."""
        values = values if self.rotation is None else values @ self.rotation
        if self._recent and len(rows.fresh):
            self._tags[rows.fresh] = -1
        if self._per_channel:
            if len(rows.filled):
                self._write_full_pages(rows, values)
        else:
            self._store((rows.pages, rows.offsets), values)
        if self._recent:
            kept = (rows.positions > rows.newest - self._recent).nonzero()[
                :, 0
            ]  # the ring holds the end of a longer chunk only
            slots, positions = rows.slots[kept], rows.positions[kept]
            self._ring[slots, positions % self._recent] = values[kept]
            self._tags[slots, positions % self._recent] = positions

    def read(self, reading: Reading) -> Tensor:
        """Return decoded vectors (S, P * page_tokens, heads, dim), the most recent tokens exactly as they were written."""
        values = self._load(reading.tables).flatten(1, 2)
        if self._recent:
            tags = self._tags[reading.slots]  # (S, recent)
            where = tags - reading.base[:, None]
            sequence, entry = ((tags >= 0) & (where >= 0) & (where < values.shape[1])).nonzero(as_tuple=True)
            values[sequence, where[sequence, entry]] = self._ring[reading.slots[sequence], entry]
        return values

    @property
    def nbytes(self) -> int:
        """Bytes allocated: codes, scales, zero points, the ring and the positions in it."""
        tensors = (self._words, self._scale, self._zero, self._ring, self._tags)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)

    def _write_full_pages(self, rows: RowPlacement, values: Tensor) -> None:
        """Quantize the pages that this step fills; their earlier tokens are in the ring, or in a copied page."""
        size = self._words.shape[1]
        last = rows.filled
        positions = rows.positions[last, None] - torch.arange(size - 1, -1, -1, device=last.device)  # (F, page_tokens)
        row = last[:, None] - (rows.positions[last, None] - positions)
        now = positions >= rows.first[last, None]
        slots = rows.slots[last, None].expand_as(positions)
        entry = positions % self._recent
        in_ring = self._tags[slots, entry] == positions
        before = torch.where(in_ring[..., None, None], self._ring[slots, entry], self._load(rows.pages[last]))
        self._store(rows.pages[last], torch.where(now[..., None, None], values[row.clamp(min=0)], before))

    def _store(self, index: Tensor | tuple[Tensor, Tensor], values: Tensor) -> None:
        """Quantize and store ``values``: (M, heads, dim) at (pages, offsets), or (F, page_tokens, heads, dim) at pages."""
        matrix = values.transpose(1, 2) if self._per_channel else values  # (F, heads, page_tokens, dim) or (M, heads, dim)
        scale, zero = choose_qparams(matrix, self._spec)
        codes = quantize(matrix, scale, zero, self._spec)
        self._words[index] = pack(codes.transpose(1, 2) if self._per_channel else codes, self._spec.bits)
        self._scale[index] = scale
        if self._zero is not None and zero is not None:
            self._zero[index] = zero

    def _load(self, pages: Tensor) -> Tensor:
        """Decode ``pages`` (...) to vectors (..., page_tokens, heads, dim)."""
        codes = unpack(self._words[pages], self._spec.bits, self._dim)
        zero = None if self._zero is None else self._zero[pages]
        if not self._per_channel:
            return dequantize(codes, self._scale[pages], zero, self._spec).to(self._dtype)
        return dequantize(codes.transpose(-2, -3), self._scale[pages], zero, self._spec).to(self._dtype).transpose(-2, -3)


def make_pool(
    memory: Memory,
    shape: tuple[int, int],
    dtype: torch.dtype,
    device: torch.device,
    spec: QuantSpec | None,
    scheme: KVScheme,
) -> Pool:
    """Return a pool for keys or values.

    Args:
        memory: number and size of the pages, number of slots.
        shape: heads and channels per head.
        dtype: dtype of the vectors.
        device: device of the pool.
        spec: ``scheme.key`` or ``scheme.value``; None stores floats.
        scheme: gives ``recent`` and ``rotate``.
    """
    if spec is None:
        return FloatPool(memory, *shape, dtype, device)
    return QuantizedPool(memory, *shape, dtype, device, spec=spec, recent=scheme.recent, rotate=scheme.rotate)


def pool_bytes(memory: Memory, shape: tuple[int, int], dtype: torch.dtype, spec: QuantSpec | None, recent: int) -> int:
    """Return :attr:`Pool.nbytes` of a pool without allocating it; arguments as in :func:`make_pool`."""
    heads, dim = shape
    tokens = memory.pages * memory.page_tokens
    if spec is None:
        return tokens * heads * dim * dtype.itemsize
    scales = 1
    for size in scale_shape(spec, memory, heads, dim):
        scales *= size
    per_scale = SCALE_DTYPES[spec.scale_dtype].itemsize + (not spec.symmetric)
    ring = memory.slots * recent * (heads * dim * dtype.itemsize + 8)
    return tokens * heads * packed_words(dim, spec.bits) * 4 + scales * per_scale + ring


def scale_shape(spec: QuantSpec, memory: Memory, heads: int, dim: int) -> tuple[int, ...]:
    """Return the shape of a pool's scales: one per page, head and channel, or one per token, head and group."""
    if spec.block[0] == -1:
        return memory.pages, heads, 1, dim
    groups = 1 if spec.block[1] == -1 else dim // spec.block[1]
    return memory.pages, memory.page_tokens, heads, groups
