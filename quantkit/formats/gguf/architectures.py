"""Models that llama.cpp computes as transformers does: names of tensors, turned rows, hyper-parameters.

The names are the ``gguf`` package's (``TensorNameMap``). A kind of model is here because its GGUF has been compared; another is
refused, as is any tensor without a name and any key of the config that is not known to be written or to change nothing: such a
file would load, and answer something else.

**Turned rows.** In a head of size n transformers pairs number i with i + n/2 to rotate them by an angle, llama.cpp's Llama
pairs neighbours. So the rows of query and key projections (and their biases) are written interleaved: written row 2i + j is row
i + j n/2 of its head.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from quantkit.errors import FormatError
from quantkit.formats import decoder
from quantkit.formats.decoder import SILU, WHOLE
from quantkit.formats.gguf.file import package
from quantkit.formats.gguf.tokenizer import pre_tokenizer


@dataclass(frozen=True, slots=True)
class Architecture:
    """A kind of model.

    Attributes:
        name: llama.cpp's.
        turned: rows of queries and keys are turned.
        written: keys of its config that are written, beside :data:`quantkit.formats.decoder.WRITTEN`.
        fixed: keys with the only values that llama.cpp's code for this kind knows.
    """

    name: str
    turned: bool = False
    written: frozenset[str] = frozenset()
    fixed: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)


_MOE: Final = frozenset(("moe_intermediate_size", "shared_expert_intermediate_size"))
_EVERY: Final[dict[str, tuple[Any, ...]]] = {"decoder_sparse_step": (1,), "mlp_only_layers": ([], None)}

ARCHITECTURES: Final[dict[str, Architecture]] = {
    "llama": Architecture("llama", True, fixed=SILU),
    "mistral": Architecture("llama", True, fixed=SILU | WHOLE),
    "mixtral": Architecture("llama", True, fixed=SILU | WHOLE),
    "qwen2": Architecture("qwen2", fixed=SILU),
    "qwen3": Architecture("qwen3", fixed=SILU),
    "qwen2_moe": Architecture("qwen2moe", written=_MOE, fixed=SILU | _EVERY | {"norm_topk_prob": (False,)}),
    "qwen3_moe": Architecture("qwen3moe", written=_MOE, fixed=SILU | _EVERY | {"norm_topk_prob": (True,)}),
}
"""By ``model_type`` of transformers."""

_ROTARY: Final = ("default", "linear", "yarn", "llama3")


class Target(NamedTuple):
    """Where a tensor of the checkpoint goes: a tensor of the file, one of its matrices, and the heads whose rows are turned."""

    name: str
    expert: int | None
    heads: int | None


def architecture_of(config: Mapping[str, Any]) -> Architecture:
    """Return the kind of a model.

    Raises:
        FormatError: it is not known here, or the config says something that the file could not.
    """
    kind = str(config.get("model_type"))
    if kind not in ARCHITECTURES:
        raise FormatError(f"a GGUF of a {kind} model is not written, only of {', '.join(ARCHITECTURES)}; use another format")
    found = ARCHITECTURES[kind]
    decoder.refuse_unknown(config, found.fixed, found.written, _ROTARY, reader="llama.cpp")
    return found


def refuse_model(config: Mapping[str, Any], names: Iterable[str], tokenizer: Mapping[str, Any] | None) -> str | None:
    """Say why a whole model cannot be a GGUF file; None if it can.

    Args:
        config: what config.json says.
        names: of all its tensors.
        tokenizer: what tokenizer.json says; None where it is not known yet.
    """
    try:
        targets(config, names)
        if tokenizer is not None:
            pre_tokenizer(tokenizer)
    except FormatError as error:
        return str(error)
    return None


def targets(config: Mapping[str, Any], names: Iterable[str]) -> dict[str, Target]:
    """Return where every tensor goes.

    Raises:
        FormatError: see :func:`architecture_of`; or a tensor that llama.cpp has no name for.
    """
    architecture, gguf = architecture_of(config), package()
    kind = next(kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture.name)
    known = gguf.get_tensor_name_map(kind, int(config["num_hidden_layers"]))
    found: dict[str, Target] = {}
    for name in names:
        expert = re.search(r"\.experts\.(\d+)\.", name)
        together = re.sub(r"\.experts\.\d+\.", ".experts.", name)
        forms = (together, together.replace("model.layers", "layers").replace(".block_sparse_moe.", ".feed_forward."))
        stored = next((one for form in forms if (one := known.get_name(form, (".weight", ".bias")))), None)
        if stored is None:
            raise FormatError(f"{name}: llama.cpp has no tensor for it in a {architecture.name} model; use another format")
        found[name] = Target(stored, int(expert[1]) if expert else None, _heads(name, config) if architecture.turned else None)
    return found


def _heads(name: str, config: Mapping[str, Any]) -> int | None:
    """Return the number of heads whose rows are turned."""
    heads = int(config["num_attention_heads"])
    if re.search(r"\.q_proj\.(weight|bias)$", name):
        return heads
    return int(config.get("num_key_value_heads") or heads) if re.search(r"\.k_proj\.(weight|bias)$", name) else None


def turned(rows: int, heads: int) -> Tensor:
    """Return which row goes to every place of the file, int64 (rows,); its ``argsort()`` is the way back."""
    return torch.arange(rows).view(heads, 2, rows // heads // 2).transpose(1, 2).reshape(-1)


def add_keys(writer: Any, config: Mapping[str, Any]) -> None:
    """Write the hyper-parameters of a model.

    Args:
        writer: a ``gguf.GGUFWriter``.
        config: what config.json says; :func:`architecture_of` has accepted it.
    """
    heads, head = int(config["num_attention_heads"]), decoder.head_size(config)
    writer.add_type("model")
    writer.add_block_count(int(config["num_hidden_layers"]))
    writer.add_context_length(int(config["max_position_embeddings"]))
    writer.add_embedding_length(int(config["hidden_size"]))
    writer.add_feed_forward_length(int(config["intermediate_size"]))
    writer.add_head_count(heads)
    writer.add_head_count_kv(int(config.get("num_key_value_heads") or heads))
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_layer_norm_rms_eps(float(config["rms_norm_eps"]))
    writer.add_vocab_size(int(config["vocab_size"]))
    writer.add_rope_dimension_count(head)
    if (experts := config.get("num_local_experts") or config.get("num_experts")) is not None:
        writer.add_expert_count(int(experts))
        writer.add_expert_used_count(int(config["num_experts_per_tok"]))
    if (size := config.get("moe_intermediate_size")) is not None:
        writer.add_expert_feed_forward_length(int(size))
    if (size := config.get("shared_expert_intermediate_size")) is not None:
        writer.add_expert_shared_feed_forward_length(int(size))
    _add_rotary(writer, decoder.rotary(config))


def _add_rotary(writer: Any, rotary: Mapping[str, Any]) -> None:
    scaling = package().RopeScalingType
    writer.add_rope_freq_base(float(rotary["rope_theta"]))
    if rotary["rope_type"] in ("linear", "yarn"):
        writer.add_rope_scaling_type(scaling.LINEAR if rotary["rope_type"] == "linear" else scaling.YARN)
        writer.add_rope_scaling_factor(float(rotary["factor"]))
    if rotary["rope_type"] == "yarn":
        known = {"rope_theta", "rope_type", "factor", "original_max_position_embeddings"}
        if odd := [key for key, value in rotary.items() if key not in known and value is not None]:
            raise FormatError(f"config: {odd[0]} of YaRN is not written")
        writer.add_rope_scaling_orig_ctx_len(int(rotary["original_max_position_embeddings"]))


def extra_tensors(config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return tensors of the file that say what the config says in numbers: what Llama 3.1 divides its frequencies by."""
    rotary = decoder.rotary(config)
    if rotary["rope_type"] != "llama3":
        return {}
    return {"rope_freqs.weight": decoder.llama3_divisors(config)}
