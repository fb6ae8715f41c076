"""What config.json says of a plain decoder, for formats whose files run without transformers.

Such a file says with numbers what transformers says with a class. A kind of model is therefore known by name, and a key of its
config that is not known to be written or to change nothing refuses the model: its file would load, and answer something else.
"""

import math
from collections.abc import Collection, Mapping
from typing import Any, Final

import torch
from torch import Tensor

from quantkit.errors import FormatError

WRITTEN: Final = frozenset(
    [
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "vocab_size",
        "rms_norm_eps",
        "max_position_embeddings",
        "rope_theta",
        "rope_parameters",
        "rope_scaling",
        "tie_word_embeddings",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "unk_token_id",
        "sep_token_id",
        "attention_bias",
        "mlp_bias",
        "qkv_bias",
        "num_local_experts",
        "num_experts",
        "num_experts_per_tok",
    ]
)
"""Keys that are written or seen in the tensors themselves."""

_HARMLESS: Final = frozenset(
    [
        "architectures",
        "dtype",
        "torch_dtype",
        "transformers_version",
        "model_type",
        "use_cache",
        "initializer_range",
        "attention_dropout",
        "pretraining_tp",
        "quantization_config",
        "quantkit",
        "router_aux_loss_coef",
        "router_jitter_noise",
        "output_router_logits",
        "max_window_layers",
        "hidden_dropout",
        "resid_pdrop",
        "embd_pdrop",
        "id2label",
        "label2id",
    ]
)
"""Keys that do not change what a model computes when it runs."""

SILU: Final[dict[str, tuple[Any, ...]]] = {"hidden_act": ("silu", "swish")}
WHOLE: Final[dict[str, tuple[Any, ...]]] = {"sliding_window": (None,), "use_sliding_window": (False,)}


def refuse_unknown(
    config: Mapping[str, Any],
    fixed: Mapping[str, tuple[Any, ...]],
    written: Collection[str],
    kinds_of_rotary: Collection[str],
    *,
    reader: str,
) -> None:
    """Refuse a model whose config says what a file could not.

    Args:
        config: what config.json says.
        fixed: keys with the only values that the reader knows for this kind of model.
        written: keys that are written, beside :data:`WRITTEN`.
        kinds_of_rotary: ``rope_type`` that can be written.
        reader: name of the program that reads the file.

    Raises:
        FormatError: naming the key.
    """
    kind = config.get("model_type")
    for key, value in config.items():
        if key in fixed and value not in fixed[key] and not _same_window(key, value, config):
            wanted = " or ".join(map(repr, fixed[key]))
            raise FormatError(f"config: {key} is {value!r}, and {reader} computes a {kind} model as if it were {wanted}")
    if "sliding_window" not in {*fixed, *written} and config.get("use_sliding_window"):
        raise FormatError(f"config: use_sliding_window is true, which {reader} does not do for this kind of model")
    if "layer_types" not in written and any(one != "full_attention" for one in config.get("layer_types") or ()):
        raise FormatError(f"config: layer_types other than full_attention are not written for a {kind} model")
    seen = {*WRITTEN, *_HARMLESS, *written, *fixed, "layer_types", "sliding_window", "use_sliding_window"}
    if odd := [k for k, v in config.items() if k not in seen and not k.startswith("_") and v not in (None, False, [], {})]:
        raise FormatError(f"config: nothing is known here of {odd[0]}={config[odd[0]]!r}, which may change results")
    found = rotary(config)
    if found.get("rope_type", "default") not in kinds_of_rotary or found.get("partial_rotary_factor", 1.0) != 1.0:
        raise FormatError(f"config: rotary embeddings {found} are not written; known: {', '.join(kinds_of_rotary)}")


def _same_window(key: str, value: Any, config: Mapping[str, Any]) -> bool:
    """Whether a window is as wide as the longest text, and so none."""
    return key == "sliding_window" and isinstance(value, int) and value >= int(config.get("max_position_embeddings", 0))


def head_size(config: Mapping[str, Any]) -> int:
    """Return the number of channels of an attention head."""
    return int(config.get("head_dim") or int(config["hidden_size"]) // int(config["num_attention_heads"]))


def rotary(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parameters of rotary embeddings, whichever way the config says them."""
    found = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    if any(isinstance(value, Mapping) for value in found.values()):
        raise FormatError("config: rope_parameters differ by kind of layer, which is not written for this kind of model")
    found.setdefault("rope_theta", config.get("rope_theta", 10000.0))
    found.setdefault("rope_type", found.pop("type", "default"))
    return found


def inverse_frequencies(config: Mapping[str, Any]) -> Tensor:
    """Return the angle per position, float32 (channels of a head / 2,), that pairs of channels are rotated by.

    Raises:
        FormatError: a ``rope_type`` other than default, linear and llama3.
    """
    found, size = rotary(config), head_size(config)
    plain: Tensor = 1.0 / float(found["rope_theta"]) ** (torch.arange(0, size, 2, dtype=torch.int64).float() / size)
    if found["rope_type"] == "default":
        return plain
    if found["rope_type"] == "linear":
        return plain / float(found["factor"])
    if found["rope_type"] == "llama3":
        return plain / llama3_divisors(config)
    raise FormatError(f"config: rotary embeddings {found} are not written; known: default, linear, llama3")


def llama3_divisors(config: Mapping[str, Any]) -> Tensor:
    """Return what Llama 3.1 divides its frequencies by, float32 (channels of a head / 2,)."""
    found, size = rotary(config), head_size(config)
    lengths = 2 * math.pi * float(found["rope_theta"]) ** (torch.arange(0, size, 2).float() / size)
    factor, first = float(found["factor"]), float(found["original_max_position_embeddings"])
    low, high = float(found["low_freq_factor"]), float(found["high_freq_factor"])
    smooth = ((first / lengths - low) / (high - low)).clamp(0, 1)
    divisors: Tensor = 1.0 / ((1 - smooth) / factor + smooth)
    return divisors
