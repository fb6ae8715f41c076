"""Codecs of ``compressed-tensors``: one per way in which that format lays out a weight.

Their names are the format's own; :mod:`quantkit.formats.compressed_tensors` states the layouts and decides which is used when.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.dtypes import SCALE_DTYPES
from quantkit.errors import FormatError
from quantkit.formats.base import Codec, Layout, check_layout
from quantkit.numerics import grid
from quantkit.numerics.pack import pack, packed_words, unpack
from quantkit.qtensor import GridTensor
from quantkit.spec import QuantSpec


@dataclass(frozen=True, slots=True)
class PackQuantized:
    """Codec of ``pack-quantized``; ``padded`` is the layout of releases before 0.18, which is only read."""

    padded: bool = False

    def layout(self, spec: QuantSpec, shape: tuple[int, ...]) -> Layout:
        """See :class:`quantkit.formats.base.Codec`."""
        _, cols = grid.block_size(spec, shape)
        if len(shape) != 2:
            raise FormatError(
                f"compressed-tensors stores (out, in) weights, not {shape}; encode experts one by one, or use native"
            )
        out, columns = shape
        layout: Layout = {
            "weight_packed": (torch.int32, (out, self._words(columns, spec.bits))),
            "weight_scale": (SCALE_DTYPES[spec.scale_dtype], (out, columns // cols)),
            "weight_shape": (torch.int64, (2,)),
        }
        if not spec.symmetric:
            layout["weight_zero_point"] = (torch.int32, (self._words(out, spec.bits), columns // cols))
        return layout

    def encode(self, qtensor: GridTensor) -> dict[str, Tensor]:
        """See :class:`quantkit.formats.base.Codec`."""
        self.layout(qtensor.spec, qtensor.shape)
        tensors = {
            "weight_packed": qtensor.packed.contiguous(),
            "weight_scale": qtensor.scale.contiguous(),
            "weight_shape": torch.tensor(qtensor.shape, dtype=torch.int64),
        }
        if qtensor.zero_point is not None:
            tensors["weight_zero_point"] = pack(qtensor.zero_point.T.contiguous(), qtensor.spec.bits).T.contiguous()
        return tensors

    def decode(self, tensors: Mapping[str, Tensor], spec: QuantSpec, shape: tuple[int, ...]) -> GridTensor:
        """See :class:`quantkit.formats.base.Codec`."""
        check_layout(tensors, self.layout(spec, shape))
        if (stated := tuple(tensors["weight_shape"].tolist())) != shape:
            raise FormatError(f"weight_shape says {stated}, the model says {shape}")
        zero = None
        if not spec.symmetric:
            zero = self._unpack(tensors["weight_zero_point"].T.contiguous(), spec.bits, shape[0]).T.contiguous()
        packed = tensors["weight_packed"]
        if self.padded:
            packed = pack(self._unpack(packed, spec.bits, shape[1]), spec.bits)
        return GridTensor(packed, tensors["weight_scale"], zero, spec, shape)

    def _words(self, columns: int, bits: int) -> int:
        return -(-columns // (32 // bits)) if self.padded else packed_words(columns, bits)

    def _unpack(self, packed: Tensor, bits: int, columns: int) -> Tensor:
        if not self.padded:
            return unpack(packed, bits, columns)
        shifts = torch.arange(32 // bits, dtype=torch.int32) * bits
        codes = (packed.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)  # (rows, words, codes per word)
        return codes.flatten(-2)[..., :columns].to(torch.uint8)


class IntQuantized:
    """Codec of ``int-quantized``: one signed byte per weight, a scale per tensor, channel or group."""

    def layout(self, spec: QuantSpec, shape: tuple[int, ...]) -> Layout:
        """See :class:`quantkit.formats.base.Codec`."""
        if len(shape) != 2 or spec.bits != 8:
            raise FormatError(f"int-quantized stores 8-bit (out, in) weights, not {spec.describe()} {shape}")
        scale_shape = (1,) if spec.strategy == "tensor" else (shape[0], shape[1] // grid.block_size(spec, shape)[1])
        layout: Layout = {"weight": (torch.int8, shape), "weight_scale": (SCALE_DTYPES[spec.scale_dtype], scale_shape)}
        if not spec.symmetric:
            layout["weight_zero_point"] = (torch.int8, scale_shape)
        return layout

    def encode(self, qtensor: GridTensor) -> dict[str, Tensor]:
        """See :class:`quantkit.formats.base.Codec`."""
        layout = self.layout(qtensor.spec, qtensor.shape)
        scale_shape = layout["weight_scale"][1]
        tensors = {"weight": _flip_sign(qtensor.codes()).view(torch.int8), "weight_scale": qtensor.scale.reshape(scale_shape)}
        if qtensor.zero_point is not None:
            tensors["weight_zero_point"] = _flip_sign(qtensor.zero_point).view(torch.int8).reshape(scale_shape)
        return {suffix: tensor.contiguous() for suffix, tensor in tensors.items()}

    def decode(self, tensors: Mapping[str, Tensor], spec: QuantSpec, shape: tuple[int, ...]) -> GridTensor:
        """See :class:`quantkit.formats.base.Codec`."""
        check_layout(tensors, self.layout(spec, shape))
        scale = tensors["weight_scale"]
        scale = scale.reshape(-1, scale.shape[-1])
        zero = None if spec.symmetric else _flip_sign(tensors["weight_zero_point"].view(torch.uint8)).reshape(scale.shape)
        codes = _flip_sign(tensors["weight"].contiguous().view(torch.uint8))
        return GridTensor.from_codes(codes, scale, zero, spec)


class FloatQuantized:
    """Codec of ``float-quantized``: one FP8 number per weight."""

    def layout(self, spec: QuantSpec, shape: tuple[int, ...]) -> Layout:
        """See :class:`quantkit.formats.base.Codec`."""
        if len(shape) != 2 or spec.dtype != "fp8_e4m3" or spec.strategy not in ("channel", "tensor"):
            raise FormatError(
                f"float-quantized stores fp8_e4m3 (out, in) weights per channel or tensor, not {spec.describe()} {shape}"
            )
        scale_shape = (1,) if spec.strategy == "tensor" else (shape[0], 1)
        return {"weight": (torch.float8_e4m3fn, shape), "weight_scale": (SCALE_DTYPES[spec.scale_dtype], scale_shape)}

    def encode(self, qtensor: GridTensor) -> dict[str, Tensor]:
        """See :class:`quantkit.formats.base.Codec`."""
        layout = self.layout(qtensor.spec, qtensor.shape)
        scale = qtensor.scale.reshape(layout["weight_scale"][1]).contiguous()
        return {"weight": qtensor.codes().view(torch.float8_e4m3fn), "weight_scale": scale}

    def decode(self, tensors: Mapping[str, Tensor], spec: QuantSpec, shape: tuple[int, ...]) -> GridTensor:
        """See :class:`quantkit.formats.base.Codec`."""
        check_layout(tensors, self.layout(spec, shape))
        codes = tensors["weight"].contiguous().view(torch.uint8)
        return GridTensor.from_codes(codes, tensors["weight_scale"].reshape(-1, 1), None, spec)


class Fp4Packed:
    """Codec of ``nvfp4-pack-quantized`` and ``mxfp4-pack-quantized``, which differ in their scales."""

    def layout(self, spec: QuantSpec, shape: tuple[int, ...]) -> Layout:
        """See :class:`quantkit.formats.base.Codec`."""
        if len(shape) != 2 or (spec.dtype, spec.block, spec.scale_dtype) not in FP4_GRIDS:
            raise FormatError(
                f"compressed-tensors packs FP4 as nvfp4 or mxfp4 (out, in) weights, not {spec.describe()} {shape}"
            )
        _, group = grid.block_size(spec, shape)
        stored = torch.float8_e4m3fn if spec.has_global_scale else torch.uint8
        layout: Layout = {
            "weight_packed": (torch.uint8, (shape[0], shape[1] // 2)),
            "weight_scale": (stored, (shape[0], shape[1] // group)),
        }
        if spec.has_global_scale:
            layout["weight_global_scale"] = (torch.float32, (1,))
        return layout

    def encode(self, qtensor: GridTensor) -> dict[str, Tensor]:
        """See :class:`quantkit.formats.base.Codec`."""
        stored = self.layout(qtensor.spec, qtensor.shape)["weight_scale"][0]
        tensors = {
            "weight_packed": qtensor.packed.contiguous().view(torch.uint8),
            "weight_scale": qtensor.scale.contiguous().view(stored),
        }
        if qtensor.global_scale is not None:
            tensors["weight_global_scale"] = qtensor.global_scale.contiguous()
        return tensors

    def decode(self, tensors: Mapping[str, Tensor], spec: QuantSpec, shape: tuple[int, ...]) -> GridTensor:
        """See :class:`quantkit.formats.base.Codec`."""
        check_layout(tensors, self.layout(spec, shape))
        packed = tensors["weight_packed"].contiguous().view(torch.int32)
        scale = tensors["weight_scale"].contiguous().view(SCALE_DTYPES[spec.scale_dtype])
        return GridTensor(packed, scale, None, spec, shape, tensors.get("weight_global_scale"))


FP4_GRIDS = {("fp4_e2m1", (1, 16), "float8_e4m3fn"): "nvfp4", ("fp4_e2m1", (1, 32), "float8_e8m0fnu"): "mxfp4"}
"""Dtype, block and scale dtype of the FP4 grids that the format knows, and their names there."""


@dataclass(frozen=True, slots=True)
class WithInputScale:
    """A codec whose weights come with the static scale of their inputs, ``input_scale`` (1,) of ``dtype``."""

    codec: Codec
    dtype: str

    def layout(self, spec: QuantSpec, shape: tuple[int, ...]) -> Layout:
        """See :class:`quantkit.formats.base.Codec`."""
        return {**self.codec.layout(spec, shape), "input_scale": (SCALE_DTYPES[self.dtype], (1,))}

    def encode(self, qtensor: GridTensor) -> dict[str, Tensor]:
        """See :class:`quantkit.formats.base.Codec`."""
        if qtensor.input_scale is None:
            raise FormatError("the grid of the inputs is static, but their scale is missing")
        return {**self.codec.encode(qtensor), "input_scale": qtensor.input_scale.contiguous()}

    def decode(self, tensors: Mapping[str, Tensor], spec: QuantSpec, shape: tuple[int, ...]) -> GridTensor:
        """See :class:`quantkit.formats.base.Codec`."""
        check_layout(tensors, self.layout(spec, shape))
        rest = {suffix: tensor for suffix, tensor in tensors.items() if suffix != "input_scale"}
        return dataclasses.replace(self.codec.decode(rest, spec, shape), input_scale=tensors["input_scale"])


def _flip_sign(codes: Tensor) -> Tensor:
    """Exchange offset-binary and two's complement in uint8."""
    return codes ^ 0x80
