"""``float``: a plain directory of float weights, as any program reads it; what ``quantkit convert --to float`` writes."""

from collections.abc import Mapping, Sequence
from typing import Any

from quantkit.errors import FormatError
from quantkit.formats.base import FORMATS, Format, Held, Matcher
from quantkit.formats.codecs.native import codec_of
from quantkit.formats.containers.directory import SafetensorsDirectory
from quantkit.spec import Scheme

_REFUSAL = "format float stores no codes; quantize into another format, then quantkit convert --to float"


class Float:
    """The dialect of a directory that says nothing of quantization; it is never announced, and read as a float model."""

    quant_method = "float"
    conv1d = True
    embeddings = True

    def rejects(self, scheme: Scheme, shape: tuple[int, ...], dtype: str | None = None) -> str | None:
        """Reject everything."""
        return _REFUSAL

    def dump_config(self, plan: Mapping[str, Scheme], ignore: Sequence[str], dtype: str) -> dict[str, Any]:
        """Say nothing."""
        if plan:
            raise FormatError(_REFUSAL)
        return {}

    def load_config(self, config: Mapping[str, Any], dtype: str, tensors: Mapping[str, Held]) -> Matcher:
        """Refuse: there is nothing to read."""
        raise FormatError("quantization_config: a float model has none")


FORMATS.register("float")(
    Format(
        codec_of,
        SafetensorsDirectory("model"),
        Float(),
        usage="transformers, and everything that reads its directories.",
        recognises=lambda config: False,
    )
)
