"""The codec of format ``native``: the parts of a GridTensor under their own names.

Tensors of a weight (..., out, in), where ``...`` is empty or the number of experts:

- ``packed`` int32 (..., out, ceil(in * bits / 32)), the layout of :mod:`quantkit.numerics.pack`;
- ``scale`` (..., out_blocks, in_blocks) in the spec's scale dtype;
- ``zero_point`` int32 (..., in_blocks, ceil(out_blocks * bits / 32)), the codes of the zero points of one column of
  blocks packed like weights; absent for symmetric grids. Where the grid has an offset, that, as the scales are;
- ``global_scale`` float32 (..., 1), where scales are FP8;
- ``input_scale`` (..., 1), where the grid of the inputs is static, in its scale dtype.

It has no limits: any block, any scale dtype, 3-D stacks.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.dtypes import SCALE_DTYPES
from quantkit.formats.base import Codec, check_layout
from quantkit.formats.containers.base import Layout
from quantkit.numerics import grid
from quantkit.numerics.pack import pack, packed_words, unpack
from quantkit.qtensor import GridTensor
from quantkit.spec import QuantSpec, Scheme


@dataclass(frozen=True, slots=True)
class NativeCodec:
    """Codes, scales and zero points under their own names; ``input_dtype`` is that of a static input scale, if there is one."""

    input_dtype: str | None = None

    def layout(self, spec: QuantSpec, shape: tuple[int, ...]) -> Layout:
        """See :class:`quantkit.formats.base.Codec`."""
        rows, cols = grid.block_size(spec, shape)
        lead, out_blocks, in_blocks = shape[:-2], shape[-2] // rows, shape[-1] // cols
        layout: Layout = {
            "packed": (torch.int32, (*shape[:-1], packed_words(shape[-1], spec.bits))),
            "scale": (SCALE_DTYPES[spec.scale_dtype], (*lead, out_blocks, in_blocks)),
        }
        if spec.offset:
            layout["zero_point"] = layout["scale"]
        elif not spec.symmetric:
            layout["zero_point"] = (torch.int32, (*lead, in_blocks, packed_words(out_blocks, spec.bits)))
        if spec.has_global_scale:
            layout["global_scale"] = (torch.float32, (*lead, 1))
        if self.input_dtype is not None:
            layout["input_scale"] = (SCALE_DTYPES[self.input_dtype], (*lead, 1))
        return layout

    def encode(self, qtensor: GridTensor) -> dict[str, Tensor]:
        """See :class:`quantkit.formats.base.Codec`."""
        tensors = {"packed": qtensor.packed.contiguous(), "scale": qtensor.scale.contiguous()}
        if qtensor.zero_point is not None:
            tensors["zero_point"] = (
                qtensor.zero_point.contiguous()
                if qtensor.spec.offset
                else pack(qtensor.zero_point.transpose(-1, -2).contiguous(), qtensor.spec.bits)
            )
        for name in ("global_scale", "input_scale"):
            if (value := getattr(qtensor, name)) is not None:
                tensors[name] = value.contiguous()
        return tensors

    def decode(self, tensors: Mapping[str, Tensor], spec: QuantSpec, shape: tuple[int, ...]) -> GridTensor:
        """See :class:`quantkit.formats.base.Codec`."""
        check_layout(tensors, self.layout(spec, shape))
        zero = tensors.get("zero_point")
        if zero is not None and not spec.offset:
            out_blocks = tensors["scale"].shape[-2]
            zero = unpack(zero, spec.bits, out_blocks).transpose(-1, -2).contiguous()
        single = {name: tensors.get(name) for name in ("global_scale", "input_scale")}
        return GridTensor(tensors["packed"], tensors["scale"], zero, spec, shape, **single)


def codec_of(scheme: Scheme) -> Codec:
    """Return the codec of a scheme: there is one, which is told whether there is an input scale."""
    return NativeCodec(scheme.activation.grid.scale_dtype if scheme.static and scheme.activation else None)
