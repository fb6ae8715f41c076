"""Paged keys and values on CUDA: write the keys and values of new tokens, and attend to them.

Each kernel is defined by a function in plain torch (``*_plain``). A row at a negative position is padding: it writes nothing
and reads zeros. Attention has two kernels with the same result: :func:`attend` for single tokens, which splits the past of a
token over several thread blocks, and :func:`attend_prompt` for runs of consecutive tokens, which read their past together.

Pages hold 32 tokens (``kernels_cuda/pages.cuh``). ``int8`` pages have a float32 scale per token and head; ``int4`` pages have a
scale and a zero point per token and 32 channels.
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
    """The pages of one layer.

    Attributes:
        keys, values: (pages, kv_heads, 32, head), in the model's dtype or uint8 codes (int8); uint8 (..., head / 2) for int4.
        key_scales, value_scales: float32 (pages, kv_heads, 32) for int8; int32 (pages, kv_heads, 32, head / 32) for int4; None
            for float.
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
        """Allocate pages filled with zeros.

        Raises:
            KernelError: an unknown kind, or a head size that is not a multiple of 32 for int4.
        """
        if kind not in KINDS or (kind == "int4" and head % _GROUP):
            raise KernelError(
                f"keys and values stored as {kind!r} with {head} channels per head: want one of {', '.join(KINDS)}, and a "
                "multiple of 32 channels for int4"
            )
        shape = (pages, kv_heads, PAGE_TOKENS)
        stored = dtype if kind == "float" else torch.uint8
        codes = [torch.zeros((*shape, head // 2 if kind == "int4" else head), dtype=stored, device=device) for _ in range(2)]
        if kind == "float":
            return cls(codes[0], codes[1], None, None, kind)
        scales = (
            (shape, torch.float32) if kind == "int8" else ((*shape, head // _GROUP), torch.int32)
        )  # int4: the scale in the low half of a word, the zero point in the high half
        grids = [torch.zeros(scales[0], dtype=scales[1], device=device) for _ in range(2)]
        return cls(codes[0], codes[1], grids[0], grids[1], kind)

    @property
    def nbytes(self) -> int:
        """Bytes of all pages."""
        return sum(t.nbytes for t in self[:4] if t is not None)

    def read(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return keys and values as floats, (pages, kv_heads, 32, head)."""
        return self._decode(self.keys, self.key_scales, dtype), self._decode(self.values, self.value_scales, dtype)

    def _decode(self, codes: Tensor, scales: Tensor | None, dtype: torch.dtype) -> Tensor:
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
    """Rotary embedding of queries and keys, and the RMS norm per head before it.

    Attributes:
        cos, sin: float32 (positions, dim / 2); None for no rotation.
        dim: rotated channels.
        interleaved: whether the two channels of a pair are neighbours.
        q_gain, k_gain: float32 (head,), gains of the RMS norm; None for no norm.
        eps: epsilon of the norm.
    """

    cos: Tensor | None
    sin: Tensor | None
    dim: int = 0
    interleaved: bool = False
    q_gain: Tensor | None = None
    k_gain: Tensor | None = None
    eps: float = 1e-6


class Where(NamedTuple):
    """Places of rows, all int32.

    Attributes:
        positions: (rows,), position in the sequence; negative for a padding row.
        slots: (rows,), slot of the sequence.
        table: (slots, pages per sequence), the block tables.
    """

    positions: Tensor
    slots: Tensor
    table: Tensor


def append(qkv: Tensor, heads: int, rope: Rope, where: Where, pages: LayerPages) -> Tensor:
    """Normalize and rotate queries and keys, and write keys and values to ``pages``.

    Args:
        qkv: float16 or bfloat16 (rows, (heads + 2 kv_heads) * head), contiguous.
        heads: number of query heads.
        rope: see :class:`Rope`.
        where: see :class:`Where`; no two rows have the same place.
        pages: written to.

    Returns:
        The queries, (rows, heads, head) in the dtype of ``qkv``.
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
    """Compute :func:`append` in plain torch; this is its definition."""
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
    queries: Tensor = q.to(qkv.dtype)
    return queries


def places(where: Where) -> tuple[Tensor, Tensor]:
    """Return the page of every row, and its offset in the page."""
    position = where.positions.long()
    return where.table[where.slots.long(), position // PAGE_TOKENS].long(), position % PAGE_TOKENS


def quantize_heads(x: Tensor, kind: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return codes and scales of float32 heads (rows, kv_heads, head), as :class:`LayerPages` stores them."""
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
    """Return over how many thread blocks a sequence of up to ``tokens`` is split.

    The aim is two blocks per multiprocessor, with at least 64 tokens per block.
    """
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
    """Return the attention of each row to the tokens from 0 to its own position.

    Args:
        q: float16 or bfloat16 (rows, heads, head), contiguous; head is one of :data:`HEAD_SIZES`.
        where: see :class:`Where`.
        pages: keys and values, including those of the rows themselves.
        scale: factor of the scores ``q . k``.
        window: number of tokens that a row sees, its own included; None for all.
        softcap: scores become ``softcap * tanh(score / softcap)``; None for no cap.
        splits: number of thread blocks per sequence. The default depends on the batch; results are bitwise independent of the
            batch if this is fixed.

    Returns:
        (rows, heads, head) in the dtype of ``q``.

    Raises:
        KernelError: an unsupported head size, or heads that are not a multiple of the key/value heads.
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
    """Return the number of key/value heads.

    Raises:
        KernelError: the kernels do not support these heads.
    """
    (_, heads, head), kv_heads = q.shape, pages.keys.shape[1]
    if head not in HEAD_SIZES or heads % kv_heads:
        raise KernelError(
            f"attention with {heads} heads of {head} channels and {kv_heads} key/value heads: want {HEAD_SIZES} channels, "
            "and a multiple of the key/value heads"
        )
    return kv_heads


def tile_tokens(heads: int, kv_heads: int) -> int:
    """Return the largest number of tokens in a tile of :func:`attend_prompt`."""
    return _PROMPT_WARPS * (_HEAD_ROWS // min(_HEAD_ROWS, heads // kv_heads))


def cut(first: int, count: int, size: int) -> list[tuple[int, int]]:
    """Return tiles (first row, number of rows) of at most ``size`` rows that cover ``count`` rows from ``first`` on."""
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
    """Compute the same as :func:`attend`, for runs of consecutive tokens that read their past together.

    Args:
        q, where, pages, scale, window, softcap: as in :func:`attend`.
        tiles: int32 (tiles, 2), first row and number of rows, at most :func:`tile_tokens`. The rows of a tile are consecutive
            tokens of one sequence. Rows outside all tiles read zeros.
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
    """Compute :func:`attend_prompt` in plain torch; this is its definition."""
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
    """Compute :func:`attend` in plain torch in float32; this is its definition."""
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
    weights = weights.masked_fill((where.positions < 0)[:, None, None], 0.0)  # padding rows see nothing
    return torch.einsum("rht,rthd->rhd", weights, values).to(q.dtype)
