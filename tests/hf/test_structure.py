"""describe(): every parameter is a site, or skipped for a stated reason."""

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from quantkit.errors import SpecError
from quantkit.hf.structure import NO_INTERFACE, describe
from quantkit.nn.sites import Structure, read_weight
from tests.tiny import FAMILIES, MOE_FAMILIES, build, tiny_llama

DENSE_SITES = {
    "llama": "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj",
    "phi3": "o_proj qkv_proj gate_up_proj down_proj",
    "gpt2": "c_attn c_proj c_fc c_proj",
    "gpt_neox": "query_key_value dense dense_h_to_4h dense_4h_to_h",
    "opt": "k_proj v_proj q_proj out_proj fc1 fc2",
    "falcon": "query_key_value dense dense_h_to_4h dense_4h_to_h",
    "qwen3_moe": "q_proj k_proj v_proj o_proj gate_up_proj down_proj",
}


def names(structure: Structure) -> list[str]:
    return [f"{site.module}.{site.parameter}" for site in (*structure.sites, *structure.outside)] + list(structure.skipped)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_is_accounted_for_exactly_once(family: str) -> None:
    model = FAMILIES[family]()
    structure = describe(model)
    assert sorted(names(structure)) == sorted(name for name, _ in model.named_parameters(remove_duplicate=False))
    assert len(structure.blocks) == model.config.num_hidden_layers
    for site in (*structure.sites, *structure.outside):
        assert read_weight(model, site).shape == site.shape
        assert site.in_features % 32 == 0
    for block in structure.blocks:
        assert block.sites
        assert all(site.module.startswith(f"{block.name}.") for site in block.sites)
    assert not [name for name, reason in structure.skipped.items() if reason.startswith(("2-D", "3-D"))]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_meta_model_has_the_same_structure(family: str) -> None:
    real = FAMILIES[family]()
    with torch.device("meta"):
        meta = AutoModelForCausalLM.from_config(real.config)
    assert next(meta.parameters()).is_meta
    assert describe(meta) == describe(real)


@pytest.mark.parametrize(("family", "expected"), DENSE_SITES.items())
def test_sites_of_a_block(family: str, expected: str) -> None:
    first = describe(FAMILIES[family]()).blocks[0]
    assert [site.name.split(".")[-1] for site in first.sites] == expected.split()


def test_a_site_is_seen_the_way_it_multiplies() -> None:
    model = FAMILIES["gpt2"]()
    for site in describe(model).sites:
        module, x = model.get_submodule(site.module), torch.randn(3, site.in_features)
        assert isinstance(module, Conv1D)
        assert site.transposed
        torch.testing.assert_close(module(x), functional.linear(x, read_weight(model, site), module.bias))


@pytest.mark.parametrize("family", MOE_FAMILIES)
def test_expert_stacks_are_sites_and_routers_are_not(family: str) -> None:
    model = FAMILIES[family]()
    structure = describe(model)
    stacks = {site.name.split(".")[-1]: site for site in structure.blocks[0].sites if len(site.shape) == 3}
    assert stacks["gate_up_proj"].shape == (4, 192, 64)
    assert stacks["down_proj"].shape == (4, 64, 96)
    assert {site.transposed for site in stacks.values()} == {family == "gpt_oss"}
    routers = [name for name, reason in structure.skipped.items() if reason == "router"]
    assert len(routers) == model.config.num_hidden_layers


@pytest.mark.parametrize(
    ("model_type", "config", "routers"),
    [
        (
            "qwen2_moe",
            {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32},
            ["mlp.gate.weight", "mlp.shared_expert_gate.weight"],
        ),
        ("afmoe", {"num_experts": 4, "num_dense_layers": 1, "num_hidden_layers": 2}, ["mlp.router.gate.weight"]),
        ("phimoe", {"num_local_experts": 4}, ["mlp.router.weight"]),
        ("ernie4_5_moe", {"moe_num_experts": 4, "moe_layer_start_index": 1}, ["mlp.gate.weight"]),
        ("granitemoe", {"num_local_experts": 4}, ["block_sparse_moe.router.weight"]),
    ],
)
def test_routers_are_found_where_they_are_linear_layers_or_wrap_one(
    model_type: str, config: dict[str, object], routers: list[str]
) -> None:
    with torch.device("meta"):
        model = _meta(model_type, **config)
    structure = describe(model)
    last = f"{structure.blocks[-1].name}."
    assert [
        n.removeprefix(last) for n, reason in structure.skipped.items() if reason == "router" and n.startswith(last)
    ] == routers
    assert any(len(site.shape) == 3 for site in structure.sites)
    assert any(site.name.endswith("q_proj") for site in structure.sites)


def _meta(model_type: str, **config: object) -> PreTrainedModel:
    values = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 96}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **{**values, "intermediate_size": 64, **config}))


def test_experts_off_the_interface_are_listed_not_dropped() -> None:
    with torch.device("meta"):
        model = _meta("llama4_text", num_local_experts=4, intermediate_size_mlp=64, interleave_moe_layer_step=1, head_dim=16)
    structure = describe(model)
    off = [name for name, reason in structure.skipped.items() if reason == NO_INTERFACE]
    assert set(off) <= structure.unreachable
    assert sorted({name.split(".")[-1] for name in off}) == ["down_proj", "gate_up_proj"]
    assert len(off) == 4
    assert sum(reason == "router" for reason in structure.skipped.values()) == 2
    assert any(site.name.endswith("shared_expert.down_proj") for site in structure.sites)


