"""Keys and values in pages on CUDA: append what a token adds, attend to what is there. Plain torch twins define both.

Rows of a batch that stand at a negative position only fill it up: they write nothing, and read zeros. Attention has two kernels
for one meaning: :func:`attend` for single tokens, over whose past blocks share the work, and :func:`attend_prompt` for runs of
neighbouring tokens, which share what is read.

Pages hold 32 tokens (``kernels_cuda/pages.cuh``). Quantized ones keep a float32 scale per token and head (``int8``), or a
scale and a zero point per token and 32 channels (``int4``).
"""

from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from quantkit.errors import KernelError
from quantkit.kernels.build import DTYPE_CODES
from quantkit.kernels.cuda import calls
from quantkit.kernels.cuda.calls import launch, pointer, struct
from quantkit.kernels.program.reference import rotate

PAGE_TOKENS: Final = 32
KINDS: Final = ("float", "int8", "int4")
HEAD_SIZES: Final = (64, 128)
_GROUP, _HEAD_ROWS, _PROMPT_WARPS = 32, 16, 4

AppendStruct = struct(
    "AppendStruct",
    "qkv q positions slots table cos sin q_gain k_gain keys values key_scales value_scales",
    "rows heads kv_heads head rotated interleaved stride kv_kind dtype",
    "eps",
)
AttendStruct = struct(
    "AttendStruct",
    "q keys values key_scales value_scales positions slots table out partial arrived tiles",
    "rows heads kv_heads head stride splits window kv_kind dtype count",
    "scale softcap",
)


