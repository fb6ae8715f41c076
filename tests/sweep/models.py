"""Tiny random models: of every causal language model type that transformers registers, and of real configs made small.

Only sizes change. What is odd about an architecture (kinds of layers, latent ranks, experts, tied tables) stays: that is
what quantizers trip over.
"""

import copy
import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as REGISTERED

_SIZES: dict[int, str] = {
    0: "num_kv_shared_layers num_mtp_modules num_nextn_predict_layers mtp_num_hidden_layers pad_token_id",
    1: "bos_token_id n_group topk_group n_shared_experts first_k_dense_replace num_dense_layers",
    2: "num_hidden_layers n_layer num_layers n_layers num_decoder_layers decoder_layers encoder_layers depth eos_token_id "
    "num_key_value_heads num_global_key_value_heads linear_num_key_heads num_experts_per_tok moe_k moe_topk moe_top_k "
    "top_k_experts experts_per_token",
    3: "num_channels conv_L_cache",
    4: "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads num_experts "
    "n_routed_experts num_local_experts moe_num_experts linear_num_value_heads index_n_heads patch_size",
    8: "rotary_dim mamba_n_heads mamba_num_heads index_topk sliding_window sliding_window_size attention_chunk_size "
    "attention_window_size mamba_chunk_size chunk_size",
    16: "head_dim kv_channels global_head_dim qk_nope_head_dim qk_rope_head_dim v_head_dim mamba_d_state mamba_d_head "
    "mamba_head_dim state_size ssm_state_size linear_key_head_dim linear_value_head_dim image_size",
    32: "moe_latent_size q_lora_rank kv_lora_rank o_lora_rank hidden_size_per_layer_input index_head_dim",
    64: "hidden_size n_embd d_model dim n_embed embedding_size hidden_dim word_embed_proj_dim moe_intermediate_size "
    "shared_expert_intermediate_size moe_shared_expert_intermediate_size shared_intermediate_size intermediate_size_moe "
    "expert_ffn_hidden_size lru_width out_hidden_size text_hidden_size",
    128: "intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim n_inner ffn_hidden_size intermediate_size_mlp dff "
    "mlp_hidden_size mamba_d_ssm",
    256: "vocab_size vocab_size_per_layer_input max_position_embeddings n_positions n_ctx seq_length max_seq_len",
}
SMALL = {name: size for size, names in _SIZES.items() for name in names.split()}
_UNSET_STAYS = ("num_mtp_modules", "num_nextn_predict_layers", "sliding_window", "head_dim")
_NOT_SIZES = ("model_type", "transformers_version", "torch_dtype", "dtype", "architectures", "_name_or_path")
_PER_LAYER = ("per_layer_config", "mlp_layer_types", "activation_sparsity_pattern", "layer_types")

_MLA = "axk1 axk2 deepseek_v2 deepseek_v3 deepseek_v32 glm4_moe_lite glm_moe_dsa dots3_note dots3_note_text longcat_flash "
_SIZE_OF: dict[str, dict[str, int | None]] = {
    **{name: {"num_key_value_heads": 4} for name in (_MLA + "minicpm3 sarvam_mla youtu").split()},
    "bailing_hybrid": {"num_key_value_heads": 4, "num_experts": 8},
    "falcon_mamba": {"time_step_rank": 4},
    "gemma4_assistant": {"hidden_size_per_layer_input": None},
    "gemma4_unified_assistant": {"hidden_size_per_layer_input": None},
    "hunyuan_v1_dense": {"head_dim": None},
    "hunyuan_v1_moe": {"head_dim": None},
    "jamba": {"mamba_dt_rank": 32},
    "kimi_linear": {"num_key_value_heads": 4, "num_experts": 8},
    "mamba": {"time_step_rank": 4},
    "mamba2": {"num_heads": 8},
    "recurrent_gemma": {"num_hidden_layers": 3, "num_attention_heads": 2},
    "zamba": {"layer_types": None},
    "zaya": {"num_experts_per_tok": 1},
}
"""Model type to sizes that differ from :data:`SMALL`; None leaves the type's own."""