def test_the_router_of_a_list_of_experts_and_a_convolution_are_skipped() -> None:
    model = tiny_llama()
    for layer in model.model.layers:
        layer.mlp = nn.ModuleDict(
            {
                "gate": nn.Linear(64, 3),
                "experts": nn.ModuleList(nn.Linear(64, 64) for _ in range(3)),
                "shared": nn.Sequential(nn.Linear(64, 3), nn.Linear(3, 64)),
                "conv": nn.Conv1d(3, 3, 3),
            }
        )
    structure = describe(model)
    of_mlp = {n.split("mlp.")[1]: reason for n, reason in structure.skipped.items() if n.startswith("model.layers.0.mlp")}
    weights = {name: reason for name, reason in of_mlp.items() if reason != "bias"}
    assert weights == {"gate.weight": "router", "conv.weight": "convolution"}
    sites = [site.name.split("mlp.")[1] for site in structure.blocks[0].sites if "mlp" in site.name]
    assert sites == ["experts.0", "experts.1", "experts.2", "shared.0", "shared.1"]


def test_a_tied_head_is_skipped_and_an_untied_one_is_outside() -> None:
    tied, untied = describe(FAMILIES["llama_tied"]()), describe(FAMILIES["llama"]())
    assert tied.skipped["lm_head.weight"] == "tied to model.embed_tokens.weight"
    assert tied.skipped["model.embed_tokens.weight"] == "embedding"
    assert not tied.outside
    assert [site.name for site in untied.outside] == ["lm_head"]


def test_of_layers_that_share_a_weight_the_first_is_a_site_and_the_others_are_counted_there() -> None:
    model = tiny_llama()
    a, b = (layer.mlp.up_proj for layer in model.model.layers)
    b.weight = a.weight
    structure = describe(model)
    assert "model.layers.0.mlp.up_proj" in {site.name for site in structure.sites}
    assert structure.skipped["model.layers.1.mlp.up_proj.weight"] == "tied to model.layers.0.mlp.up_proj.weight"
    assert structure.shared == {"model.layers.1.mlp.up_proj.weight"}


class Doubled(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


class Renamed(nn.Linear):
    def forward(self, value: torch.Tensor) -> torch.Tensor:
        return value @ self.weight.T + self.bias


class Raising(nn.Linear):
    def forward(self, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * scale


def test_a_linear_subclass_is_a_site_only_if_it_computes_what_a_linear_layer_does() -> None:
    model = tiny_llama()
    for layer in model.model.layers:
        layer.mlp.up_proj, layer.mlp.down_proj, layer.mlp.gate_proj = Doubled(64, 96), Renamed(96, 64), Raising(64, 96)
    structure = describe(model)
    assert structure.skipped["model.layers.0.mlp.gate_proj.weight"] == "Raising is not a plain linear layer"
    assert structure.skipped["model.layers.1.mlp.up_proj.weight"] == "Doubled is not a plain linear layer"
    assert {"model.layers.0.mlp.gate_proj.weight", "model.layers.1.mlp.up_proj.weight"} <= structure.unreachable
    assert "model.layers.1.mlp.down_proj" in {site.name for site in structure.sites}


def test_a_weight_that_is_not_floating_is_skipped_with_its_dtype() -> None:
    model = tiny_llama()
    packed = nn.Parameter(torch.zeros(96, 64, dtype=torch.uint8), requires_grad=False)
    model.model.layers[0].mlp.up_proj.weight = packed
    assert describe(model).skipped["model.layers.0.mlp.up_proj.weight"] == "weight is torch.uint8, not floating point"


def test_the_text_decoder_of_a_multimodal_model_is_the_stack() -> None:
    text = {"hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 64, "num_attention_heads": 4, "vocab_size": 96}
    vision = {"hidden_size": 96, "num_hidden_layers": 4, "intermediate_size": 256, "num_attention_heads": 4}
    config = AutoConfig.for_model("gemma3", text_config=text, vision_config=vision)
    structure = describe(AutoModelForCausalLM.from_config(config))
    assert [block.name for block in structure.blocks] == ["model.language_model.layers.0", "model.language_model.layers.1"]
    assert all("vision" in site.name for site in structure.outside)


def test_models_without_repeated_layers_or_weights_are_refused() -> None:
    with pytest.raises(SpecError, match="Linear: no repeated layers"):
        describe(nn.Linear(4, 4))
    stack = nn.Module()
    stack.layers = nn.ModuleList([nn.LayerNorm(4), nn.LayerNorm(4)])
    with pytest.raises(SpecError, match=r"nothing to quantize in layers \(2 layers\).*bias, norm"):
        describe(stack)


def test_an_encoder_decoder_is_refused() -> None:
    config = AutoConfig.for_model("t5", d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4, vocab_size=64)
    with torch.device("meta"), pytest.raises(SpecError, match="T5ForConditionalGeneration is an encoder-decoder"):
        describe(AutoModelForSeq2SeqLM.from_config(config))


def test_a_single_layer_is_a_stack() -> None:
    assert len(describe(build("llama", num_hidden_layers=1)).blocks) == 1
