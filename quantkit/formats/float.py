"""``float``: a plain directory of float weights, as any program reads it; what ``quantkit convert --to float`` writes."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from quantkit.errors import FormatError
from quantkit.formats.base import FORMATS, Format, Held, Matcher
from quantkit.formats.containers.base import Layout
from quantkit.formats.containers.directory import SafetensorsDirectory
from quantkit.qtensor import GridTensor
from quantkit.spec import QuantSpec, Scheme

_REFUSAL = "format float stores no codes; quantize into another format, then quantkit convert --to float"


class NoCodec:
    """The codec of a format without codes."""

    def layout(self, spec: QuantSpec, shape: tuple[int, ...]) -> Layout:
        """Refuse."""
        raise FormatError(_REFUSAL)

    def encode(self, qtensor: GridTensor) -> dict[str, Tensor]:
        """Refuse."""
        raise FormatError(_REFUSAL)

    def decode(self, tensors: Mapping[str, Tensor], spec: QuantSpec, shape: tuple[int, ...]) -> GridTensor:
        """Refuse."""
        raise FormatError(_REFUSAL)


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
        lambda scheme: NoCodec(),
        SafetensorsDirectory("model"),
        Float(),
        floats=True,
        usage="transformers, and everything that reads its directories.",
        recognises=lambda config: False,
    )
)
