"""The weight layout of the CPU kernels: prepack a quantized or float weight, and restore it exactly.

The layout is described in ``csrc/linear.h``: blocks of 16 output rows, one row per 32-bit lane, and groups of columns padded to
a multiple of 8. Codes of up to 4 bits are stored in 4 bits, wider ones in 8. With 4 bits, the low half of each byte of a word
holds one of four consecutive columns and the high half one of the next four, so that one mask and one shift give operands for
the int8 dot product. Products with float and with int8 activations read the same copy.

8-bit codes can also be stored as two planes of four bits, ``c = 16 h + l`` (:func:`split`). Products are the same bit for bit,
and an approximation of the weight, ``(16 h + 8 - zero_point) * scale``, can be read at half the bytes for drafting.
"""

import ctypes
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from quantkit.dtypes import SCALE_DTYPES
from quantkit.errors import KernelError
from quantkit.kernels.build import DTYPE_CODES
from quantkit.numerics import grid
from quantkit.numerics.pack import pack, packed_words, unpack
from quantkit.qtensor import GridTensor
from quantkit.spec import QuantSpec

LANES: Final = 16
"""Rows per block."""

FLOAT32, BFLOAT16, U4, U8, PLANES, HIGH_PLANE = range(6)
"""Kinds of weight, numbered as in ``linear.h``."""

_COLUMNS: Final = {FLOAT32: 1, BFLOAT16: 2, U4: 8, U8: 4}  # per 32-bit word
_MIDDLE: Final = 8  # mean of what the low plane can add
_PADDING: Final = 8
_ROWS: Final = 256 * LANES


class LinearStruct(ctypes.Structure):
    """``qk::Linear`` of ``csrc/linear.h``. It points into tensors without keeping them alive."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("codes", "scales", "zeros", "bias")),
        *((name, ctypes.c_int64) for name in ("rows", "columns", "group")),
        *((name, ctypes.c_int32) for name in ("kind", "zero_code", "scale_dtype")),
    )


class Prepacked(NamedTuple):
    """A weight (N, K) in the layout.

    Attributes:
        codes: int32 (blocks, groups, words per group, 16); for planes (2, blocks, groups, words per group, 16), high and low.
        scale: float16, bfloat16 or float32 (blocks, groups, 16); None for float weights.
        zero: uint8 zero points of the scale's shape; None if all are ``zero_code``.
        rows: N; the last block may contain padding.
        group: input channels per scale; K for float weights.
        kind: one of :data:`FLOAT32`, :data:`BFLOAT16`, :data:`U4`, :data:`U8`, :data:`PLANES` and :data:`HIGH_PLANE`; the last
            one is planes of which only the high one is read.
        zero_code: zero point of a symmetric grid; 0 for float weights.
    """

    codes: Tensor
    scale: Tensor | None
    zero: Tensor | None
    rows: int
    group: int
    kind: int
    zero_code: int

    @property
    def columns(self) -> int:
        """K, the number of input channels."""
        return self.codes.shape[-3] * self.group

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors."""
        return sum(tensor.nbytes for tensor in (self.codes, self.scale, self.zero) if tensor is not None)

    def moved(self, copy: Callable[[Tensor], Tensor]) -> "Prepacked":
        """Return the same weight with every tensor replaced by ``copy(tensor)``."""
        tensors: dict[str, Any] = {name: copy(value) for name, value in self._asdict().items() if isinstance(value, Tensor)}
        return self._replace(**tensors)

    def struct(self, bias: Tensor | None = None) -> LinearStruct:
        """Return the C struct of this weight and an optional float32 ``bias`` (N,); keep both alive while it is used."""
        return LinearStruct(
            self.codes.data_ptr(),
            None if self.scale is None else self.scale.data_ptr(),
            None if self.zero is None else self.zero.data_ptr(),
            None if bias is None else bias.data_ptr(),
            self.rows,
            self.columns,
            self.group,
            self.kind,
            self.zero_code,
            0 if self.scale is None else DTYPE_CODES[self.scale.dtype],
        )


def stored_bits(spec: QuantSpec) -> int:
    """Return the number of bits in which the layout stores a code of an integer grid."""
    return 4 if spec.bits <= 4 else 8


