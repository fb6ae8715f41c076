"""Tiny float directories like those of today's models: with vision towers, next-token-prediction layers, and files beside them.

The configs are public models' with the sizes shrunk and every odd key kept.
"""

import json
import os
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Gemma3Processor, PreTrainedModel, PreTrainedTokenizerFast
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

from quantkit.hf.load import read_config
from tests.tiny import VOCAB, shake, tiny_tokenizer

IMAGE, BEGIN, END = 165, 166, 167
_ENDS = {"boi_token_index": BEGIN, "eoi_token_index": END, "image_token_index": IMAGE}

CONFIGS: dict[str, dict[str, Any]] = {
    "qwen3_5": {
        "architectures": ["Qwen3_5ForConditionalGeneration"],
        "model_type": "qwen3_5",
        "image_token_id": IMAGE,
        "video_token_id": 168,
        "vision_start_token_id": BEGIN,
        "vision_end_token_id": END,
        "tie_word_embeddings": False,
        "text_config": {
            "model_type": "qwen3_5_text",
            "attention_bias": False,
            "attn_output_gate": True,
            "dtype": "float32",
            "eos_token_id": 2,
            "full_attention_interval": 4,
            "head_dim": 16,
            "hidden_act": "silu",
            "hidden_size": 64,
            "intermediate_size": 96,
            "layer_types": ["linear_attention", "full_attention"],
            "linear_conv_kernel_dim": 4,
            "linear_key_head_dim": 16,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_value_head_dim": 16,
            "max_position_embeddings": 512,
            "mlp_only_layers": [],
            "mtp_num_hidden_layers": 1,
            "mtp_use_dedicated_embeddings": False,
            "num_attention_heads": 4,
            "num_hidden_layers": 2,
            "num_key_value_heads": 2,
            "vocab_size": VOCAB,
            "mamba_ssm_dtype": "float32",
            "rope_parameters": {
                "mrope_interleaved": True,
                "mrope_section": [1, 1, 0],
                "rope_type": "default",
                "rope_theta": 10000000,
                "partial_rotary_factor": 0.25,
            },
        },
        "vision_config": {
            "deepstack_visual_indexes": [],
            "depth": 2,
            "hidden_act": "gelu_pytorch_tanh",
            "hidden_size": 32,
            "in_channels": 3,
            "intermediate_size": 64,
            "model_type": "qwen3_5",
            "num_heads": 2,
            "num_position_embeddings": 16,
            "out_hidden_size": 64,
            "patch_size": 4,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
    },
    "gemma3": {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "model_type": "gemma3",
        "mm_tokens_per_image": 4,
        "dtype": "float32",
        **_ENDS,
        "text_config": {
            "model_type": "gemma3_text",
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_attention_heads": 4,
            "head_dim": 16,
            "num_hidden_layers": 2,
            "num_key_value_heads": 2,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            "sliding_window": 8,
            "sliding_window_pattern": 2,
            "vocab_size": VOCAB,
            "query_pre_attn_scalar": 16,
            "rope_theta": 1000000.0,
            "rope_local_base_freq": 10000.0,
            "final_logit_softcapping": None,
            "max_position_embeddings": 512,
        },
        "vision_config": {
            "model_type": "siglip_vision_model",
            "hidden_size": 32,
            "image_size": 32,
            "intermediate_size": 64,
            "num_attention_heads": 2,
            "num_hidden_layers": 2,
            "patch_size": 8,
            "vision_use_head": False,
        },
    },
    "llama4": {
        "architectures": ["Llama4ForConditionalGeneration"],
        "model_type": "llama4",
        "dtype": "float32",
        **_ENDS,
        "text_config": {
            "attention_bias": False,
            "attention_chunk_size": 64,
            "head_dim": 16,
            "hidden_act": "silu",
            "hidden_size": 64,
            "interleave_moe_layer_step": 2,
            "intermediate_size": 96,
            "intermediate_size_mlp": 128,
            "max_position_embeddings": 512,
            "model_type": "llama4_text",
            "num_attention_heads": 4,
            "num_experts_per_tok": 1,
            "num_hidden_layers": 2,
            "num_key_value_heads": 2,
            "num_local_experts": 4,
            "rope_scaling": {
                "factor": 16.0,
                "high_freq_factor": 1.0,
                "low_freq_factor": 1.0,
                "original_max_position_embeddings": 256,
                "rope_type": "llama3",
            },
            "rope_theta": 500000.0,
            "use_qk_norm": True,
            "vocab_size": VOCAB,
            "pad_token_id": 0,
        },
        "vision_config": {
            "model_type": "llama4_vision_model",
            "hidden_size": 32,
            "image_size": 32,
            "intermediate_size": 128,
            "num_attention_heads": 2,
            "num_hidden_layers": 2,
            "patch_size": 8,
            "vision_output_dim": 64,
            "projector_input_dim": 64,
            "projector_output_dim": 64,
            "pixel_shuffle_ratio": 0.5,
        },
    },
    "deepseek_v3": {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "attention_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "dtype": "float32",
        "first_k_dense_replace": 1,
        "hidden_act": "silu",
        "hidden_size": 64,
        "intermediate_size": 96,
        "kv_lora_rank": 32,
        "max_position_embeddings": 2560,
        "moe_intermediate_size": 32,
        "moe_layer_freq": 1,
        "n_group": 2,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "num_attention_heads": 4,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 2,
        "num_key_value_heads": 4,
        "num_nextn_predict_layers": 1,
        "q_lora_rank": 32,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 16,
        "rope_scaling": {
            "beta_fast": 32,
            "beta_slow": 1,
            "factor": 40,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 64,
            "type": "yarn",
        },
        "rope_theta": 10000,
        "routed_scaling_factor": 2.5,
        "scoring_func": "sigmoid",
        "tie_word_embeddings": False,
        "topk_group": 2,
        "topk_method": "noaux_tc",
        "v_head_dim": 16,
        "vocab_size": VOCAB,
    },
}

_MTP = ("input_layernorm.weight", "self_attn.q_proj.weight", "mlp.down_proj.weight")
EXTRA: dict[str, tuple[str, ...]] = {
    "qwen3_5": ("mtp.fc.weight", "mtp.norm.weight", *(f"mtp.layers.0.{name}" for name in _MTP)),
    "gemma3": (),
    "llama4": (),
    "deepseek_v3": (
        *(f"model.layers.2.{name}" for name in ("eh_proj.weight", "enorm.weight", "hnorm.weight", "embed_tokens.weight")),
        "model.layers.2.shared_head.head.weight",
        "model.layers.2.mlp.experts.3.up_proj.weight",
        "model.layers.2.mlp.gate.e_score_correction_bias",
        *(f"model.layers.2.{name}" for name in _MTP[:2]),
    ),
}
"""Tensors that the class does not know, by model."""


def write(name: str, path: Path) -> PreTrainedModel:
    """Write a float directory of a random model with tensors that its class does not know; return the model."""
    values = CONFIGS[name]
    config = read_config(values, path)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: PreTrainedModel = getattr(transformers, values["architectures"][0])._from_config(config, dtype=torch.float32)
        shake(model)
        model.save_pretrained(path)
        tensors = load_file(path / "model.safetensors")
        for extra in EXTRA[name]:
            tensors[extra] = torch.randn((8, 4) if "norm" not in extra and "bias" not in extra else (8,))
            tensors[extra] = tensors[extra].to(torch.bfloat16 if "norm" in extra else torch.float32)
        save_file(tensors, path / "model.safetensors", {"format": "pt"})
    return model.eval()


_TOKENS: dict[str, dict[str, str]] = {
    "gemma3": {"image_token": "<image>", "boi_token": "<boi>", "eoi_token": "<eoi>"},
    "qwen3_5": {
        "image_token": "<|image_pad|>",
        "vision_start_token": "<|vision_start|>",
        "vision_end_token": "<|vision_end|>",
        "video_token": "<|video_pad|>",
    },
    "llama4": {"patch_token": "<|patch|>", "boi_token": "<|image_start|>", "eoi_token": "<|image_end|>", "image": "<|image|>"},
    "deepseek_v3": {},
}
"""Tokens for images by their name in the tokenizer; the first three are IMAGE, BEGIN and END."""
ABOUT_AN_IMAGE = {
    "gemma3": "the cat <boi> sat",
    "qwen3_5": "the cat <|vision_start|><|image_pad|><|vision_end|> sat",
    "llama4": "the cat <|image|> sat",
}
"""A text with a place for an image, as each processor wants it."""


def tokenizer_of(name: str) -> PreTrainedTokenizerFast:
    """Return the tiny tokenizer with a model's tokens for images."""
    ends = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
    own, tokens = tiny_tokenizer().backend_tokenizer, _TOKENS[name]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=own, model_max_length=512, extra_special_tokens=tokens, **ends)
    assert tokenizer.convert_tokens_to_ids(list(tokens.values())[:3]) == [IMAGE, BEGIN, END][: len(tokens)]
    return tokenizer


