"""Stretched rotary embeddings of GGUF files, which transformers passes over without a word.

A model that was trained for longer texts than its first ones turns queries and keys by other angles than the plain ones. GGUF
says so in metadata (``rope.scaling.*``: linear and YaRN) or in tensors: one factor per frequency (``rope_freqs.weight``, Llama
3.1 and its like), or two sets of them for short and long texts (``rope_factors_short/long.weight``, LongRoPE). A model that is
built without them answers well at first, and worse with every hundred tokens.
"""

import math
from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor

from quantkit.errors import QuantkitError

TENSORS: Final = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
"""Names of the tensors that are read here."""

_LLAMA3: Final = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
_YARN: Final = frozenset({"type", "factor", "original_context_length", "attn_factor", "finetuned"})
_READ_ALREADY: Final = ("gpt-oss",)


def stretch(reader: Any, config: Any) -> None:
    """Write into a config what a GGUF file says of rotary embeddings beyond their base.

    Args:
        reader: a ``gguf.GGUFReader`` of the file.
        config: what transformers made of it; its ``rope_parameters`` are changed.

    Raises:
        QuantkitError: factors or a kind of scaling that no config of transformers describes.
    """
    kind = reader.fields["general.architecture"].contents()
    start = f"{kind}.rope.scaling."
    said = {key.removeprefix(start): field.contents() for key, field in reader.fields.items() if key.startswith(start)}
    held = {one.name: torch.from_numpy(one.data.copy()).float().flatten() for one in reader.tensors if one.name in TENSORS}
    if kind in _READ_ALREADY or (not held and said.get("type", "none") == "none"):
        return
    plain = getattr(config, "rope_parameters", None)
    if not isinstance(plain, dict):
        raise QuantkitError(f"its rotary embeddings are stretched, which {type(config).__name__} has no parameters for")
    nested = any(isinstance(value, dict) for value in plain.values())
    layers = "full_attention"  # those of sliding windows never see far enough
    own = plain[layers] if nested else plain
    changed = {**own, **_parameters(said, held, config, own)}
    config.rope_parameters = {**plain, layers: changed} if nested else changed


def _parameters(said: Mapping[str, Any], held: Mapping[str, Tensor], config: Any, own: Mapping[str, Any]) -> dict[str, Any]:
    """Return what replaces the plain parameters ``own``."""
    kind, factor = said.get("type", "none"), float(said.get("factor", 1.0))
    first = said.get("original_context_length") or getattr(config, "original_max_position_embeddings", None)
    if len(held) == 1 and "rope_freqs.weight" in held and kind == "none":
        return _llama3(held["rope_freqs.weight"], float(own["rope_theta"]))
    if len(held) == 2 and first:
        config.original_max_position_embeddings = first  # LongRoPE looks for it here, too
        found: dict[str, Any] = {"rope_type": "longrope", "original_max_position_embeddings": first}
        found |= {f"{name}_factor": held[f"rope_factors_{name}.weight"].tolist() for name in ("short", "long")}
        return {**found, **({"attention_factor": float(said["attn_factor"])} if "attn_factor" in said else {})}
    if kind == "linear" and not held:
        return {"rope_type": "linear", "factor": factor}
    if kind == "yarn" and first and not held and said.keys() <= _YARN:
        extra = float(said.get("attn_factor", 1.0))
        attention = {} if extra == 1.0 else {"attention_factor": extra * (0.1 * math.log(factor) + 1.0)}
        return {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": first, **attention}
    named = ", ".join([*(f"rope.scaling.{key} {value}" for key, value in said.items()), *held])
    raise QuantkitError(f"its rotary embeddings are stretched in a way that is not known here ({named})")


def _llama3(factors: Tensor, base: float) -> dict[str, Any]:
    """Return Llama 3.1's parameters, if they give these factors (what every frequency is divided by)."""
    size = 2 * len(factors)
    plain = 1.0 / base ** (torch.arange(0, size, 2).float() / size)
    low, high, first = _LLAMA3.values()
    lengths = 2 * math.pi / plain
    factor = float(factors.max())
    smooth = ((first / lengths - low) / (high - low)).clamp(0, 1)
    wanted = 1.0 / ((1 - smooth) / factor + smooth)
    if not torch.allclose(factors, wanted, rtol=1e-4):
        raise QuantkitError(
            "rope_freqs.weight stretches its rotary embeddings by factors that are not those of Llama 3.1, the only ones "
            "that a config of transformers describes"
        )
    return {"rope_type": "llama3", "factor": factor, **_LLAMA3}
