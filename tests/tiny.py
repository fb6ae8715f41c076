"""Tiny random causal language models, one per family, and a tokenizer to go with them: no network, fractions of a second.

Every model is float32, in evaluation mode, seeded, hidden size 64, two or three layers, and has input sizes that a group of
32 divides. Biases and norms are moved away from zero and one, so that a test notices when one of them is lost.
"""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

VOCAB = 192

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_MHA = {"num_key_value_heads": None, "head_dim": None}
_MOE_PLAIN = {"num_experts_per_tok": 2, "num_local_experts": 4}
_MOE = {"num_experts_per_tok": 2, "num_experts": 4, "moe_intermediate_size": 96}
_ALTERNATING = {
    "num_hidden_layers": 3,
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
_YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}

# family -> (model type, what differs from _COMMON; None removes a key that the family's config does not know)
_OVERRIDES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama_tied": ("llama", {"tie_word_embeddings": True, "attention_bias": True}),
    "mistral": ("mistral", {"sliding_window": 8}),
    "qwen2": ("qwen2", {"head_dim": None}),
    "qwen3": ("qwen3", {"tie_word_embeddings": True}),
    "gemma2": ("gemma2", {**_ALTERNATING, "query_pre_attn_scalar": 16, "tie_word_embeddings": True}),
    "gemma3": ("gemma3_text", {**_ALTERNATING, "query_pre_attn_scalar": 16, "tie_word_embeddings": True}),
    "phi3": ("phi3", {"head_dim": None, "sliding_window": 8}),
    "gpt2": ("gpt2", {**_MHA, "n_inner": 128, "intermediate_size": None, "tie_word_embeddings": True}),
    "gpt_neox": ("gpt_neox", {**_MHA, "use_parallel_residual": True}),
    "opt": ("opt", {**_MHA, "ffn_dim": 128, "intermediate_size": None, "word_embed_proj_dim": 32, "tie_word_embeddings": True}),
    "falcon": ("falcon", {**_MHA, "intermediate_size": None, "multi_query": True, "tie_word_embeddings": True}),
    "olmo2": ("olmo2", {"head_dim": None}),
    "starcoder2": ("starcoder2", {"head_dim": None, "sliding_window": 8, "use_bias": True}),
    "mixtral": ("mixtral", _MOE_PLAIN),
    "qwen3_moe": ("qwen3_moe", {**_MOE, "norm_topk_prob": True}),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 0], "head_dim": None}),
    "gpt_oss": ("gpt_oss", {**_MOE_PLAIN, **_ALTERNATING, "rope_parameters": _YARN}),
}


@torch.no_grad()
def shake(model: PreTrainedModel) -> None:
    """Give every parameter random numbers: matrices small ones, biases and norms something beside what they are."""
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.normal_(0.0, 0.1)
        else:
            parameter.add_(torch.randn_like(parameter), alpha=0.1)


def build(model_type: str, *, seed: int = 0, **config: Any) -> PreTrainedModel:
    """Return a random float32 model of ``model_type`` with the given config values on top of the common ones.

    A test is skipped where this release of transformers does not know the type.
    """
    if model_type not in CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {model_type}")
    values = {key: value for key, value in {**_COMMON, **config}.items() if value is not None}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **values), dtype=torch.float32)
        shake(model)
    model.generation_config.pad_token_id = values["pad_token_id"]
    return model.eval()


def _family(name: str, **config: Any) -> PreTrainedModel:
    model_type, overrides = _OVERRIDES[name]
    return build(model_type, **{**overrides, **config})


FAMILIES: dict[str, Callable[..., PreTrainedModel]] = {name: functools.partial(_family, name) for name in _OVERRIDES}
"""Family name to a function that builds one tiny random model of it, the same every time; it takes config overrides."""

MOE_FAMILIES = ("mixtral", "qwen3_moe", "gpt_oss")
"""The families with 3-D expert stacks."""


def tiny_llama(**overrides: Any) -> PreTrainedModel:
    """Return a tiny llama; ``overrides`` are config values (or ``seed``)."""
    return build("llama", **overrides)


_WORDS = "the cat sat on a mat while one small dog ran over green hills under blue sky and sang of bread salt and rain"
TEXT = " . ".join(" ".join(_WORDS.split()[i % 7 :: 1 + i % 3]) for i in range(64)) + " ."
"""A little text whose words the tiny tokenizer knows."""


def tiny_tokenizer(vocab_size: int = VOCAB) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer trained on :data:`TEXT`; ASCII text survives encoding and decoding.

    Ids 0 to 3 are <pad>, <bos>, <eos>, <unk>; nothing is added to an encoded text. ``vocab_size`` is an upper bound.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = [chr(code) for code in range(33, 127)] + ["Ġ", "Ċ", "ĉ"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<pad>", "<bos>", "<eos>", "<unk>"],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
        model_max_length=_COMMON["max_position_embeddings"],
    )
