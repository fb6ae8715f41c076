r"""Where keys and values are kept: pages of floats, or pages of codes with a window of recent tokens in float.

A :class:`Pool` holds the keys or the values of one layer for all sequences: ``pages`` pages of ``page_tokens`` tokens of
``heads`` vectors of ``dim`` numbers. Rows are written one token at a time and read back a page table at a time.

The quantized pool writes codes at once and also keeps the last ``recent`` tokens of every running sequence in a ring, in
float, which reading lays over the codes; so a page is always complete, and a page table means the same in every pool. A grid
that shares scales between the tokens of a page (block (-1, 1): keys have outlier *channels*, KIVI, Liu et al. 2024, arXiv
2402.02750) needs all tokens of the page to choose them, so such a page is coded when it is full; until then its tokens are
in the ring, which therefore must hold two pages. Tokens that came with a shared page are read from its codes.

Optionally vectors are stored rotated by a Hadamard matrix ``R`` (orthogonal, symmetric; QuaRot, Ashkboos et al. 2024, arXiv
2404.00456): :math:`(Rq) \cdot (Rk) = q \cdot k`, so whoever reads keys rotates queries, and whoever reads values rotates the
weighted sum back. Spreading outliers over channels makes per-token grids better.
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
class Rows:
    """Where the rows of one step go; M rows, S spans.

    Attributes:
        pages, offsets, slots, positions: int64 (M,).
        newest: int64 (M,), the last position of the row's span.
        first: int64 (M,), the first position of the row's span.
        opened: pages whose first token is among the rows: what stood in them is to be forgotten.
        filled: int64 (F,) rows that fill their page.
        fresh: int64, slots that changed hands.
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
    def of(cls, spans: Sequence[Span], page_tokens: int, device: torch.device) -> "Rows":
        """Lay out the tokens of ``spans`` one after another."""
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
    """What to read: for each of S sequences, P pages in a row.

    Attributes:
        tables: int64 (S, P); rows shorter than P are filled up with a page of the same sequence.
        base: int64 (S,), position of the first token of the first page.
        slots: int64 (S,).
        run: first page, if there is one sequence and its pages follow each other, else None: reading is then a view.
    """

    tables: Tensor
    base: Tensor
    slots: Tensor
    run: int | None


