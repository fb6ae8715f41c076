"""The codecs of ``onnx``, what the operator ``com.microsoft.MatMulNBits`` reads, and of ``onnx-qdq``, what ONNX's own reads.

Tensors of a weight (out, in) in blocks of b input channels, n = in / b:

- ``codes`` uint8 (out, n, b * bits / 8): unsigned codes, low bits first;
- ``scales`` float32 (out, n): the operator wants them in the dtype of its inputs, which is float32. A scale of 16 bits is exact
  in it;
- ``zero_points`` uint8 (out, ceil(n * bits / 8)): codes, low bits first; absent for a symmetric grid, where readers take the
  middle code.

``w = (code - zero point) * scale``. b is a power of two from 16 on, bits are 2, 4 or 8.

``DequantizeLinear`` (ONNX 1.16, opset 21) has blocks along an axis, too, but signed numbers for a symmetric grid, and no
padding between the rows of zero points: (out, n) of 4 bits are ceil(out * n / 2) bytes. Its 2 bits need opset
25 and are not written.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from quantkit.dtypes import SCALE_DTYPES
from quantkit.errors import FormatError
from quantkit.formats.base import check_layout
from quantkit.formats.codecs.gptq import matrix
from quantkit.formats.containers.base import Layout
from quantkit.numerics.pack import pack, packed_words, unpack
from quantkit.qtensor import GridTensor
from quantkit.spec import QuantSpec

BITS, BLOCKS = (2, 4, 8), (16, 32, 64, 128, 256)
_SIGNS, _NOT_IN_QDQ = {4: 0x88, 8: 0x80}, 2


class MatMulNBits:
    """Codes, scales and zero points as the operator has them."""

    def layout(self, spec: QuantSpec, shape: tuple[int, ...]) -> Layout:
        """See :class:`quantkit.formats.base.Codec`."""
        if reason := rejects(spec, shape):
            raise FormatError(reason)
        out, columns = matrix(shape)
        blocks = columns // spec.group_size
        layout: Layout = {
            "codes": (torch.uint8, (out, blocks, spec.group_size * spec.bits // 8)),
            "scales": (torch.float32, (out, blocks)),
        }
        return layout if spec.symmetric else {**layout, "zero_points": (torch.uint8, (out, -(-blocks * spec.bits // 8)))}

    def encode(self, qtensor: GridTensor) -> dict[str, Tensor]:
        """See :class:`quantkit.formats.base.Codec`."""
        layout = self.layout(qtensor.spec, qtensor.shape)
        tensors = {
            "codes": qtensor.packed.contiguous().view(torch.uint8).reshape(layout["codes"][1]),
            "scales": qtensor.scale.float().contiguous(),
        }
        if qtensor.zero_point is not None:
            packed = pack(qtensor.zero_point.contiguous(), qtensor.spec.bits).view(torch.uint8)
            tensors["zero_points"] = packed[:, : layout["zero_points"][1][1]].contiguous()
        return tensors

    def decode(self, tensors: Mapping[str, Tensor], spec: QuantSpec, shape: tuple[int, ...]) -> GridTensor:
        """See :class:`quantkit.formats.base.Codec`."""
        check_layout(tensors, self.layout(spec, shape))
        stored = SCALE_DTYPES[spec.scale_dtype]
        scale = tensors["scales"].to(stored)
        if not torch.equal(scale.float(), tensors["scales"]):
            raise FormatError(f"scales are not numbers of {spec.scale_dtype}, as quantization_config says")
        packed = tensors["codes"].reshape(shape[0], -1).contiguous().view(torch.int32)
        zero = None
        if not spec.symmetric:
            blocks = shape[1] // spec.group_size
            words = torch.zeros(shape[0], 4 * packed_words(blocks, spec.bits), dtype=torch.uint8)
            words[:, : tensors["zero_points"].shape[1]] = tensors["zero_points"]
            zero = unpack(words.view(torch.int32), spec.bits, blocks).contiguous()
        return GridTensor(packed, scale, zero, spec, shape)


class DequantizeLinear:
    """Codes, scales and zero points as ONNX's operator has them: ``codes`` are signed where there are no zero points."""

    def layout(self, spec: QuantSpec, shape: tuple[int, ...]) -> Layout:
        """See :class:`quantkit.formats.base.Codec`."""
        if spec.is_integer and spec.bits == _NOT_IN_QDQ:
            raise FormatError("2-bit codes are not in DequantizeLinear of opset 21; use format onnx")
        layout = MatMulNBits().layout(spec, shape)
        if spec.symmetric:
            return layout
        count = math.prod(layout["scales"][1]) * spec.bits // 8
        if math.prod(layout["scales"][1]) * spec.bits % 8:
            raise FormatError(f"{math.prod(layout['scales'][1])} zero points of {spec.bits} bits do not fill whole bytes")
        return {**layout, "zero_points": (torch.uint8, (count,))}

    def encode(self, qtensor: GridTensor) -> dict[str, Tensor]:
        """See :class:`quantkit.formats.base.Codec`."""
        spec, layout = qtensor.spec, self.layout(qtensor.spec, qtensor.shape)
        tensors = MatMulNBits().encode(qtensor)
        if qtensor.zero_point is None:
            return {**tensors, "codes": tensors["codes"] ^ _SIGNS[spec.bits]}
        packed = pack(qtensor.zero_point.reshape(1, -1), spec.bits).view(torch.uint8)[0]
        return {**tensors, "zero_points": packed[: layout["zero_points"][1][0]].contiguous()}

    def decode(self, tensors: Mapping[str, Tensor], spec: QuantSpec, shape: tuple[int, ...]) -> GridTensor:
        """See :class:`quantkit.formats.base.Codec`."""
        check_layout(tensors, self.layout(spec, shape))
        if spec.symmetric:
            return MatMulNBits().decode({**tensors, "codes": tensors["codes"] ^ _SIGNS[spec.bits]}, spec, shape)
        blocks = shape[1] // spec.group_size
        words = torch.zeros(1, 4 * packed_words(shape[0] * blocks, spec.bits), dtype=torch.uint8)
        words[0, : len(tensors["zero_points"])] = tensors["zero_points"]
        zero = unpack(words.view(torch.int32), spec.bits, shape[0] * blocks).reshape(shape[0], blocks)
        rows = pack(zero, spec.bits).view(torch.uint8)[:, : -(-blocks * spec.bits // 8)]
        return MatMulNBits().decode({**tensors, "zero_points": rows.contiguous()}, spec, shape)


def rejects(spec: QuantSpec, shape: tuple[int, ...]) -> str | None:
    """Say why a weight cannot be laid out; None if it can."""
    if reason := spec.rejects(shape):
        return reason
    plain = spec.is_integer and not spec.offset and spec.blocks is None and spec.block[0] == 1
    if not plain or spec.bits not in BITS or spec.group_size not in BLOCKS:
        what = "2, 4 and 8-bit integers in groups of 16, 32, 64, 128 or 256"
        return f"onnx stores {what}, not {spec.describe()}; append -g32 to the scheme, or use format native"
    if shape[-1] * spec.bits % 32:
        return f"in={shape[-1]}: {spec.bits}-bit codes of it do not fill whole words of 32 bits; use format native"
    return None
