"""The weight layout of the CUDA kernels: codes in the order in which tensor cores read them. It can be reversed exactly.

``kernels_cuda/unpack.cuh`` describes it: tiles of 64 rows, steps of 64 columns, and in each step 16 bytes per lane and 16-row
product. The same bytes are used for few tokens (products read them directly) and for many (they are expanded slice by slice).
2- and 3-bit codes are stored in 4 bits, 5- to 7-bit and fp8 codes in 8. Rows and columns are padded to whole tiles and steps.
"""

from typing import Final, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from quantkit.dtypes import SCALE_DTYPES, table
from quantkit.numerics import grid
from quantkit.qtensor import GridTensor
from quantkit.spec import QuantSpec

TILE_ROWS: Final = 64
STEP: Final = 64

_CODES = {  # from (tile, part, row half, g, step, half, t, s, column pair, odd) to the order in memory, by bits
    4: (0, 4, 1, 3, 6, 5, 7, 9, 8, 2),
    8: (0, 4, 1, 5, 3, 6, 7, 2, 8, 9),
}
_ROWS, _COLUMNS = (4, 2, 8), (2, 4, 2, 2, 2)  # sizes of the axes that make a tile's rows, and a step's columns
_GRID = (0, 4, 3, 1, 2)  # from (tile, part, row half, g, group) to (tile, group, g, part, row half)


class Fragments(NamedTuple):
    """A weight (N, K), or a stack (experts, N, K), in the layout.

    Attributes:
        codes: uint8 (experts, bytes), whole tiles and steps.
        scale: float16 or bfloat16 (experts, tiles, groups, 8, 4, 2).
        zero: uint8 zero points of the scale's shape; None if all are ``zero_code``.
        rows, columns: N and K.
        group: input channels per scale.
        bits: bits of a stored code, 4 or 8.
        zero_code: zero point of a symmetric grid; 0 for fp8.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    rows: int
    columns: int
    group: int
    bits: int
    zero_code: int

    @property
    def experts(self) -> int:
        """Number of matrices in the stack; 1 for a plain weight."""
        return self.codes.shape[0]

    @property
    def tiles(self) -> int:
        """Number of tiles of 64 rows."""
        return -(-self.rows // TILE_ROWS)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors."""
        return sum(tensor.nbytes for tensor in (self.codes, self.scale, self.zero) if tensor is not None)


def prepack(qtensor: GridTensor, interleave: bool = False) -> Fragments:
    """Convert a quantized weight to the layout, on its own device and in new memory.

    Args:
        qtensor: (N, K) or (experts, N, K).
        interleave: the weight is [gate | up] with an even N, and its rows are reordered by :func:`interleave_halves`, so that
            the thread block that computes a row of the gate also computes the corresponding row of up.
    """
    spec, (rows, columns) = qtensor.spec, qtensor.shape[-2:]
    block_rows, group = grid.block_size(spec, qtensor.shape)
    bits = 4 if spec.bits <= 4 else 8
    codes = qtensor.codes().reshape(-1, rows, columns)
    if interleave:
        codes = interleave_halves(codes, 1)
    zero_code = grid.zero_code(spec) if spec.is_integer else 0
    scale, zero = (
        None if values is None else _lay_grid(values, block_rows, rows, interleave)
        for values in (qtensor.scale, qtensor.zero_point)
    )
    assert scale is not None
    laid = torch.stack([_lay_codes(part, bits) for part in codes])
    return Fragments(laid, scale, zero, rows, columns, group, bits, zero_code)


def interleave_halves(values: Tensor, axis: int = 0) -> Tensor:
    """Return [gate | up] along ``axis`` with alternating rows of gate and up: rows 0, N/2, 1, N/2 + 1, and so on."""
    pairs: Tensor = values.unflatten(axis, (2, -1))
    return pairs.transpose(axis, axis + 1).flatten(axis, axis + 1)


def restore(weight: Fragments, spec: QuantSpec, expert: int | None = None) -> GridTensor:
    """Return the quantized weight that :func:`prepack` was given, bit for bit.

    Args:
        weight: the prepacked weight, without ``interleave``.
        spec: the grid of the quantized weight.
        expert: index of one matrix of a stack; None for the whole stack.
    """
    block_rows, _ = grid.block_size(spec, (weight.rows, weight.columns))
    chosen = list(range(weight.experts)) if expert is None else [expert]
    parts: list[Tensor | None] = [torch.stack([_read_codes(weight, one) for one in chosen])]
    for laid in (weight.scale, weight.zero):
        rows = None if laid is None else _read_grid(laid[chosen], weight.rows)
        parts.append(None if rows is None else rows[:, ::block_rows].contiguous())
    if len(chosen) == 1:
        parts = [None if part is None else part[0] for part in parts]
    codes, scale, zero = parts
    assert codes is not None
    assert scale is not None
    assert scale.dtype == SCALE_DTYPES[spec.scale_dtype]
    return GridTensor.from_codes(codes, scale, zero, spec)


def dequantize(weight: Fragments, fp8: bool = False) -> Tensor:
    """Return the float32 weight (experts, N, K); this defines the layout."""
    codes = torch.stack([_read_codes(weight, part) for part in range(weight.experts)])
    scale = _read_grid(weight.scale, weight.rows).float().repeat_interleave(weight.group, -1)
    if fp8:
        return table("fp8_e4m3")[0].to(codes.device)[codes.int()] * scale
    zero = weight.zero_code if weight.zero is None else _read_grid(weight.zero, weight.rows).float()
    if isinstance(zero, Tensor):
        zero = zero.repeat_interleave(weight.group, -1)
    return (codes.float() - zero) * scale


def _lay_codes(codes: Tensor, bits: int) -> Tensor:
    rows, columns = codes.shape
    padded = F.pad(codes, (0, -columns % STEP, 0, -rows % TILE_ROWS))
    ordered = padded.view(-1, *_ROWS, padded.shape[1] // STEP, *_COLUMNS).permute(_CODES[bits]).reshape(-1)
    return ordered if bits == 8 else ordered[0::2] | (ordered[1::2] << 4)


def _read_codes(weight: Fragments, expert: int) -> Tensor:
    laid = weight.codes[expert]
    if weight.bits == 4:
        laid = torch.stack([laid & 15, laid >> 4], -1).flatten()
    steps = -(-weight.columns // STEP)
    sizes = (weight.tiles, *_ROWS, steps, *_COLUMNS)
    order = _CODES[weight.bits]
    view = laid.view([sizes[axis] for axis in order]).permute([order.index(axis) for axis in range(len(order))])
    return view.reshape(weight.tiles * TILE_ROWS, steps * STEP)[: weight.rows, : weight.columns].contiguous()


def _lay_grid(values: Tensor, block_rows: int, rows: int, interleave: bool) -> Tensor:
    """Convert scales or zero points (..., row blocks, groups) to (experts, tiles, groups, 8, 4, 2)."""
    values = values.reshape(-1, *values.shape[-2:]).repeat_interleave(block_rows, 1)
    if interleave:
        values = interleave_halves(values, 1)
    padded = F.pad(values, (0, 0, 0, -rows % TILE_ROWS))
    return torch.stack([part.view(-1, 4, 2, 8, part.shape[-1]).permute(_GRID).contiguous() for part in padded])


def _read_grid(values: Tensor, rows: int) -> Tensor:
    """Convert (experts, tiles, groups, 8, 4, 2) back to one value per row, (experts, rows, groups)."""
    inverse = [0, *(_GRID.index(axis) + 1 for axis in range(5))]
    return values.permute(inverse).flatten(1, 4)[:, :rows].contiguous()
