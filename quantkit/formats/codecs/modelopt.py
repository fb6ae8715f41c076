"""The codecs of ``modelopt``: what NVIDIA's Model Optimizer exports, and TensorRT-LLM, vLLM and SGLang read.

- ``FP8``: ``weight`` float8_e4m3fn (out, in), ``weight_scale`` and ``input_scale`` float32 (): one of each for a layer.
- ``FP8_PER_CHANNEL_PER_TOKEN``: ``weight`` likewise, ``weight_scale`` float32 (out,); inputs get a scale per token at run time.
- ``W4A16_NVFP4``: ``weight`` uint8 (out, in / 2), the even column in the low nibble; ``weight_scale`` float8_e4m3fn
  (out, in / 16); ``weight_scale_2`` float32 (), by which the others are *multiplied*.

Names, dtypes and shapes are those that vLLM 0.32 registers (``model_executor/layers/quantization/modelopt.py``:
KFp8StaticTensor, KFp8StaticChannel, KNvfp4Static). A :class:`~quantkit.qtensor.GridTensor` divides by its global scale, the
inverse of ``weight_scale_2``. Inverting twice does not always give the same float32 number, but a third time changes nothing:
where this format is named, the second is taken (:func:`invertible`). Others are refused when they are written.
"""

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor

from quantkit.errors import FormatError
from quantkit.formats.base import Codec, check_layout
from quantkit.formats.codecs.gptq import matrix
from quantkit.formats.containers.base import Layout
from quantkit.numerics.pack import as_bytes
from quantkit.qtensor import GridTensor, QTensor
from quantkit.spec import ActivationSpec, QuantSpec, Scheme, token_activations

_TENSOR = QuantSpec("fp8_e4m3", (-1, -1), True, "float32")
SCHEMES: Mapping[str, Scheme] = {
    "FP8": Scheme(_TENSOR, ActivationSpec(_TENSOR, dynamic=False)),
    "FP8_PER_CHANNEL_PER_TOKEN": Scheme(QuantSpec("fp8_e4m3", (1, -1), True, "float32"), token_activations("fp8_e4m3")),
    "W4A16_NVFP4": Scheme(QuantSpec("fp4_e2m1", (1, 16), True, "float8_e4m3fn")),
}
"""What is read and written, by its ``quant_algo``."""


class Fp8:
    """Codec of ``FP8`` and ``FP8_PER_CHANNEL_PER_TOKEN``, which differ in the shapes of their scales."""

    def layout(self, spec: QuantSpec, shape: tuple[int, ...]) -> Layout:
        """See :class:`quantkit.formats.base.Codec`."""
        out, _ = matrix(shape)
        if spec not in (SCHEMES["FP8"].weight, SCHEMES["FP8_PER_CHANNEL_PER_TOKEN"].weight):
            raise FormatError(f"modelopt stores fp8_e4m3 weights with float32 scales, not {spec.describe()}")
        whole = spec.strategy == "tensor"
        layout: Layout = {
            "weight": (torch.float8_e4m3fn, shape),
            "weight_scale": (torch.float32, () if whole else (out,)),
        }
        return {**layout, "input_scale": (torch.float32, ())} if whole else layout

    def encode(self, qtensor: GridTensor) -> dict[str, Tensor]:
        """See :class:`quantkit.formats.base.Codec`."""
        layout = self.layout(qtensor.spec, qtensor.shape)
        tensors = {
            "weight": qtensor.codes().view(torch.float8_e4m3fn),
            "weight_scale": qtensor.scale.reshape(layout["weight_scale"][1]).clone(),
        }
        if "input_scale" not in layout:
            return tensors
        if qtensor.input_scale is None:
            raise FormatError("the grid of the inputs is static, but their scale is missing")
        return {**tensors, "input_scale": qtensor.input_scale.reshape(()).clone()}

    def decode(self, tensors: Mapping[str, Tensor], spec: QuantSpec, shape: tuple[int, ...]) -> GridTensor:
        """See :class:`quantkit.formats.base.Codec`."""
        check_layout(tensors, self.layout(spec, shape))
        codes = tensors["weight"].contiguous().view(torch.uint8)
        found = GridTensor.from_codes(codes, tensors["weight_scale"].reshape(-1, 1), None, spec)
        given = tensors.get("input_scale")
        return found if given is None else dataclasses.replace(found, input_scale=given.reshape(1))


class NvFp4:
    """Codec of ``W4A16_NVFP4``."""

    def layout(self, spec: QuantSpec, shape: tuple[int, ...]) -> Layout:
        """See :class:`quantkit.formats.base.Codec`."""
        out, columns = matrix(shape)
        if spec != SCHEMES["W4A16_NVFP4"].weight or columns % 16:
            raise FormatError(f"modelopt packs FP4 as nvfp4 in groups of 16, not {spec.describe()} {shape}")
        return {
            "weight": (torch.uint8, (out, columns // 2)),
            "weight_scale": (torch.float8_e4m3fn, (out, columns // 16)),
            "weight_scale_2": (torch.float32, ()),
        }

    def encode(self, qtensor: GridTensor) -> dict[str, Tensor]:
        """See :class:`quantkit.formats.base.Codec`."""
        self.layout(qtensor.spec, qtensor.shape)
        assert qtensor.global_scale is not None
        inverse = 1 / qtensor.global_scale
        if not torch.equal(1 / inverse, qtensor.global_scale):
            raise FormatError(
                "weight_scale_2 is an inverse that does not give this global scale back, in float32's last digit; quantize "
                "with format modelopt among the outputs, or use native"
            )
        return {
            "weight": as_bytes(qtensor.packed).view(*qtensor.packed.shape[:-1], -1),
            "weight_scale": qtensor.scale.contiguous(),
            "weight_scale_2": inverse.reshape(()).clone(),
        }

    def decode(self, tensors: Mapping[str, Tensor], spec: QuantSpec, shape: tuple[int, ...]) -> GridTensor:
        """See :class:`quantkit.formats.base.Codec`."""
        check_layout(tensors, self.layout(spec, shape))
        second = tensors["weight_scale_2"].reshape(1)
        if not bool((second > 0).all()):
            raise FormatError(f"weight_scale_2 is {float(second)}, want a positive number")
        return GridTensor(
            tensors["weight"].contiguous().view(torch.int32), tensors["weight_scale"], None, spec, shape, 1 / second
        )


def invertible(qtensor: QTensor) -> QTensor:
    """Return a weight whose global scale is the inverse of its own inverse in float32: the same, or another last digit."""
    scale = qtensor.parts().get("global_scale")
    return qtensor if scale is None else qtensor.with_parts({"global_scale": 1 / (1 / scale)})


def algorithm(scheme: Scheme) -> str | None:
    """Return the ``quant_algo`` of a scheme; None if it has none."""
    return next((name for name, known in SCHEMES.items() if known == scheme), None)


def codec_of(scheme: Scheme) -> Codec:
    """Return the codec of a scheme."""
    return Fp8() if scheme.weight.dtype == "fp8_e4m3" else NvFp4()
