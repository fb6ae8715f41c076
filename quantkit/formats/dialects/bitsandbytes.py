"""``bitsandbytes``: its ``quantization_config``, read; the tensors say more than it does, and are believed.

NF4 with plain and double quantization, and int8. FP4 is a table of its own and is refused. With int8, bitsandbytes also rounds
inputs below ``llm_int8_threshold``, which belongs to its program and not to the numbers in the file: here they stay in float.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from quantkit.errors import FormatError, SpecError
from quantkit.formats.base import Held, Matcher, Stored
from quantkit.formats.codecs.bitsandbytes import ONLY_READ, STATE, Int8, Nf4, read_state
from quantkit.spec import QuantSpec, Scheme

_MOST_STATE_BYTES = 4096


class BitsAndBytes:
    """The dialect."""

    quant_method = "bitsandbytes"
    conv1d = False
    embeddings = False

    def rejects(self, scheme: Scheme, shape: tuple[int, ...], dtype: str | None = None) -> str | None:
        """Reject everything: it is only read."""
        return ONLY_READ

    def dump_config(self, plan: Mapping[str, Scheme], ignore: Sequence[str], dtype: str) -> dict[str, Any]:
        """Refuse."""
        raise FormatError(ONLY_READ)

    def load_config(self, config: Mapping[str, Any], dtype: str, tensors: Mapping[str, Held]) -> Matcher:
        """Read what transformers has written."""
        four, eight = bool(config.get("load_in_4bit")), bool(config.get("load_in_8bit"))
        kind, storage = config.get("bnb_4bit_quant_type"), config.get("bnb_4bit_quant_storage", "uint8")
        if four == eight or (four and (kind != "nf4" or storage != "uint8")):
            raise FormatError(
                f"quantization_config: load_in_4bit={four}, load_in_8bit={eight}, bnb_4bit_quant_type={kind!r}, "
                f"bnb_4bit_quant_storage={storage!r}; quantkit reads nf4 in uint8, and int8"
            )

        def match(module: str) -> Stored | None:
            try:
                return _nf4(module, tensors) if four else _int8(module, tensors)
            except SpecError as error:
                raise FormatError(f"{module}: {error}") from error

        return match


def _nf4(module: str, tensors: Mapping[str, Held]) -> Stored | None:
    held = tensors.get(f"{module}.{STATE}")
    if held is None:
        if f"{module}.weight.absmax" in tensors:
            raise FormatError(f"{module}: {STATE} is missing, without which its blocks are unknown")
        return None
    if held.dtype != torch.uint8 or len(held.shape) != 1 or held.shape[0] > _MOST_STATE_BYTES:
        raise FormatError(f"{module}: {STATE} is {held.dtype} {held.shape}, want a few bytes of JSON")
    state = read_state(held.read())
    spec = QuantSpec("nf4", (1, state["blocksize"]), True, "float32")
    return Stored(Scheme(spec), Nf4(tuple(state.items()), held.shape[0]))


def _int8(module: str, tensors: Mapping[str, Held]) -> Stored | None:
    return Stored(Scheme(QuantSpec("int8", (1, -1), True, "float32")), Int8()) if f"{module}.SCB" in tensors else None
