"""``compressed-tensors``: the checkpoints that vLLM, transformers and llm-compressor read.

What transformers (5.23 with compressed-tensors 0.20) makes of our files: symmetric ones load compressed; asymmetric ones load
with ``CompressedTensorsConfig(dequantize=True)`` only, because the package prepares unpacked zero points for them; stacks
of experts load if they are symmetric; GPT-2's Conv1D layers are not recognised at all.

What it cannot store is listed in :mod:`quantkit.formats.dialects.compressed_tensors`; use ``native`` there.
"""

from quantkit.formats.base import FORMATS, Format
from quantkit.formats.codecs.compressed_tensors import codec_of
from quantkit.formats.containers.directory import SafetensorsDirectory
from quantkit.formats.dialects.compressed_tensors import CompressedTensors

FORMATS.register("compressed-tensors")(
    Format(codec_of, SafetensorsDirectory("model"), CompressedTensors(), foreign=True, packed=True)
)
