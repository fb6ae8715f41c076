"""The codec of ``mlx``: the affine layout of MLX, which mlx-lm and LM Studio read.

Tensors of a weight (out, in), 2, 3, 4, 5, 6 or 8 bits, groups of 32, 64 or 128 input channels:

- ``weight`` uint32 (out, in * bits / 32): a dense stream of codes, low bits first;
- ``scales``, ``biases`` (out, in / group): ``w = code * scale + bias``, both of one dtype, which readers compute in.

MLX itself chooses scale and bias and rounds both, so its bias is no whole number of scales: such a weight is read as a grid
with an offset. Ours is ``-zero_point * scale``. On a symmetric grid that is a power of two times the scale, exact in every
dtype. A zero point makes the product up to 8 bits longer than the scale, so that it is exact only in float32: scales of float16
or bfloat16 and their biases are then both stored as float32, which makes MLX compute in it; float32 scales would need a longer
dtype.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.dtypes import SCALE_DTYPES
from quantkit.errors import FormatError
from quantkit.formats.base import check_layout
from quantkit.formats.codecs.gptq import matrix
from quantkit.formats.containers.base import Layout
from quantkit.numerics import grid
from quantkit.numerics.offsets import offsets, zero_points
from quantkit.qtensor import GridTensor
from quantkit.spec import QuantSpec

BITS, GROUPS = (2, 3, 4, 5, 6, 8), (32, 64, 128)
WIDE = torch.float32
"""Dtype of scales and biases where there are zero points."""


@dataclass(frozen=True, slots=True)
class MlxCodec:
    """The codec; ``wide`` says that a symmetric grid has scales of :data:`WIDE` in the file, too."""

    wide: bool = False

    def layout(self, spec: QuantSpec, shape: tuple[int, ...]) -> Layout:
        """See :class:`quantkit.formats.base.Codec`."""
        if reason := rejects(spec, shape):
            raise FormatError(reason)
        out, columns = matrix(shape)
        dtype = WIDE if self.wide or not (spec.symmetric or spec.offset) else SCALE_DTYPES[spec.scale_dtype]
        blocks = (out, columns // grid.block_size(spec, shape)[1])
        return {
            "weight": (torch.uint32, (out, columns * spec.bits // 32)),
            "scales": (dtype, blocks),
            "biases": (dtype, blocks),
        }

    def encode(self, qtensor: GridTensor) -> dict[str, Tensor]:
        """See :class:`quantkit.formats.base.Codec`."""
        spec = qtensor.spec
        dtype = self.layout(spec, qtensor.shape)["scales"][0]
        scale = qtensor.scale.to(dtype)
        zero = grid.zero_code(spec) if qtensor.zero_point is None else qtensor.zero_point
        bias = qtensor.zero_point if spec.offset else offsets(scale, zero)
        if bias is None:
            raise FormatError(f"{spec.describe()}: zero point times scale is not exact in {dtype}; use format native")
        return {
            "weight": qtensor.packed.contiguous().view(torch.uint32),
            "scales": scale.contiguous(),
            "biases": bias.contiguous(),
        }

    def decode(self, tensors: Mapping[str, Tensor], spec: QuantSpec, shape: tuple[int, ...]) -> GridTensor:
        """See :class:`quantkit.formats.base.Codec`."""
        check_layout(tensors, self.layout(spec, shape))
        packed = tensors["weight"].contiguous().view(torch.int32)
        scale, zero = tensors["scales"], tensors["biases"]
        if spec.offset:
            return GridTensor(packed, scale, zero, spec, shape)
        points = zero_points(scale, zero, spec.bits)
        if points is None or (spec.symmetric and bool((points != grid.zero_code(spec)).any())):
            raise FormatError(f"biases are not those of {spec.describe()}")
        return GridTensor(
            packed, scale.to(SCALE_DTYPES[spec.scale_dtype]), None if spec.symmetric else points.contiguous(), spec, shape
        )


def rejects(spec: QuantSpec, shape: tuple[int, ...]) -> str | None:
    """Say why a weight cannot be laid out; None if it can."""
    if reason := spec.rejects(shape):
        return reason
    if not spec.is_integer or spec.bits not in BITS or spec.block[0] != 1 or spec.group_size not in GROUPS:
        what = "2, 3, 4, 5, 6 and 8-bit integers in groups of 32, 64 or 128"
        return f"mlx stores {what}, not {spec.describe()}; append -g64 to the scheme, or use format native"
    if not spec.symmetric and not spec.offset and spec.scale_dtype == "float32":
        return "mlx stores zero points times scales, which float32 scales make inexact; use scale_dtype float16, or native"
    return None
