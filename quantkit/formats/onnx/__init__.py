"""``onnx``: a decoder with its keys and values that ONNX Runtime and onnxruntime-genai run, beside the weights it points into.

- :mod:`.graph` writes ``model.onnx``: the nodes, without weights;
- :mod:`.codec` stores a weight as the operator ``MatMulNBits`` reads it;
- :mod:`.container` is a directory of safetensors whose data are the graph's external data, so that nothing is stored twice;
- :mod:`.dialect` lists the modules, for quantkit, which reads these files without the onnx package.

``onnx`` leaves inputs of products in float32; ``onnx-int8`` asks ONNX Runtime to round them to 8 bits (``accuracy_level`` 4),
which is faster and less accurate. The weights are the same. ``onnx-qdq`` has ONNX's own ``DequantizeLinear`` and ``MatMul`` in
place of ``MatMulNBits``, for programs that know those alone.
"""

from quantkit.formats.base import FORMATS, Format
from quantkit.formats.onnx.container import OnnxDirectory
from quantkit.formats.onnx.dialect import Onnx, OnnxQdq
from quantkit.formats.onnx.graph import refuse_model

for _name, _dialect in (("onnx", Onnx(0)), ("onnx-int8", Onnx(4)), ("onnx-qdq", OnnxQdq())):
    FORMATS.register(_name)(
        Format(
            _dialect.codec,
            OnnxDirectory(),
            _dialect,
            usage="onnxruntime-genai: `onnxruntime_genai.Model('path/to/this/directory')`; or onnxruntime, file `model.onnx`.",
            recognises=_dialect.recognises,
            refuses=refuse_model,
        )
    )
