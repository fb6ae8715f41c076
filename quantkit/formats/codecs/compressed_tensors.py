"""Codecs of ``compressed-tensors``: one per way in which that format lays out a weight. Their names are the format's own.

Integer codes are signed there, so a stored 4-bit -8..7 is our 0..15; ``w = (q - zero_point) * scale`` in both worlds.

- ``pack-quantized``, weight only, 2 to 8 bits, a scale per group or channel: ``weight_packed`` int32
  (out, ceil(in * bits / 32)) holds ``q + 2^(bits-1)``, element i at bit ``i * bits`` of its row, low bits first;
  ``weight_scale`` (out, in / group_size), (out, 1) per channel; ``weight_shape`` int64 [out, in]; asymmetric grids add
  ``weight_zero_point`` int32 (ceil(out * bits / 32), in / group_size), packed like weights but down dimension 0.
- ``int-quantized``, 8 bits: ``weight`` int8 (out, in), ``weight_scale`` (out, in / group_size), (out, 1) or (1,),
  ``weight_zero_point`` int8 of that shape. It is chosen for schemes that also quantize activations (W8A8) and for one scale
  per tensor, which ``pack-quantized`` readers refuse.
- ``float-quantized``, FP8 e4m3 with one scale per channel or tensor, activations float or FP8: ``weight`` float8_e4m3fn
  (out, in), ``weight_scale`` (out, 1) or (1,).
- ``nvfp4-pack-quantized``, ``mxfp4-pack-quantized``, weights only: ``weight_packed`` uint8 (out, in / 2), the even column in
  the low nibble; ``weight_scale`` FP8 e4m3 (out, in / 16) and ``weight_global_scale`` float32 (1,), which *divides*, or E8M0
  exponents uint8 (out, in / 32).

Activations are int8 or FP8 like the weights, or int8 with 2 to 7-bit weights (W4A8, ``pack-quantized``); per token, per token
and group, or with one static ``input_scale`` (1,) per layer.

Since compressed-tensors 0.18 packing is dense: elements cross word boundaries. Before, a word held floor(32 / bits)
elements and padding, which differs for 3, 5, 6 and 7 bits; that layout is only read.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.dtypes import SCALE_DTYPES
from quantkit.errors import FormatError
from quantkit.formats.base import Codec, check_layout
from quantkit.formats.containers.base import Layout
from quantkit.numerics import grid
from quantkit.numerics.pack import as_bytes, pack, packed_words, unpack
from quantkit.qtensor import GridTensor, as_grid
from quantkit.spec import QuantSpec, Scheme


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
            "weight_packed": as_bytes(qtensor.packed).view(*qtensor.packed.shape[:-1], -1),
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
        return as_grid(self.codec.decode(rest, spec, shape)).with_parts({"input_scale": tensors["input_scale"]})


def _flip_sign(codes: Tensor) -> Tensor:
    """Exchange offset-binary and two's complement in uint8."""
    return codes ^ 0x80


FP4_LAYOUTS = tuple(f"{name}-pack-quantized" for name in FP4_GRIDS.values())
LAYOUTS = ("pack-quantized", "int-quantized", "float-quantized", *FP4_LAYOUTS)
"""Names of all layouts."""


def fp4_name(spec: QuantSpec) -> str | None:
    """Return what the format calls an FP4 grid; None for one that it does not know."""
    return FP4_GRIDS.get((spec.dtype, spec.block, spec.scale_dtype))


def layout_name(scheme: Scheme) -> str:
    """Return the name of the layout: float-quantized for FP8, int-quantized for W8A8 and per-tensor scales, else packed."""
    if fp4 := fp4_name(scheme.weight):
        return f"{fp4}-pack-quantized"
    if not scheme.weight.is_integer:
        return "float-quantized"
    bytewise = scheme.activation is not None and scheme.weight.bits == 8
    return "int-quantized" if bytewise or scheme.weight.strategy == "tensor" else "pack-quantized"


def codec_named(name: str) -> Codec:
    """Return the codec of a layout, without input scale."""
    plain: dict[str, Codec] = {"float-quantized": FloatQuantized(), "int-quantized": IntQuantized()}
    return Fp4Packed() if name in FP4_LAYOUTS else plain.get(name, PackQuantized())


def codec_of(scheme: Scheme) -> Codec:
    """Return the codec that a scheme is written with."""
    codec = codec_named(layout_name(scheme))
    return WithInputScale(codec, scheme.activation.grid.scale_dtype) if scheme.activation and scheme.static else codec
