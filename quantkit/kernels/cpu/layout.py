"""The weight layout of the CPU kernels: prepack a quantized or float weight, and restore it exactly.

The layout is described in ``csrc/linear.h``: blocks of 16 output rows, one row per 32-bit lane, and groups of columns padded to
a multiple of 8. Codes of up to 4 bits are stored in 4 bits, wider ones in 8. With 4 bits, the low half of each byte of a word
holds one of four consecutive columns and the high half one of the next four, so that one mask and one shift give operands for
the int8 dot product. Products with float and with int8 activations read the same copy.

Scales stay as they are stored: floats, powers of two (MXFP4), FP8 under a global scale (NVFP4), or the small integers of ggml's
blocks, which multiply a float16 of several groups. So does what is added to a group, ``w = number * scale + offset``: the
minimums of blocks, and grids whose zero point is no code.

8-bit codes can also be stored as two planes of four bits, ``c = 16 h + l`` (:func:`split`). Products are the same bit for bit,
and an approximation of the weight, ``(16 h + 8 - zero_point) * scale``, can be read at half the bytes for drafting.
"""

import ctypes
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from quantkit.dtypes import SCALE_DTYPES, table
from quantkit.errors import KernelError
from quantkit.kernels.build import DTYPE_CODES
from quantkit.kernels.cpu.tables import MIDDLE, InputsStruct, is_table, table_struct, whole_numbers
from quantkit.numerics import ggml, grid
from quantkit.numerics.ggml import Content
from quantkit.numerics.pack import pack, packed_words, unpack
from quantkit.qtensor import BlockTensor, GridTensor, QTensor, as_grid
from quantkit.spec import QuantSpec

LANES: Final = 16
"""Rows per block."""

FLOAT32, BFLOAT16, U4, U8, PLANES, HIGH_PLANE, T4, F8 = range(8)
"""Kinds of weight, numbered as in ``linear.h``."""

_COLUMNS: Final = {FLOAT32: 1, BFLOAT16: 2, U4: 8, U8: 4, T4: 8, F8: 4}  # per 32-bit word
_SCALE_TYPES: Final = {**DTYPE_CODES, torch.float8_e8m0fnu: 3, torch.float8_e4m3fn: 4, torch.int8: 5}
_MIDDLE: Final = 8  # mean of what the low plane can add
_PADDING: Final = 8
_ROWS: Final = 256 * LANES


class LinearStruct(ctypes.Structure):
    """``qk::Linear`` of ``csrc/linear.h``. It points into tensors without keeping them alive."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ["codes", "scales", "zeros", "offsets", "supers", "table", "inputs", "bias"]),
        *((name, ctypes.c_int64) for name in ("rows", "columns", "group", "super")),
        *((name, ctypes.c_int32) for name in ("kind", "zero_code", "scale_dtype")),
        ("factor", ctypes.c_float),
    )


class Prepacked(NamedTuple):
    """A weight (N, K) in the layout.

    Attributes:
        codes: int32 (blocks, groups, words per group, 16); for planes (2, blocks, groups, words per group, 16), high and low.
        scale: a float dtype, or int8 where there are ``supers``, (blocks, groups, 16); None for float weights.
        zero: uint8 zero points of the scale's shape; None if all are ``zero_code``.
        rows: N; the last block may contain padding.
        group: input channels per scale; K for float weights.
        kind: one of :data:`FLOAT32`, :data:`BFLOAT16`, :data:`U4`, :data:`U8`, :data:`PLANES`, :data:`HIGH_PLANE` (planes of
            which only the high one is read), :data:`T4` and :data:`F8`.
        zero_code: zero point of a symmetric grid, :data:`~quantkit.kernels.cpu.tables.MIDDLE` of tables, 0 for float weights.
        offset: what is added to a group, of the scale's dtype and shape; None for nothing.
        supers: float16 (1 or 2, blocks, groups / n, 16): what scales, and offsets, of n groups are multiples of; None for 1.
        global_scale: float32 (1,), what divides all scales; None for 1.
        numbers: name of the table's dtype, of T4; else empty.
    """

    codes: Tensor
    scale: Tensor | None
    zero: Tensor | None
    rows: int
    group: int
    kind: int
    zero_code: int
    offset: Tensor | None = None
    supers: Tensor | None = None
    global_scale: Tensor | None = None
    numbers: str = ""

    @property
    def columns(self) -> int:
        """K, the number of input channels."""
        return self.codes.shape[-3] * self.group

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors."""
        return sum(value.nbytes for value in self if isinstance(value, Tensor))

    def moved(self, copy: Callable[[Tensor], Tensor]) -> "Prepacked":
        """Return the same weight with every tensor replaced by ``copy(tensor)``."""
        tensors: dict[str, Any] = {name: copy(value) for name, value in self._asdict().items() if isinstance(value, Tensor)}
        return self._replace(**tensors)

    def struct(self, bias: Tensor | None = None, inputs: InputsStruct | None = None) -> LinearStruct:
        """Return the C struct of this weight, an optional float32 ``bias`` (N,) and how its inputs are rounded.

        Keep all of them alive while it is used.
        """
        parts = (self.codes, self.scale, self.zero, self.offset, self.supers)
        groups = 1 if self.supers is None else self.codes.shape[-3] // self.supers.shape[-2]
        return LinearStruct(
            *(None if part is None else part.data_ptr() for part in parts),
            ctypes.addressof(table_struct(self.numbers)) if self.numbers else None,
            None if inputs is None else ctypes.addressof(inputs),
            None if bias is None else bias.data_ptr(),
            self.rows,
            self.columns,
            self.group,
            groups.bit_length() - 1,
            self.kind,
            self.zero_code,
            0 if self.scale is None else _SCALE_TYPES[self.scale.dtype],
            1.0 if self.global_scale is None else 1 / float(self.global_scale),
        )


