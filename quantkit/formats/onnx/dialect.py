"""The dialects of ``onnx``: modules by scheme, as in ``native``, and how exactly ONNX Runtime shall multiply.

The config is there for quantkit; ONNX Runtime reads the graph, and onnxruntime-genai its ``genai_config.json``.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from quantkit.errors import FormatError
from quantkit.formats.base import Codec, Held, Matcher
from quantkit.formats.dialects.native import Native
from quantkit.formats.onnx.codec import DequantizeLinear, MatMulNBits, rejects
from quantkit.spec import Scheme


def _codec(scheme: Scheme) -> Codec:
    return MatMulNBits()


class Onnx(Native):
    """The dialect; its ``quant_method`` is ``onnx``.

    Args:
        accuracy_level: attribute of ``MatMulNBits``: 0 multiplies float32 inputs, 4 rounds them to 8 bits.
    """

    quant_method = "onnx"
    codec = staticmethod(_codec)
    conv1d = False
    embeddings = False

    def __init__(self, accuracy_level: int) -> None:
        self.accuracy_level = accuracy_level

    def recognises(self, config: Mapping[str, Any]) -> bool:
        """Return whether a config is of this dialect and accuracy level."""
        return config.get("quant_method") == self.quant_method and config.get("accuracy_level", 0) == self.accuracy_level

    def rejects(self, scheme: Scheme, shape: tuple[int, ...], dtype: str | None = None) -> str | None:
        """Reject what the operator has no place for."""
        if scheme.activation is not None:
            return f"onnx says nothing of activations ({scheme.describe()}); use a weight-only scheme, or format native"
        return rejects(scheme.weight, shape)

    def dump_config(self, plan: Mapping[str, Scheme], ignore: Sequence[str], dtype: str) -> dict[str, Any]:
        """List the modules of every scheme."""
        return {**super().dump_config(plan, ignore, dtype), "accuracy_level": self.accuracy_level}

    def load_config(self, config: Mapping[str, Any], dtype: str, tensors: Mapping[str, Held]) -> Matcher:
        """Reverse :meth:`dump_config`."""
        if config.get("accuracy_level", 0) != self.accuracy_level:
            raise FormatError(f"quantization_config.accuracy_level is {config.get('accuracy_level')!r}; known: 0 and 4")
        return super().load_config(config, dtype, tensors)


def _qdq_codec(scheme: Scheme) -> Codec:
    return DequantizeLinear()


class OnnxQdq(Onnx):
    """The dialect of ``onnx-qdq``: weights are decoded by an operator of ONNX's own."""

    quant_method = "onnx-qdq"
    codec = staticmethod(_qdq_codec)

    def __init__(self) -> None:
        super().__init__(accuracy_level=0)

    def rejects(self, scheme: Scheme, shape: tuple[int, ...], dtype: str | None = None) -> str | None:
        """Reject what the operator has no place for."""
        if reason := super().rejects(scheme, shape, dtype):
            return reason
        try:
            DequantizeLinear().layout(scheme.weight, shape)
        except FormatError as error:
            return str(error)
        return None