class Pool(Protocol):
    """Keys or values of one layer."""

    @property
    def rotation(self) -> Tensor | None:
        """The (dim, dim) matrix that was applied to what is stored, or None."""
        ...

    def copy(self, copies: Sequence[Copy]) -> None:
        """Copy the beginnings of pages."""
        ...

    def write(self, rows: Rows, values: Tensor) -> None:
        """Store (M, heads, dim)."""
        ...

    def read(self, reading: Reading) -> Tensor:
        """Return (S, P * page_tokens, heads, dim) in the dtype the pool was made with."""
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
        """Copy the beginnings of pages; the rest of the target becomes zero."""
        for source, target, tokens in copies:
            self._data[target, :tokens] = self._data[source, :tokens]
            self._data[target, tokens:] = 0

    def write(self, rows: Rows, values: Tensor) -> None:
        """Store (M, heads, dim); a page that is opened loses what others left there, numbers that are not finite included."""
        if len(rows.opened):
            self._data[rows.opened] = 0
        self._data[rows.pages, rows.offsets] = values

    def read(self, reading: Reading) -> Tensor:
        """Return (S, P * page_tokens, heads, dim)."""
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
        spec: the grid; a row is a token, a column a channel.
        recent: length of the ring.
        rotate: store vectors times a Hadamard matrix.

    Raises:
        SpecError: ``dim`` is not a multiple of the group, or no power of two for a rotation; a ring shorter than two pages for
            scales per channel.
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
                f"a grid per channel is chosen when a page of {memory.page_tokens} tokens is full; until then its tokens are "
                f"kept in float: want recent >= {2 * memory.page_tokens}, got {recent}"
            )
        if rotate and (dim < 1 or dim & (dim - 1)):
            raise SpecError(f"a Hadamard rotation of {dim} channels: want a power of two; leave rotate out")
        self.rotation = (sylvester(dim) / dim**0.5).to(device, dtype) if rotate else None
        shape = (memory.pages, memory.page_tokens, heads, packed_words(dim, spec.bits))
        scales = scale_shape(spec, memory, heads, dim)
        self._words = torch.zeros(shape, dtype=torch.int32, device=device)
        self._scale = torch.ones(scales, dtype=SCALE_DTYPES[spec.scale_dtype], device=device)
        self._zero = None if spec.symmetric else torch.zeros(scales, dtype=torch.uint8, device=device)
        self._ring = torch.zeros(memory.slots, recent, heads, dim, dtype=dtype, device=device)
        self._tags = torch.full((memory.slots, recent), -1, dtype=torch.int64, device=device)

    def copy(self, copies: Sequence[Copy]) -> None:
        """Copy whole pages: codes are finite whatever they stand for."""
        for source, target, _ in copies:
            for stored in (self._words, self._scale, self._zero):
                if stored is not None:
                    stored[target] = stored[source]

    def write(self, rows: Rows, values: Tensor) -> None:
        """Store (M, heads, dim)."""
        values = values if self.rotation is None else values @ self.rotation
        if self._recent and len(rows.fresh):
            self._tags[rows.fresh] = -1
        if self._per_channel:
            if len(rows.filled):
                self._write_full_pages(rows, values)
        else:
            self._store((rows.pages, rows.offsets), values)
        if self._recent:
            kept = (rows.positions > rows.newest - self._recent).nonzero()[:, 0]  # of a longer chunk only its end
            slots, positions = rows.slots[kept], rows.positions[kept]
            self._ring[slots, positions % self._recent] = values[kept]
            self._tags[slots, positions % self._recent] = positions

    def read(self, reading: Reading) -> Tensor:
        """Return (S, P * page_tokens, heads, dim), decoded, the newest tokens as they were written."""
        values = self._load(reading.tables).flatten(1, 2)
        if self._recent:
            tags = self._tags[reading.slots]  # (S, recent)
            where = tags - reading.base[:, None]
            sequence, entry = ((tags >= 0) & (where >= 0) & (where < values.shape[1])).nonzero(as_tuple=True)
            values[sequence, where[sequence, entry]] = self._ring[reading.slots[sequence], entry]
        return values

    @property
    def nbytes(self) -> int:
        """Bytes allocated: codes, scales, zero points, the ring and its tags."""
        tensors = (self._words, self._scale, self._zero, self._ring, self._tags)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)

    def _write_full_pages(self, rows: Rows, values: Tensor) -> None:
        """Code every page that this step fills: its earlier tokens are in the ring, or came with a shared page."""
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
        """Code ``values``: (M, heads, dim) at (pages, offsets), or (F, page_tokens, heads, dim) at pages."""
        matrix = values.transpose(1, 2) if self._per_channel else values  # (F, heads, page_tokens, dim) or (M, heads, dim)
        scale, zero = choose_qparams(matrix, self._spec)
        codes = quantize(matrix, scale, zero, self._spec)
        self._words[index] = pack(codes.transpose(1, 2) if self._per_channel else codes, self._spec.bits)
        self._scale[index] = scale
        if self._zero is not None and zero is not None:
            self._zero[index] = zero

    def _load(self, pages: Tensor) -> Tensor:
        """Decode ``pages`` (...) to (..., page_tokens, heads, dim)."""
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
    """Return a pool for heads x dim = ``shape`` on the grid ``spec``, which is the key's or the value's of ``scheme``."""
    if spec is None:
        return FloatPool(memory, *shape, dtype, device)
    return QuantizedPool(memory, *shape, dtype, device, spec=spec, recent=scheme.recent, rotate=scheme.rotate)


def pool_bytes(memory: Memory, shape: tuple[int, int], dtype: torch.dtype, spec: QuantSpec | None, recent: int) -> int:
    """Predict :attr:`Pool.nbytes` without allocating."""
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
    """Return the shape of a pool's scales: per page and channel, or per token and group."""
    if spec.block[0] == -1:
        return memory.pages, heads, 1, dim
    groups = 1 if spec.block[1] == -1 else dim // spec.block[1]
    return memory.pages, memory.page_tokens, heads, groups