def stored_bits(spec: QuantSpec) -> int:
    """Return the number of bits in which the layout stores a code."""
    return 4 if spec.bits <= 4 else 8


def rejects(spec: QuantSpec, shape: tuple[int, int]) -> str | None:
    """Return why a weight (N, K) has no such layout; None if it has one."""
    if not (spec.is_integer or is_table(spec.dtype) or spec.dtype == "fp8_e4m3"):
        return f"codes are {spec.describe()}, want integers, a table of 16 numbers or fp8_e4m3"
    return f"the weight {shape} is empty" if 0 in shape else spec.rejects(shape)


def prepack(qtensor: QTensor) -> Prepacked:
    """Convert a quantized weight (N, K) to the layout, in new memory.

    Raises:
        KernelError: a code means NaN.
    """
    if isinstance(qtensor, BlockTensor):
        return _prepack_blocks(qtensor)
    return _prepack_grid(as_grid(qtensor))


def _kind(spec: QuantSpec) -> int:
    if spec.is_integer:
        return U4 if stored_bits(spec) == 4 else U8
    return T4 if spec.bits == 4 else F8


def _prepack_grid(qtensor: GridTensor) -> Prepacked:
    spec, (rows, columns) = qtensor.spec, qtensor.shape
    block_rows, group = grid.block_size(spec, qtensor.shape)
    groups, bits, kind = columns // group, stored_bits(spec), _kind(spec)
    if kind == F8 and bool((qtensor.codes() & 0x7F == 0x7F).any()):
        raise KernelError(f"a code of a weight {spec.describe()} {qtensor.shape} is NaN; QUANTKIT_KERNEL=reference runs it")
    if bits == spec.bits and group % _PADDING == 0:
        words = qtensor.packed.view(rows, groups, -1)
    else:
        words = pack(F.pad(qtensor.codes().view(rows, groups, group), (0, -group % _PADDING)), bits)
    codes = _interleave(_lanes(words)) if bits == 4 else _lanes(words)
    added = None if qtensor.zero_point is None else _per_lane(qtensor.zero_point, block_rows)
    zero, offset = (None, added) if spec.offset else (added, None)
    middle = (0 if spec.offset else grid.zero_code(spec)) if spec.is_integer else MIDDLE
    scale = _per_lane(qtensor.scale, block_rows)
    numbers = spec.dtype if kind == T4 else ""
    return Prepacked(codes, scale, zero, rows, group, kind, middle, offset, None, qtensor.global_scale, numbers)


def _prepack_blocks(qtensor: BlockTensor) -> Prepacked:
    kind, spec, rows = qtensor.kind, qtensor.spec, qtensor.shape[0]
    content = kind.unpack(qtensor.data.unflatten(-1, (-1, kind.nbytes)))
    words = pack(content.codes.reshape(rows, -1, kind.group), stored_bits(spec))
    codes = _interleave(_lanes(words)) if stored_bits(spec) == 4 else _lanes(words)
    scale, offset, supers = content.d, None if content.low is None else -content.low, None
    if content.scales is not None:
        supers = torch.stack([_per_lane(part, 1) for part in (content.d, content.low) if part is not None])
        scale = content.scales.flatten(1).to(torch.int8)
        offset = None if content.minimums is None else -content.minimums.flatten(1).to(torch.int8)
    middle = kind.zero if spec.is_integer else MIDDLE
    added = None if offset is None else _per_lane(offset, 1)
    numbers = "" if spec.is_integer else spec.dtype
    return Prepacked(codes, _per_lane(scale, 1), None, rows, kind.group, _kind(spec), middle, added, supers, None, numbers)


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