_QWEN = {"patch_size": 4, "temporal_patch_size": 2, "merge_size": 2, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
_LLAMA = {"size": {"height": 32, "width": 32}, "max_patches": 1, "resize_to_max_canvas": False}
PROCESSORS: dict[str, dict[str, dict[str, Any]]] = {
    "qwen3_5": {
        "preprocessor_config.json": {
            "processor_class": "Qwen3VLProcessor",
            "image_processor_type": "Qwen2VLImageProcessor",
            "size": {"shortest_edge": 256, "longest_edge": 1024},
            **_QWEN,
        },
        "video_preprocessor_config.json": {"video_processor_type": "Qwen3VLVideoProcessor", **_QWEN},
    },
    "llama4": {
        "preprocessor_config.json": {
            "processor_class": "Llama4Processor",
            "image_processor_type": "Llama4ImageProcessor",
            **_LLAMA,
        },
        "processor_config.json": {"processor_class": "Llama4Processor", "patch_size": 8, "pixel_shuffle_ratio": 0.5},
    },
}
"""Files of processors that can be made only where torchvision is, by model."""


def write_files(name: str, path: Path) -> None:
    """Write the tokenizer or processor of a model, and files that must and must not travel, into a directory."""
    tokenizer = tokenizer_of(name)
    tokenizer.save_pretrained(path)
    for file, values in PROCESSORS.get(name, {}).items():
        (path / file).write_text(json.dumps(values, indent=2) + "\n\n")
    if name == "gemma3":
        image = Gemma3ImageProcessorPil(size={"height": 32, "width": 32})
        Gemma3Processor(image, tokenizer, chat_template="{{ messages }}", image_seq_length=4).save_pretrained(path)
        (path / "preprocessor_config.json").write_text(image.to_json_string() + "\n\n")
    (path / "LICENSE.txt").write_text("do what you like\n")
    (path / "tokenizer.model").write_bytes(b"\x00\x01binary")
    (path / "modeling_evil.py").write_text("raise SystemExit")
    (path / ".hidden.jinja").write_text("hidden")
    (path / "consolidated.safetensors").write_bytes(b"another format")
    outside = path.parent / "secret"
    outside.write_text("secret")
    os.symlink(outside, path / "NOTICE")


def inputs(name: str, *, image: bool, seed: int = 1) -> dict[str, Tensor]:
    """Return what a model is called with: text, or the same text about an image; others for another seed."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(4, 160, (1, 12), generator=generator)
    if not image:
        return {"input_ids": text}
    count = 4
    ids = torch.cat([text[:, :3], torch.tensor([[BEGIN, *[IMAGE] * count, END]]), text[:, 3:]], 1)
    if name == "qwen3_5":  # 4 x 4 patches of 3 channels, 2 frames, 4 x 4 pixels; merged 2 x 2
        patches = torch.randn((16, 3 * 2 * 4 * 4), generator=generator)
        grid, kinds = torch.tensor([[1, 4, 4]]), (ids == IMAGE).long()
        return {"input_ids": ids, "pixel_values": patches, "image_grid_thw": grid, "mm_token_type_ids": kinds}
    found = {"input_ids": ids, "pixel_values": torch.randn((1, 3, 32, 32), generator=generator)}
    return found | ({"token_type_ids": (ids == IMAGE).long()} if name == "gemma3" else {})
