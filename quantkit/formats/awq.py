"""``awq``: 4-bit checkpoints with zero points that vLLM, SGLang and transformers read in AutoAWQ's layout.

The name is that of the format, not of the algorithm: codes of any quantizer can be stored.
"""

from quantkit.formats.base import FORMATS, Format
from quantkit.formats.codecs.awq import AwqGemm
from quantkit.formats.containers.directory import SafetensorsDirectory
from quantkit.formats.dialects.awq import Awq

_DIALECT = Awq()
FORMATS.register("awq")(
    Format(
        lambda scheme: AwqGemm(),
        SafetensorsDirectory("model"),
        _DIALECT,
        foreign=True,
        usage="vLLM or SGLang: `vllm serve path/to/this/directory`.",
        recognises=_DIALECT.recognises,
        rejects_plan=_DIALECT.rejects_plan,
    )
)