def restore(state: Prepacked, spec: QuantSpec) -> QTensor:
    """Return the quantized weight that :func:`prepack` was given, bit for bit.

    Args:
        state: the prepacked weight.
        spec: the grid of the quantized weight.
    """
    state = join(state)
    rows, columns, group = state.rows, state.columns, state.group
    bits = 32 // _COLUMNS[state.kind]
    words = _rows(_deinterleave(state.codes) if bits == 4 else state.codes, rows)  # (rows, groups, words)
    assert state.scale is not None
    scale, zero, offset = (None if t is None else _from_lanes(t, rows) for t in (state.scale, state.zero, state.offset))
    assert scale is not None
    if spec.blocks is not None:
        supers = [] if state.supers is None else [_from_lanes(part, rows) for part in state.supers]
        return _restore_blocks(unpack(words, bits, group), scale, offset, supers, spec)
    if bits == spec.bits and group % _PADDING == 0:
        packed = words.reshape(rows, packed_words(columns, bits))
    else:
        codes = unpack(words, bits, words.shape[-1] * 32 // bits)[..., :group]
        packed = pack(codes.reshape(rows, columns), spec.bits)
    block_rows, _ = grid.block_size(spec, (rows, columns))
    assert scale.dtype == SCALE_DTYPES[spec.scale_dtype]
    added = offset if spec.offset else zero
    scale, added = (None if t is None else t[::block_rows].contiguous() for t in (scale, added))
    assert scale is not None
    return GridTensor(packed, scale, added, spec, (rows, columns), state.global_scale)


def _restore_blocks(
    codes: Tensor, scale: Tensor, offset: Tensor | None, supers: Sequence[Tensor], spec: QuantSpec
) -> BlockTensor:
    """Return blocks of codes (N, groups, group), scales and offsets (N, groups) and what they are multiples of."""
    size = ggml.BLOCK_TYPES[str(spec.blocks)].size
    codes = codes.reshape(len(codes), -1, size)
    if not supers:
        return BlockTensor.from_content(Content(codes, scale, None, None if offset is None else -offset), spec)
    each = (*codes.shape[:2], -1)
    low, minimums = (None, None) if offset is None else (supers[1], -offset.short().view(each))
    return BlockTensor.from_content(Content(codes, supers[0], scale.short().view(each), low, minimums), spec)


def dequantize(*fields: Any, whole: bool = False) -> Tensor:
    """Return the float32 weight (N, K) of the fields of a :class:`Prepacked`; this defines the layout.

    With ``whole``, as int8 products see it: numbers of a table that are no multiples of one step are rounded to some.
    """
    given = Prepacked(*fields)
    state = join(given)
    rows, group, kind = state.rows, state.group, state.kind
    bits = 32 // _COLUMNS[kind]
    words = _rows(_deinterleave(state.codes) if bits == 4 else state.codes, rows)  # (N, groups, words)
    if state.scale is None:
        dtype = torch.float32 if kind == FLOAT32 else torch.bfloat16
        return words.flatten(1).view(dtype)[:, :group].float()
    codes = unpack(words, bits, words.shape[-1] * 32 // bits)[..., :group]
    if kind == T4:
        numbers, unit, _ = whole_numbers(state.numbers)
        values = (numbers * unit if whole else table(state.numbers)[0])[codes.int()]
    elif kind == F8:
        values = codes.view(torch.float8_e4m3fn).float()
    else:
        zero: Tensor | int = state.zero_code if state.zero is None else _from_lanes(state.zero, rows).float().unsqueeze(2)
        values = codes.float() - (zero - _MIDDLE if given.kind == HIGH_PLANE else zero)
    scale, offset = (None if t is None else _from_lanes(t, rows).float() for t in (state.scale, state.offset))
    assert scale is not None
    if state.supers is not None:
        over = [_from_lanes(part, rows).float().repeat_interleave(scale.shape[1] // part.shape[1], 1) for part in state.supers]
        scale, offset = scale * over[0], None if offset is None else offset * over[1]
    if state.global_scale is not None:
        scale = scale / state.global_scale
    values = values * scale.unsqueeze(2)
    return (values if offset is None else values + offset.unsqueeze(2)).flatten(1)


def _per_lane(values: Tensor, block_rows: int) -> Tensor:
    """Expand one value per block of the grid (row blocks, groups) to (blocks, groups, 16)."""
    if values.dtype in (torch.float8_e8m0fnu, torch.float8_e4m3fn):  # which torch can hardly move
        return _per_lane(values.view(torch.uint8), block_rows).view(values.dtype)
    per_row = values if block_rows == 1 else values.repeat_interleave(block_rows, 0)
    return _lanes(per_row.unsqueeze(-1)).squeeze(-2)


def _from_lanes(values: Tensor, rows: int) -> Tensor:
    """Rearrange (blocks, groups, 16) back to (rows, groups)."""
    if values.dtype in (torch.float8_e8m0fnu, torch.float8_e4m3fn):
        return _from_lanes(values.view(torch.uint8), rows).view(values.dtype)
    return _rows(values.unsqueeze(2), rows).squeeze(2)


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
