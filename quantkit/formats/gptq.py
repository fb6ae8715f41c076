"""``gptq`` and ``gptq-v2``: the checkpoints that GPTQModel, vLLM, SGLang and transformers read.

The name is that of the format, not of the algorithm: codes of any quantizer can be stored. ``gptq`` has the older
``checkpoint_format``, which every reader knows and which has no place for zero points of 0: symmetric grids only. ``gptq-v2``
has them all. vLLM reads 4 and 8 bits, symmetric, of both; GPTQModel 2, 3, 4 and 8 bits.
"""

from quantkit.formats.base import FORMATS, Format
from quantkit.formats.codecs.gptq import GptqCodec
from quantkit.formats.containers.directory import SafetensorsDirectory, Twin
from quantkit.formats.dialects.gptq import Gptq

for _name, _dialect in (("gptq", Gptq(1)), ("gptq-v2", Gptq(2))):
    _codec = GptqCodec(_dialect.version)
    FORMATS.register(_name)(
        Format(
            lambda scheme, codec=_codec: codec,  # type: ignore[misc]
            SafetensorsDirectory("model", Twin("quantize_config.json", load=lambda found: {"quant_method": "gptq", **found})),
            _dialect,
            foreign=True,
            usage="vLLM, SGLang or GPTQModel: `vllm serve path/to/this/directory`.",
            recognises=_dialect.recognises,
        )
    )
