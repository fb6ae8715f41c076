"""``mlx``: checkpoints that mlx-lm reads, on Apple's and other processors.

Symmetric grids are stored in the checkpoint's dtype, exactly. Zero points make scales and biases float32, and MLX then
computes in it.
"""

from quantkit.formats.base import FORMATS, Format
from quantkit.formats.codecs.mlx import MlxCodec
from quantkit.formats.containers.directory import SafetensorsDirectory, Twin
from quantkit.formats.dialects.mlx import KEY, Mlx, rotary

_DIALECT = Mlx()
FORMATS.register("mlx")(
    Format(
        lambda scheme: MlxCodec(),
        SafetensorsDirectory("model", Twin(KEY)),
        _DIALECT,
        usage="mlx-lm: `mlx_lm.generate --model path/to/this/directory --prompt TEXT`.",
        also=rotary,
        recognises=_DIALECT.recognises,
        rejects_plan=_DIALECT.rejects_plan,
    )
)
