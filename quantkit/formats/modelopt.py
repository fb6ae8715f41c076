"""``modelopt``: FP8 and NVFP4 checkpoints in the layout of NVIDIA's Model Optimizer, for TensorRT-LLM, vLLM and SGLang.

Scales are float32: where this format is named, schemes get such scales from the start.
"""

from quantkit.formats.base import FORMATS, Format
from quantkit.formats.codecs.modelopt import codec_of, invertible
from quantkit.formats.containers.directory import SafetensorsDirectory, Twin
from quantkit.formats.dialects.modelopt import FILE, ModelOpt, twin, untwin

_DIALECT = ModelOpt()
FORMATS.register("modelopt")(
    Format(
        codec_of,
        SafetensorsDirectory("model", Twin(FILE, twin, untwin)),
        _DIALECT,
        foreign=True,
        nearest=invertible,
        scale_dtype="float32",
        usage="vLLM on a GPU that computes in FP8 or FP4: `vllm serve path/to/this/directory`.",
        recognises=_DIALECT.recognises,
        rejects_plan=_DIALECT.rejects_plan,
    )
)