def prepack(qtensor: GridTensor) -> Prepacked:
    """Convert a quantized weight (N, K) to the layout, in new memory."""
    spec, (rows, columns) = qtensor.spec, qtensor.shape
    block_rows, group = grid.block_size(spec, qtensor.shape)
    groups, bits = columns // group, stored_bits(spec)
    kind = U4 if bits == 4 else U8
    if bits == spec.bits and group % _PADDING == 0:
        words = qtensor.packed.view(rows, groups, -1)
    else:
        words = pack(F.pad(qtensor.codes().view(rows, groups, group), (0, -group % _PADDING)), bits)
    codes = _interleave(_lanes(words)) if kind == U4 else _lanes(words)
    zero = None if qtensor.zero_point is None else _per_lane(qtensor.zero_point, block_rows)
    return Prepacked(codes, _per_lane(qtensor.scale, block_rows), zero, rows, group, kind, grid.zero_code(spec))


def prepack_float(weight: Tensor, empty: Callable[[Sequence[int], torch.dtype], Tensor] | None = None) -> Prepacked:
    """Convert a float weight to the layout.

    Args:
        weight: float32 or bfloat16 (N, K).
        empty: allocates the result, ``empty(shape, dtype)``; None for ``torch.empty``.

    Raises:
        KernelError: another dtype or number of dimensions.
    """
    if weight.dim() != 2 or weight.dtype not in (torch.float32, torch.bfloat16):
        raise KernelError(f"prepack_float: weight is {weight.dtype} {tuple(weight.shape)}; want float32 or bfloat16 (N, K)")
    rows, columns = weight.shape
    kind, missing = FLOAT32 if weight.dtype == torch.float32 else BFLOAT16, -columns % _PADDING
    shape = (-(-rows // LANES), 1, (columns + missing) // _COLUMNS[kind], LANES)
    codes = torch.empty(shape, dtype=torch.int32) if empty is None else empty(shape, torch.int32)
    for start in range(0, rows, _ROWS):  # in pieces, because a temporary copy of a whole output head would be large
        part = weight.detach()[start : start + _ROWS]
        padded = (F.pad(part, (0, missing)) if missing else part).contiguous()
        codes[start // LANES : (start + _ROWS) // LANES] = _lanes(padded.view(torch.int32).unsqueeze(1))
    return Prepacked(codes, None, None, rows, columns, kind, 0)


def split(state: Prepacked) -> Prepacked:
    """Return 8-bit codes as two planes of 4 bits, sharing scales and zero points; other kinds are returned unchanged."""
    if state.kind != U8:
        return state
    pairs = state.codes.unflatten(2, (-1, 2))  # (blocks, groups, words / 2, 2, 16): columns 0 to 3, and 4 to 7
    first, second = pairs[:, :, :, 0], pairs[:, :, :, 1]
    planes = torch.empty((2, *first.shape), dtype=torch.int32)
    planes[0] = ((first >> 4) & 0x0F0F0F0F) | (second & ~0x0F0F0F0F)
    planes[1] = (first & 0x0F0F0F0F) | ((second & 0x0F0F0F0F) << 4)
    return state._replace(codes=planes, kind=PLANES)


def join(state: Prepacked) -> Prepacked:
    """Reverse :func:`split`. For :data:`HIGH_PLANE`, return codes ``16 h``; the missing 8 belongs to the zero point."""
    if state.kind not in (PLANES, HIGH_PLANE):
        return state
    high, low = state.codes
    words = [(high & 0x0F0F0F0F) << 4, high & ~0x0F0F0F0F]
    if state.kind == PLANES:
        words = [words[0] | (low & 0x0F0F0F0F), words[1] | ((low >> 4) & 0x0F0F0F0F)]
    return state._replace(codes=torch.stack(words, 3).flatten(2, 3), kind=U8)


def restore(state: Prepacked, spec: QuantSpec) -> GridTensor:
    """Return the quantized weight that :func:`prepack` was given, bit for bit.

    Args:
        state: the prepacked weight.
        spec: the grid of the quantized weight.
    """
    state = join(state)
    rows, columns, group = state.rows, state.columns, state.group
    block_rows, _ = grid.block_size(spec, (rows, columns))
    bits = 32 // _COLUMNS[state.kind]
    words = _rows(_deinterleave(state.codes) if state.kind == U4 else state.codes, rows)  # (rows, groups, words)
    if bits == spec.bits and group % _PADDING == 0:
        packed = words.reshape(rows, packed_words(columns, bits))
    else:
        codes = unpack(words, bits, words.shape[-1] * 32 // bits)[..., :group]
        packed = pack(codes.reshape(rows, columns), spec.bits)
    assert state.scale is not None
    scale, zero = (None if t is None else _rows(t.unsqueeze(2), rows).squeeze(2) for t in (state.scale, state.zero))
    assert scale is not None
    assert scale.dtype == SCALE_DTYPES[spec.scale_dtype]
    scale = scale[::block_rows].contiguous()
    return GridTensor(packed, scale, None if zero is None else zero[::block_rows].contiguous(), spec, (rows, columns))


def dequantize(
    codes: Tensor, scale: Tensor | None, zero: Tensor | None, rows: int, group: int, kind: int, zero_code: int
) -> Tensor:
    """Return the float32 weight (N, K) of the fields of a :class:`Prepacked`; this defines the layout."""
    draft = kind == HIGH_PLANE
    codes, *_, kind, zero_code = join(Prepacked(codes, scale, zero, rows, group, kind, zero_code))
    words = _rows(_deinterleave(codes) if kind == U4 else codes, rows)  # (N, groups, words)
    if scale is None:
        dtype = torch.float32 if kind == FLOAT32 else torch.bfloat16
        return words.flatten(1).view(dtype)[:, :group].float()
    bits = 32 // _COLUMNS[kind]
    values = unpack(words, bits, words.shape[-1] * 32 // bits)[..., :group].float()
    offset: Tensor | int = zero_code if zero is None else _rows(zero.unsqueeze(2), rows).float()
    if draft:
        offset = offset - _MIDDLE
    return ((values - offset) * _rows(scale.unsqueeze(2), rows).float()).flatten(1)


def _per_lane(values: Tensor, block_rows: int) -> Tensor:
    """Expand one value per block of the grid (row blocks, groups) to (blocks, groups, 16)."""
    per_row = values if block_rows == 1 else values.repeat_interleave(block_rows, 0)
    return _lanes(per_row.unsqueeze(-1)).squeeze(-2)


def _lanes(values: Tensor) -> Tensor:
    """Rearrange (rows, groups, n) to (blocks, groups, n, 16), with zeros for missing rows of the last block; always a copy."""
    missing = -values.shape[0] % LANES
    whole = F.pad(values, (0, 0, 0, 0, 0, missing)) if missing else values  # F.pad copies even without padding
    return whole.view(-1, LANES, *values.shape[1:]).permute(0, 2, 3, 1).clone(memory_format=torch.contiguous_format)


def _rows(values: Tensor, rows: int) -> Tensor:
    """Rearrange (blocks, groups, n, 16) back to (rows, groups, n)."""
    return values.permute(0, 3, 1, 2).flatten(0, 1)[:rows].contiguous()


def _interleave(words: Tensor) -> Tensor:
    """Reorder the eight 4-bit codes of a word: the first four to the low halves of the bytes, the others to the high halves."""
    return _spread(words & 0xFFFF) | (_spread((words >> 16) & 0xFFFF) << 4)


def _deinterleave(words: Tensor) -> Tensor:
    return _gather(words & 0x0F0F0F0F) | (_gather((words >> 4) & 0x0F0F0F0F) << 16)


def _spread(halves: Tensor) -> Tensor:
    """Move four 4-bit codes in 16 bits to the low halves of four bytes."""
    halves = (halves | (halves << 8)) & 0x00FF00FF
    return (halves | (halves << 4)) & 0x0F0F0F0F


def _gather(bytes_: Tensor) -> Tensor:
    bytes_ = (bytes_ | (bytes_ >> 4)) & 0x00FF00FF
    return (bytes_ | (bytes_ >> 8)) & 0xFFFF
