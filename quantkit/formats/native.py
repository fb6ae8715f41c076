"""``native``: quantkit's own format, which stores every GridTensor exactly as it is.

Only quantkit reads it; use ``compressed-tensors`` to go elsewhere. Weight files are called ``quantkit*.safetensors``, not
``model*``, because transformers would otherwise skip the quantization it does not know and fill the model with random weights.
"""

from quantkit.formats.base import FORMATS, Format
from quantkit.formats.codecs.native import codec_of
from quantkit.formats.containers.directory import SafetensorsDirectory
from quantkit.formats.dialects.native import Native

FORMATS.register("native")(Format(codec_of, SafetensorsDirectory("quantkit"), Native()))