class LayerPages(NamedTuple):
    """Pages of one layer.

    Attributes:
        keys, values: (pages, kv_heads, 32, head): of the model's dtype, uint8 codes (int8), or uint8 (..., head / 2) (int4).
        key_scales, value_scales: float32 (pages, kv_heads, 32) for int8, int32 (pages, kv_heads, 32, head / 32) for int4.
        kind: one of :data:`KINDS`.
    """

    keys: Tensor
    values: Tensor
    key_scales: Tensor | None
    value_scales: Tensor | None
    kind: str

    @classmethod
    def empty(
        cls, pages: int, kv_heads: int, head: int, kind: str, dtype: torch.dtype, device: torch.device | str
    ) -> "LayerPages":
        """Allocate pages, zeroed.

        Raises:
            KernelError: a kind that is none of :data:`KINDS`, or a head size that int4 groups do not divide.
        """
        if kind not in KINDS or (kind == "int4" and head % _GROUP):
            raise KernelError(
                f"keys and values as {kind!r} with heads of {head}: want {', '.join(KINDS)}, int4 in groups of 32"
            )
        shape = (pages, kv_heads, PAGE_TOKENS)
        stored = dtype if kind == "float" else torch.uint8
        codes = [torch.zeros((*shape, head // 2 if kind == "int4" else head), dtype=stored, device=device) for _ in range(2)]
        if kind == "float":
            return cls(codes[0], codes[1], None, None, kind)
        scales = (
            (shape, torch.float32) if kind == "int8" else ((*shape, head // _GROUP), torch.int32)
        )  # a word of int4: scale below, zero above
        grids = [torch.zeros(scales[0], dtype=scales[1], device=device) for _ in range(2)]
        return cls(codes[0], codes[1], grids[0], grids[1], kind)

    @property
    def nbytes(self) -> int:
        """Bytes of the pages."""
        return sum(t.nbytes for t in self[:4] if t is not None)

    def read(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return keys and values as floats, (pages, kv_heads, 32, head)."""
        return self._open(self.keys, self.key_scales, dtype), self._open(self.values, self.value_scales, dtype)

    def _open(self, codes: Tensor, scales: Tensor | None, dtype: torch.dtype) -> Tensor:
        if scales is None:
            return codes
        if self.kind == "int8":
            wide: Tensor = (codes.float() - 128) * scales[..., None]
            return wide.to(dtype)
        values = torch.stack([codes & 15, codes >> 4], -1).flatten(-2).unflatten(-1, (-1, _GROUP)).float()
        scale = scales.view(torch.int16)[..., 0::2].contiguous().view(dtype).float()
        wide = ((values - (scales >> 16)[..., None]) * scale[..., None]).flatten(-2)
        return wide.to(dtype)


class Rope(NamedTuple):
    """How heads are turned, and normalized before that.

    Attributes:
        cos, sin: float32 (positions, dim / 2), or None.
        dim: rotated channels.
        interleaved: pairs are neighbours.
        q_gain, k_gain: float32 (head,) of an RMS norm per head, or None.
        eps: of that norm.
    """

    cos: Tensor | None
    sin: Tensor | None
    dim: int = 0
    interleaved: bool = False
    q_gain: Tensor | None = None
    k_gain: Tensor | None = None
    eps: float = 1e-6


class Where(NamedTuple):
    """Where rows stand: all int32.

    Attributes:
        positions: (rows,); negative for a row that only fills a batch up.
        slots: (rows,): which sequence.
        table: (slots, pages of a sequence).
    """

    positions: Tensor
    slots: Tensor
    table: Tensor


def append(qkv: Tensor, heads: int, rope: Rope, where: Where, pages: LayerPages) -> Tensor:
    """Turn queries and keys, write keys and values into ``pages``, and return the queries (rows, heads, head).

    Args:
        qkv: (rows, (heads + 2 kv_heads) * head), contiguous, of float16 or bfloat16.
        heads: query heads.
        rope: see :class:`Rope`.
        where: see :class:`Where`; no two rows at the same place.
        pages: written to.
    """
    kv_heads, head = pages.keys.shape[1], qkv.shape[1] // (heads + 2 * pages.keys.shape[1])
    q = qkv.new_empty((len(qkv), heads, head))
    filled = AppendStruct(
        *map(pointer, (qkv, q, *where, rope.cos, rope.sin, rope.q_gain, rope.k_gain, *pages[:4])),
        *(len(qkv), heads, kv_heads, head, rope.dim, rope.interleaved, where.table.shape[1]),
        *(KINDS.index(pages.kind), DTYPE_CODES[qkv.dtype], rope.eps),
    )
    launch("qk_append", filled, qkv.device)
    return q


def append_plain(qkv: Tensor, heads: int, rope: Rope, where: Where, pages: LayerPages) -> Tensor:
    """Define :func:`append` in plain torch."""
    kv_heads = pages.keys.shape[1]
    split = qkv.view(len(qkv), heads + 2 * kv_heads, -1)
    q, k, v = (part.float() for part in split.split([heads, kv_heads, kv_heads], 1))
    if rope.q_gain is not None:
        q = q / (q.square().mean(-1, keepdim=True) + rope.eps).sqrt() * rope.q_gain
    if rope.k_gain is not None:
        k = k / (k.square().mean(-1, keepdim=True) + rope.eps).sqrt() * rope.k_gain
    if rope.cos is not None and rope.sin is not None:
        positions = where.positions.long().clamp(min=0)
        q, k = (rotate(part, rope.cos[positions], rope.sin[positions], rope.dim, rope.interleaved) for part in (q, k))
    real = where.positions >= 0
    page, at = (part[real] for part in places(where))
    for new, codes, scales in ((k[real], pages.keys, pages.key_scales), (v[real], pages.values, pages.value_scales)):
        if scales is None:
            codes[page, :, at] = new.to(codes.dtype)
            continue
        stored, grids = quantize_heads(new, pages.kind, qkv.dtype)
        codes[page, :, at] = stored
        scales[page, :, at] = grids
    turned: Tensor = q.to(qkv.dtype)
    return turned


def places(where: Where) -> tuple[Tensor, Tensor]:
    """Return page and place in it of every row."""
    position = where.positions.long()
    return where.table[where.slots.long(), position // PAGE_TOKENS].long(), position % PAGE_TOKENS


def quantize_heads(x: Tensor, kind: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return stored codes and scales of float32 heads (rows, kv_heads, head), as :class:`LayerPages` keeps them."""
    if kind == "int8":
        largest = x.abs().amax(-1)
        scale = torch.where(largest == 0, 1.0, largest / 127.5)
        return ((x / scale[..., None]).round().clamp(-128, 127) + 128).to(torch.uint8), scale
    groups = x.unflatten(-1, (-1, _GROUP))
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    scale = ((high - low) / 15).to(dtype)
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    zero = (-low / scale.float()).clamp(0, 15).round()
    codes = (groups / scale.float()[..., None] + zero[..., None]).clamp(0, 15).round().to(torch.uint8).flatten(-2)
    words = scale.view(torch.int16).to(torch.int32) & 0xFFFF | (zero.to(torch.int32) << 16)
    return codes[..., 0::2] | (codes[..., 1::2] << 4), words


def choose_splits(rows: int, kv_heads: int, tokens: int, processors: int) -> int:
    """Return over how many blocks a sequence of up to ``tokens`` is split: two per multiprocessor, of 64 tokens at least."""
    return max(1, min(-(-2 * processors // (rows * kv_heads)), tokens // 64, 64))


def attend(
    q: Tensor,
    where: Where,
    pages: LayerPages,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    splits: int | None = None,
) -> Tensor:
    """Return what each row's queries read from tokens 0 to its own position: (rows, heads, head).

    Args:
        q: (rows, heads, head), contiguous, of float16 or bfloat16; head is one of :data:`HEAD_SIZES`.
        where: see :class:`Where`.
        pages: keys and values, this token's included.
        scale: what ``q . k`` is multiplied by.
        window: a row sees so many tokens, itself included; None sees all.
        softcap: scores become ``softcap * tanh(score / softcap)``.
        splits: over how many blocks a sequence is split; the default depends on rows and the table's length. Results are
            the same bits in every batch if this is fixed.
    """
    rows, heads, head = q.shape
    kv_heads = _check_heads(q, pages)
    packs = -(-(heads // kv_heads) // _HEAD_ROWS) * kv_heads
    tokens = where.table.shape[1] * PAGE_TOKENS
    splits = splits or choose_splits(rows, packs, tokens, calls.multiprocessors(q.device))
    out = torch.empty_like(q)
    partial = arrived = None
    if splits > 1:
        size = rows * packs * splits * _HEAD_ROWS * (head + 2)
        partial = torch.empty(size, dtype=torch.float32, device=q.device)
        arrived = calls.counters(q.device, rows * packs)
    filled = AttendStruct(
        *map(pointer, (q, *pages[:4], *where, out, partial, arrived, None)),
        *(rows, heads, kv_heads, head, where.table.shape[1], splits, window or 0),
        *(KINDS.index(pages.kind), DTYPE_CODES[q.dtype], 0, scale, softcap or 0.0),
    )
    launch("qk_attend", filled, q.device)
    return out


def _check_heads(q: Tensor, pages: LayerPages) -> int:
    """Return how many key heads there are."""
    (_, heads, head), kv_heads = q.shape, pages.keys.shape[1]
    if head not in HEAD_SIZES or heads % kv_heads:
        raise KernelError(f"attention with {heads} heads of {head} over {kv_heads}: want heads of {HEAD_SIZES}, a multiple")
    return kv_heads


def tile_tokens(heads: int, kv_heads: int) -> int:
    """Return how many neighbouring tokens a tile of :func:`attend_prompt` may have."""
    return _PROMPT_WARPS * (_HEAD_ROWS // min(_HEAD_ROWS, heads // kv_heads))


def cut(first: int, count: int, size: int) -> list[tuple[int, int]]:
    """Return tiles of at most ``size`` rows that cover ``count`` neighbouring rows from ``first`` on."""
    return [(first + at, min(size, count - at)) for at in range(0, count, size)]


def attend_prompt(
    q: Tensor,
    where: Where,
    pages: LayerPages,
    tiles: Tensor,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Compute what :func:`attend` does, for runs of tokens that read their past together.

    Args:
        q, where, pages, scale, window, softcap: as there.
        tiles: int32 (tiles, 2): first row and number of rows, at most :func:`tile_tokens`, all of one sequence and each one
            position after the one before. Rows of no tile read zeros.
    """
    rows, heads, head = q.shape
    kv_heads, out = _check_heads(q, pages), torch.zeros_like(q)
    filled = AttendStruct(
        *map(pointer, (q, *pages[:4], *where, out, None, None, tiles)),
        *(rows, heads, kv_heads, head, where.table.shape[1], 1, window or 0),
        *(KINDS.index(pages.kind), DTYPE_CODES[q.dtype], len(tiles), scale, softcap or 0.0),
    )
    launch("qk_attend_prompt", filled, q.device)
    return out


def attend_prompt_plain(q: Tensor, where: Where, pages: LayerPages, tiles: Tensor, **options: Any) -> Tensor:
    """Define :func:`attend_prompt` in plain torch."""
    covered = torch.zeros(len(q), dtype=torch.bool, device=q.device)
    for first, count in tiles.tolist():
        covered[first : first + count] = True
    return attend_plain(q, where, pages, **options) * covered[:, None, None]


def attend_plain(
    q: Tensor,
    where: Where,
    pages: LayerPages,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    splits: int | None = None,
) -> Tensor:
    """Define :func:`attend` in plain torch, in float32."""
    keys, values = (part.float() for part in pages.read(q.dtype))
    table = where.table[where.slots.long()].long()  # (rows, pages of a sequence)
    keys, values = (part[table].transpose(2, 3).flatten(1, 2) for part in (keys, values))  # (rows, tokens, kv_heads, head)
    repeats = q.shape[1] // keys.shape[2]
    keys, values = (part.repeat_interleave(repeats, 2) for part in (keys, values))
    scores = torch.einsum("rhd,rthd->rht", q.float(), keys) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    age = where.positions[:, None] - torch.arange(keys.shape[1], device=q.device)
    hidden = (age < 0) | (age >= (window or 1 << 30))
    weights = scores.masked_fill(hidden[:, None], -torch.inf).softmax(-1)
    weights = weights.masked_fill((where.positions < 0)[:, None, None], 0.0)  # a row that sees nothing
    return torch.einsum("rht,rthd->rhd", weights, values).to(q.dtype)
