"""Architectures that do something unusual: quantized with calibration, and generating what their full forward says."""

import functools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from quantkit.calibrate.data import Calibration
from quantkit.errors import QuantkitError
from quantkit.generation.generate import generate
from quantkit.hf.experts import enable_experts
from quantkit.hf.structure import describe
from quantkit.nn.block_calls import why_entangled
from quantkit.pipeline.checks import prepare_blocks
from quantkit.pipeline.quantize import quantize
from quantkit.system.compute import Compute
from quantkit.transforms.scaling_groups import find_groups
from tests.tiny import VOCAB, build, tiny_llama

_PLAIN: dict[str, Any] = {"num_key_value_heads": None, "head_dim": None}


def dbrx() -> PreTrainedModel:
    """Its experts add what autocast rounded into a tensor that is not rounded."""
    kept = {"hidden_size": None, "intermediate_size": None, "num_hidden_layers": None, "num_attention_heads": None}
    attention = {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8}
    experts = {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2}
    sizes = {"d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 128, "attn_config": attention, "ffn_config": experts}
    return build("dbrx", **{**kept, **_PLAIN, "max_position_embeddings": None, **sizes})


def afmoe() -> PreTrainedModel:
    """It views what attention returns in another shape."""
    kinds = ["sliding_attention", "full_attention"]
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "num_dense_layers": 1}
    return build("afmoe", layer_types=kinds, sliding_window=8, **experts)


MODELS = {
    "norms without weights": lambda: build("olmo", head_dim=None),
    "attention viewed anew": afmoe,
    "a state of its own": lambda: build("rwkv", attention_hidden_size=64, **_PLAIN, max_position_embeddings=None),
}


@pytest.mark.parametrize("kind", MODELS)
def test_a_quantized_model_generates_what_its_forward_says(kind: str) -> None:
    ids = [torch.randint(3, VOCAB, (2, 24), generator=torch.Generator().manual_seed(i)) for i in range(2)]
    model: Any = quantize(MODELS[kind](), "w4a16", calibration=Calibration(data=ids)).model
    sequence = ids[0][:1, :11]
    with torch.no_grad():
        for _ in range(6):
            sequence = torch.cat([sequence, model(sequence, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    model.generation_config.eos_token_id = model.config.eos_token_id = None
    assert generate(model, ids[0][0, :11], max_new_tokens=6).ids == sequence[0, 11:].tolist()


def test_products_are_not_rounded_where_a_block_cannot_do_with_that(caplog: pytest.LogCaptureFixture) -> None:
    rounding = Compute(torch.device("cpu"), torch.float32, torch.bfloat16)
    for model, want in ((dbrx(), None), (tiny_llama(), torch.bfloat16)):
        enable_experts(model)
        structure, compute = prepare_blocks(model, describe(model), rounding)
        assert structure.entangled is None
        assert compute.products == want
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 1
    assert "DbrxForCausalLM: products are not rounded to torch.bfloat16, which is slower: transformer.blocks.0" in said[0]


def test_tokens_that_no_logit_belongs_to_are_not_drawn() -> None:
    """Some tables have rows for images or for the start of a sequence, which are never predicted."""
    model: Any = tiny_llama()
    model.model.embed_tokens = nn.Embedding(VOCAB * 4, 64)
    result = quantize(model, "w8a16", method="rtn")
    assert result.metadata["quality"]["kl_mean"] < 1e-3


def test_a_config_may_say_that_any_length_is_right() -> None:
    model: Any = tiny_llama()
    model.config.max_position_embeddings = -1
    assert quantize(model, "w8a16", method="rtn").metadata["quality"]["tokens"] > 0


def test_what_a_later_layer_reads_is_not_scaled() -> None:
    """Nothing of the block's own output would change, but what it leaves for another one does."""
    producers = []
    for shares in (False, True):
        model: Any = tiny_llama(num_key_value_heads=4)
        first, second = (layer.self_attn.v_proj for layer in model.model.layers)
        kept: list[Tensor] = []
        first.register_forward_hook(lambda _module, _args, output, kept=kept: kept.append(output))
        if shares:
            second.register_forward_hook(lambda _module, _args, output, kept=kept: output + kept[-1])
        structure = describe(model)
        structure = replace(structure, entangled=why_entangled(model, structure))
        assert (structure.entangled is not None) == shares
        groups = find_groups(model, structure, {site.name: site for site in structure.sites})
        producers.append({group.producer for group in groups})
    assert producers[0] - producers[1] == {f"model.layers.{i}.self_attn.v_proj" for i in (0, 1)}


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_a_model_that_wants_more_than_tokens_is_named(method: str) -> None:
    def part() -> PreTrainedModel:
        model = tiny_llama()
        plain = model.forward

        @functools.wraps(plain)
        def forward(*args: Any, shared_states: Any = None, **kwargs: Any) -> Any:
            if shared_states is None:
                raise ValueError("shared_states cannot be None")
            return plain(*args, **kwargs)

        model.forward = forward  # type: ignore[method-assign]
        return model

    ids = [torch.randint(3, VOCAB, (2, 24), generator=torch.Generator().manual_seed(0))]
    message = r"LlamaForCausalLM cannot be run on token ids alone: ValueError: shared_states cannot be None; give a causal"
    with pytest.raises(QuantkitError, match=message):
        quantize(part(), "w4a16", method=method, calibration=Calibration(data=ids))
    with pytest.raises(QuantkitError, match=message):
        generate(part(), ids[0][0], max_new_tokens=2)