_DECODER_ONLY_IF_TOLD = (
    "bert bert-generation big_bird camembert data2vec-text electra ernie megatron-bert rembert roberta "
    "roberta-prelayernorm roc_bert roformer xlm-roberta xlm-roberta-xl xmod reformer"
)
_ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}
_ATTENTION = ["sliding_attention", "full_attention"]
_HYBRID = ["mamba", "hybrid", "mamba", "hybrid"]
_ZAMBA = {"layers_block_type": _HYBRID, "num_hidden_layers": 4, "attention_head_dim": 32}
_QWEN4 = {
    "indexer_n_heads": 4,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 32,
    "indexer_budget": 8,
    "indexer_compress_ratio": 2,
    "hc_lowrank": 32,
    "ngram_vocab_size_base": 512,
    "split_ngram_parts": 4,
    "heads_per_ngram": 2,
}
_ADAPTER: dict[str, Any] = {"per_layer_config": {}, "adapter_in_dim": 64, "adapter_out_dim": 64, "adapter_input_size": 64}
_SLIDING = {
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 4,
    "swa_q_lora_rank": 32,
    "swa_kv_lora_rank": 32,
    "swa_head_dim": 32,
    "swa_qk_nope_head_dim": 16,
    "swa_v_head_dim": 16,
}
_ALSO: dict[str, dict[str, Any]] = {
    **{name: {"is_decoder": True} for name in _DECODER_ONLY_IF_TOLD.split()},
    "big_bird": {"is_decoder": True, "attention_type": "original_full"},
    "bailing_hybrid": {"n_group": 2, "topk_group": 1, "layer_group_size": 2},
    "bamba": {"attn_layer_indices": [1]},
    "cohere_compass_text": {"layer_types": _ATTENTION, "rope_parameters": dict.fromkeys(_ATTENTION, _ROPE)},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8},
        "ffn_config": {"ffn_hidden_size": 128, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "dory": {
        "num_hidden_layers": 4,
        "layer_types": _ATTENTION * 2,
        "n_input_layers": 1,
        "n_recurrent_layers": 2,
        "n_output_layers": 1,
    },
    "gemma3n": {"text_config.activation_sparsity_pattern": [0.95, 0.0]},
    "gemma4_assistant": {"text_config.hidden_size_per_layer_input": 0},
    "gemma4_unified_assistant": {"text_config.hidden_size_per_layer_input": 0},
    "dots3_note": {
        **{f"vision_config.{key}": value for key, value in _ADAPTER.items()},
        **{f"text_config.{key}": size for key, size in _SLIDING.items()},
    },
    "dots3_note_text": _SLIDING,
    "gpt_neo": {"num_layers": 2, "attention_types": [[["global", "local"], 1]], "window_size": 8},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "inkling_text": {"unpadded_vocab_size": 256},
    "inkling2_text": {"unpadded_vocab_size": 256},
    "inkling2_loop_text": {"unpadded_vocab_size": 256},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "kimi_linear": {"num_experts_per_token": 2, "num_experts_per_tok": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "ministral": {"head_dim": 16},
    "qwen4_exp": {f"text_config.{key}": value for key, value in _QWEN4.items()},
    "qwen4_exp_text": _QWEN4,
    "recurrent_gemma": {"num_hidden_layers": 3},
    "zamba": {**_ZAMBA, "mamba_dt_rank": 32, "attention_hidden_size": 128, "n_mamba_heads": 2},
    "zamba2": {
        **_ZAMBA,
        "n_mamba_heads": 8,
        "mamba_headdim": 16,
        "attention_hidden_size": 128,
        "mamba_ngroups": 1,
        "num_mem_blocks": 1,
    },
}
"""Model type to values that its config gets whatever its default; a dot leads into a nested config, None removes the key."""

_NOT_COUNTED = (
    "bart bert bert-generation big_bird bigbird_pegasus blenderbot blenderbot-small camembert cpmant data2vec-text electra "
    "ernie git marian mbart megatron-bert moshi musicgen musicgen_melody mvp pegasus plbart prophetnet reformer rembert "
    "roberta roberta-prelayernorm roc_bert roformer trocr whisper xlm xlm-roberta xlm-roberta-xl xlnet xmod"
)
LANGUAGE_MODELS_NOT = tuple(_NOT_COUNTED.split())
"""Registered types that are encoders, encoder-decoders or parts of other models: tried, but not counted as language models."""

TYPES = tuple(REGISTERED)
"""Every registered type."""


def config_of(name: str) -> PretrainedConfig:
    """Return a small config of a registered type, or of the config.json at a path."""
    if name.endswith(".json"):
        return _real(json.loads(Path(name).read_text(encoding="utf-8")))
    small = {**SMALL, **_SIZE_OF.get(name, {})}
    values = _shrunk(CONFIG_MAPPING[name]().to_dict(), small)
    for key, value in _ALSO.get(name, {}).items():
        *path, last = key.split(".")
        place = values
        for part in path:
            place = place.setdefault(part, {})
        place[last] = value
    return AutoConfig.for_model(name, **values)


def _shrunk(config: dict[str, Any], small: dict[str, int | None]) -> dict[str, Any]:
    """Return the values that make a config small; nested configs are returned whole."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict) and "model_type" in value:
            kept = {k: v for k, v in value.items() if k == "model_type" or k not in (*_NOT_SIZES, *_PER_LAYER)}
            found[key] = {**kept, **_shrunk(value, small)}
        elif small.get(key) is not None and not (value is None and key in _UNSET_STAYS):
            found[key] = small[key]
    kinds = list(dict.fromkeys(config.get("layer_types") or ()))
    if kinds and small.get("layer_types", 1) is not None:
        found["layer_types"] = (kinds * 2)[: max(2, len(kinds))]
        counts = ("num_hidden_layers", "n_layer", "num_layers")
        found |= {key: len(found["layer_types"]) for key in counts if key in config}
    return found


def _real(config: dict[str, Any]) -> PretrainedConfig:
    """Return a published config with its sizes made small and everything else kept."""
    values, kind = _real_values(config), config["model_type"]
    if kind not in CONFIG_MAPPING:  # a name of its own for an architecture that is known by another
        kind = next(name for name, owner in REGISTERED.items() if owner in config["architectures"])
    return AutoConfig.for_model(kind, **{key: value for key, value in values.items() if key != "model_type"})


def _real_values(config: dict[str, Any]) -> dict[str, Any]:
    config = {k: v for k, v in config.items() if k not in ("quantization_config", "auto_map", *_NOT_SIZES) or k == "model_type"}
    layers = config.get("num_hidden_layers", 0)
    pattern = _layers_that_matter(config)
    found: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            found[key] = _real_values(value) if "model_type" in value or key.endswith("_config") else copy.deepcopy(value)
        elif isinstance(value, list) and layers and layers <= len(value) <= layers + 1:
            found[key] = [_small_of(key.replace("list", ""), value[index]) for index in pattern]
        elif key == "hybrid_override_pattern":
            found[key] = "".join(dict.fromkeys(value)) or value
        elif key in SMALL and isinstance(value, int) and value >= SMALL[key]:
            found[key] = SMALL[key]
        else:
            found[key] = value
    if layers:
        found["num_hidden_layers"] = len(found.get("hybrid_override_pattern", pattern))
    if "vocab_size" in config:
        found |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    _keep_consistent(config, found)
    return found


def _layers_that_matter(config: dict[str, Any]) -> list[int]:
    """Return the first layers, as many as show every combination of what is said per layer, and at least two."""
    layers = config.get("num_hidden_layers", 0)
    lists = [v for v in config.values() if isinstance(v, list) and layers and layers <= len(v) <= layers + 1]
    interval = max([config.get(key) or 1 for key in ("full_attention_interval", "sliding_window_pattern")])
    seen: dict[str, int] = {}
    for index in range(layers):
        seen.setdefault(str([one[index] for one in lists]), index)
    chosen = sorted(seen.values())
    first = config.get("first_k_dense_replace", 0) or config.get("num_hash_layers", 0)
    count = max(2, min(layers, interval), 2 if first else 0)
    extra = [index for index in range(layers) if index not in chosen][: max(0, count - len(chosen))]
    return sorted([*chosen, *extra])


def _small_of(key: str, value: Any) -> Any:
    return SMALL[key] if isinstance(value, int) and not isinstance(value, bool) and key in SMALL else value


def _keep_consistent(config: dict[str, Any], found: dict[str, Any]) -> None:
    """Restore the relations between sizes that a family asserts: full-rank heads, rotary lengths, groups of experts."""
    if config.get("num_key_value_heads") == config.get("num_attention_heads"):
        found["num_key_value_heads"] = found.get("num_attention_heads", 4)
    if "qk_head_dim" in config:
        found["qk_head_dim"] = found["head_dim"] = found["qk_nope_head_dim"] + found["qk_rope_head_dim"]
    if config.get("n_group", 1) > 1:
        found |= {"n_group": 2, "topk_group": 1, "n_routed_experts": 8}
    heads = found.get("num_attention_heads", 4)
    dim = found.get("head_dim") or found.get("hidden_size", 64) // heads
    rotary = int(dim * (config.get("partial_rotary_factor") or 1.0)) // 2
    for scaling in (found.get("rope_scaling"), found.get("rope_parameters")):
        for key in ("short_factor", "long_factor"):
            if scaling and key in scaling:
                scaling[key] = scaling[key][:rotary]
        if scaling and "mrope_section" in scaling:
            part = int(dim * scaling.get("partial_rotary_factor", 1.0)) // 2
            scaling["mrope_section"] = [part - 2 * (part // 3), part // 3, part // 3]
        if scaling and "original_max_position_embeddings" in scaling:
            scaling["original_max_position_embeddings"] = 64
    if "original_max_position_embeddings" in config:
        found["original_max_position_embeddings"] = 64
    if config.get("model_type") in ("granitemoehybrid", "bamba"):
        found["mamba_d_head"] = found["mamba_expand"] * found["hidden_size"] // found["mamba_n_heads"]
    if config.get("model_type") == "deepseek_v4":
        found |= {"o_groups": 2, "qk_rope_head_dim": 8}


def build(config: PretrainedConfig, seed: int = 0) -> PreTrainedModel:
    """Return a random float32 model in evaluation mode; biases and norms are moved from where they start."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.is_floating_point() or name.endswith(("A_log", "dt_bias", "conv1d.weight", "correction_bias")):
                continue
            if parameter.ndim > 1:
                parameter.normal_(0, 0.1)
            elif not name.endswith(".D"):
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model
