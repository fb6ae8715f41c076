"""The codec of ``gptq``: what AutoGPTQ began, and GPTQModel, AutoRound, vLLM and transformers read.

Tensors of a weight (out, in) with codes of 2, 3, 4 or 8 bits and ``groups`` groups of input channels:

- ``qweight`` int32 (in * bits / 32, out): the codes of one output channel stand in one *column*, one after the other, low bits
  first, across words where 32 is no multiple of ``bits``;
- ``qzeros`` int32 (groups, out * bits / 32): the zero points of one group in a row, packed likewise;
- ``scales`` (groups, out), in the checkpoint's float dtype;
- ``g_idx`` int32 (in,): the group of every input channel. It may be missing.

``w = (code - zero point) * scale``. The two versions differ in one thing: ``gptq`` (v1) stores zero points less one, and its
readers add the one again; ``gptq_v2`` stores them as they are. A zero point of 0 has no place in v1: some writers let it borrow
from the next field, which readers do not undo, so a stored -1 is refused. Symmetric grids store their middle code likewise.

With ``desc_act`` groups consist of channels that were quantized one after the other, in the order of their importance. Such a
weight is read as a grid with a scale of its own for every number, which is exact and takes much memory.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.dtypes import SCALE_DTYPES
from quantkit.errors import FormatError
from quantkit.formats.base import check_layout
from quantkit.formats.containers.base import Layout
from quantkit.numerics import grid
from quantkit.numerics.pack import pack, unpack
from quantkit.qtensor import GridTensor
from quantkit.spec import QuantSpec

BITS = (2, 3, 4, 8)
"""Widths that have a layout all readers agree on."""


@dataclass(frozen=True, slots=True)
class GptqCodec:
    """The codec.

    Attributes:
        version: 1 or 2.
        indexed: whether there is a ``g_idx``.
        permuted: size of a group where ``g_idx`` does not simply count (-1: all channels); such weights are only read.
    """

    version: int = 1
    indexed: bool = True
    permuted: int | None = None

    def layout(self, spec: QuantSpec, shape: tuple[int, ...]) -> Layout:
        """See :class:`quantkit.formats.base.Codec`."""
        if reason := rejects(spec, shape):
            raise FormatError(reason)
        out, columns = matrix(shape)
        groups = columns // self._group(spec, shape)
        layout: Layout = {
            "qweight": (torch.int32, (columns * spec.bits // 32, out)),
            "qzeros": (torch.int32, (groups, out * spec.bits // 32)),
            "scales": (SCALE_DTYPES[spec.scale_dtype], (groups, out)),
        }
        return {**layout, "g_idx": (torch.int32, (columns,))} if self.indexed else layout

    def encode(self, qtensor: GridTensor) -> dict[str, Tensor]:
        """See :class:`quantkit.formats.base.Codec`."""
        spec, shape = qtensor.spec, qtensor.shape
        self.layout(spec, shape)
        if self.permuted is not None or (self.version == 1 and not spec.symmetric):
            raise FormatError(f"{spec.describe()}: gptq stores zero points less one, so 0 has no place in it; use gptq-v2")
        zero = torch.full(qtensor.scale.shape, grid.zero_code(spec), dtype=torch.uint8)
        if qtensor.zero_point is not None:
            zero = qtensor.zero_point
        tensors = {
            "qweight": qtensor.packed.T.contiguous(),
            "qzeros": pack((zero - (2 - self.version)).T.contiguous(), spec.bits),
            "scales": qtensor.scale.T.contiguous(),
        }
        return {**tensors, "g_idx": _counted(spec, shape)} if self.indexed else tensors

    def decode(self, tensors: Mapping[str, Tensor], spec: QuantSpec, shape: tuple[int, ...]) -> GridTensor:
        """See :class:`quantkit.formats.base.Codec`."""
        check_layout(tensors, self.layout(spec, shape))
        packed, scale = tensors["qweight"].T.contiguous(), tensors["scales"].T.contiguous()
        zero = self._zero_points(tensors["qzeros"], spec, shape)
        if self.permuted is not None:
            index = tensors["g_idx"].long()
            return GridTensor(packed, scale[:, index], None if zero is None else zero[:, index], spec, shape)
        if self.indexed and not torch.equal(tensors["g_idx"], _counted(spec, shape)):
            raise FormatError("g_idx does not count groups of group_size channels, though desc_act is false")
        return GridTensor(packed, scale, zero, spec, shape)

    def _group(self, spec: QuantSpec, shape: tuple[int, ...]) -> int:
        if self.permuted is None:
            return grid.block_size(spec, shape)[1]
        return shape[-1] if self.permuted == -1 else self.permuted

    def _zero_points(self, packed: Tensor, spec: QuantSpec, shape: tuple[int, ...]) -> Tensor | None:
        """Return the zero points (out, groups); None for a symmetric grid, having checked that they are its middle."""
        stored = unpack(packed, spec.bits, shape[0]).T.contiguous()
        top = 2**spec.bits - 1
        less = 2 - self.version
        if spec.symmetric:
            wanted = grid.zero_code(spec) - less
            if not bool((stored == wanted).all()):
                other = bool((stored == wanted + 2 * less - 1).all())
                say = f"; they are those of {('gptq', 'gptq_v2')[less]}: correct checkpoint_format" if other else ""
                raise FormatError(f"qzeros are not all {wanted}, as symmetric weights want them{say}")
            return None
        if less and bool((stored == top).any()):
            count = int((stored == top).sum())
            raise FormatError(
                f"qzeros: {count} of {stored.numel()} stored zero points are -1, which checkpoint_format gptq cannot mean; "
                "quantize again as gptq_v2"
            )
        return stored + less


def rejects(spec: QuantSpec, shape: tuple[int, ...]) -> str | None:
    """Say why a weight cannot be laid out; None if it can."""
    if reason := spec.rejects(shape):
        return reason
    if not spec.is_integer or spec.bits not in BITS or spec.block[0] != 1 or spec.offset:
        return f"gptq stores 2, 3, 4 and 8-bit integers per group or channel, not {spec.describe()}; use format native"
    for axis, size in (("in", shape[-1]), ("out", shape[-2])):
        if size * spec.bits % 32 or (spec.bits == 3 and size % 32):
            return f"{axis}={size}: {spec.bits}-bit codes of it do not fill whole words of 32 bits; use format native"
    return None


def matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    """Return the shape of a matrix.

    Raises:
        FormatError: it is a stack of them.
    """
    if len(shape) != 2:
        raise FormatError(f"this format stores (out, in) weights, not {shape}; encode experts one by one, or use native")
    return shape[0], shape[1]


def order_fault(index: Tensor, columns: int, group: int) -> str | None:
    """Say why a ``g_idx`` cannot be one; None for one whose groups are all of ``group`` channels."""
    size = columns if group == -1 else group
    groups = columns // size if size and columns % size == 0 else 0
    if index.dtype != torch.int32 or tuple(index.shape) != (columns,) or groups < 1:
        return f"g_idx: {index.dtype} {tuple(index.shape)}, want int32 {(columns,)} for groups of {size}"
    if bool((index < 0).any()) or bool((index >= groups).any()):
        return f"g_idx names groups {int(index.min())} to {int(index.max())}, want 0 to {groups - 1}"
    counts = torch.bincount(index.long(), minlength=groups)
    if bool((counts != size).any()):
        odd = int((counts != size).nonzero()[0])
        return f"g_idx gives group {odd} {int(counts[odd])} input channels, want {size}"
    return None


def _counted(spec: QuantSpec, shape: tuple[int, ...]) -> Tensor:
    """Return the g_idx (in,) of groups that follow each other."""
    return torch.arange(shape[1], dtype=torch.int32) // grid.block_size(spec, shape)[1]


def counts_up(index: Tensor, group: int) -> bool:
    """Return whether a g_idx simply counts groups of ``group`` channels (-1: all)."""
    size = len(index) if group == -1 else group
    return torch.equal(index.long(), torch.arange(len(index)) // size)
