"""Lowering: which families are claimed, that a claim is right, and that what a program does not describe is refused by name."""

import copy

import pytest
import torch
from torch import nn

from quantkit import Engine, load, quantize
from quantkit.hf.lowering.lower import CannotLower, lower
from quantkit.hf.native import native_decoder
from quantkit.hf.structure import describe
from quantkit.kernels.cpu.decoder import KvPages, Rows
from quantkit.kernels.program import reference
from quantkit.kernels.program.definition import Experts
from quantkit.nn.install import install
from quantkit.nn.sites import read_weight
from quantkit.numerics import grid
from quantkit.qtensor import GridTensor
from quantkit.spec import QuantSpec
from tests.tiny import FAMILIES, VOCAB, build, tiny_llama

CLAIMED = [name for name in FAMILIES if name not in ("gpt2", "gpt_neox", "opt", "falcon", "gpt_oss")]
"""Families of tests/tiny.py; the five others are refused below."""

MORE = {
    "arcee": {},
    "cohere": {"logit_scale": 0.25},
    "cohere2": {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
    "ernie4_5": {},
    "exaone4": {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
    "gemma": {},
    "glm": {"partial_rotary_factor": 0.5},
    "glm4": {"partial_rotary_factor": 0.5},
    "granite": {"embedding_multiplier": 6.0, "residual_multiplier": 0.3, "attention_multiplier": 0.1, "logits_scaling": 4.0},
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2, "residual_multiplier": 0.5},
    "helium": {},
    "nemotron": {},
    "olmo": {"head_dim": None},
    "olmo3": {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "phi": {"partial_rotary_factor": 0.5},
    "seed_oss": {},
    "stablelm": {"partial_rotary_factor": 0.25, "use_parallel_residual": True},
}
"""Families beyond those of tests/tiny.py, each with the option that makes it special."""

ROPES = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
}


def some_ids(count: int = 40) -> torch.Tensor:
    return torch.randint(3, VOCAB, (count,), generator=torch.Generator().manual_seed(7))


def assert_same_logits(model: nn.Module, ids: torch.Tensor) -> None:
    with torch.inference_mode():
        want = model(ids[None], use_cache=False).logits[0]
    assert want.std() > 1e-3
    torch.testing.assert_close(reference.logits(lower(model), ids), want, atol=2e-5, rtol=2e-4)


@pytest.mark.parametrize("family", CLAIMED)
def test_a_program_computes_what_the_model_does(family):
    # Older releases let torch's own function attend for gemma2, which leaves the soft cap of the scores out.
    options = {"attn_implementation": "eager"} if family == "gemma2" else {}
    assert_same_logits(FAMILIES[family](**options), some_ids())


@pytest.mark.parametrize("family", MORE)
def test_so_it_does_in_families_no_one_named(family):
    assert_same_logits(build(family, **MORE[family]), some_ids())


@pytest.mark.parametrize("rope", ROPES)
def test_scaled_rotary_embeddings_are_the_models_own(rope):
    assert_same_logits(tiny_llama(rope_parameters={"rope_theta": 10000.0, **ROPES[rope]}), some_ids(120))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_are_recognised_through_their_rounding(dtype):
    for family in ("llama", "gemma2", "qwen3", "phi3"):
        model = FAMILIES[family]()
        facts = lower(model)
        found = lower(model.to(dtype))
        assert [type(layer.mlp) for layer in found.layers] == [type(layer.mlp) for layer in facts.layers]
        for got, want in zip(found.layers, facts.layers, strict=True):
            assert got.mlp.activation == want.mlp.activation
            assert got.attention.window == want.attention.window
            assert got.attention.rotary == want.attention.rotary
            assert got.attention_in.eps == want.attention_in.eps
        assert found.embedding_scale == pytest.approx(facts.embedding_scale, rel=4e-3)


def test_facts_of_a_sandwich():
    program = lower(FAMILIES["gemma2"]())
    assert program.embedding_scale == 8.0
    assert program.logit_softcap == 30.0
    first, second = program.layers[:2]
    assert (first.attention.window, second.attention.window) == (8, None)
    assert (first.attention.heads, first.attention.kv_heads, first.attention.head_dim) == (4, 2, 16)
    assert first.attention.softcap == 50.0
    assert first.mlp.activation == "gelu_tanh"
    assert None not in (first.attention_in, first.attention_out, first.mlp_in, first.mlp_out)


def test_facts_of_a_mixture_and_of_layers_without_positions():
    moe = lower(FAMILIES["qwen3_moe"]()).layers[0].mlp
    assert isinstance(moe, Experts)
    assert (len(moe.experts), moe.top_k, moe.normalize) == (4, 2, True)
    assert not lower(FAMILIES["qwen3_moe"](norm_topk_prob=False)).layers[0].mlp.normalize
    assert [layer.attention.rotary for layer in lower(FAMILIES["smollm3"]()).layers] == [0, None]
    gemma3 = lower(FAMILIES["gemma3"]())
    assert len(gemma3.rotaries) == 2
    assert len({layer.attention.rotary for layer in gemma3.layers}) == 2


def test_weights_are_shared_and_tied_ones_once():
    model = FAMILIES["llama_tied"]()
    program = lower(model)
    assert program.head.weight.data_ptr() == program.embedding.data_ptr() == model.lm_head.weight.data_ptr()
    assert program.layers[0].attention.qkv[0].weight.data_ptr() == model.model.layers[0].self_attn.q_proj.weight.data_ptr()
    assert program.layers[0].attention.qkv[0].bias is not None


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("gpt2", "learned positions"),
        ("opt", "learned positions"),
        ("gpt_neox", "the values are not the output, or the last part"),
        ("falcon", "attention interface"),
        ("gpt_oss", "s_aux"),
    ],
)
def test_what_no_program_describes_is_refused_by_name(family, reason):
    with pytest.raises(CannotLower, match=reason):
        lower(FAMILIES[family]())


@pytest.mark.parametrize(
    ("family", "options", "reason"),
    [
        ("olmo", {"head_dim": None, "clip_qkv": 8.0}, "clip_qkv"),
        (
            "llama4_text",
            {
                "layer_types": ["chunked_attention"] * 2,
                "num_local_experts": 2,
                "intermediate_size_mlp": 96,
                "interleave_moe_layer_step": 1,
                "attention_chunk_size": 8,
            },
            "chunked attention",
        ),
        ("bloom", {"head_dim": None, "num_key_value_heads": None, "n_layer": 2, "n_head": 4}, "attention interface"),
        (
            "qwen2_moe",
            {
                "num_experts": 4,
                "moe_intermediate_size": 32,
                "shared_expert_intermediate_size": 32,
                "num_experts_per_tok": 2,
                "head_dim": None,
            },
            "output is not its residual stream plus",
        ),
    ],
)
def test_features_that_are_refused(family, options, reason):
    with pytest.raises(CannotLower, match=reason):
        lower(build(family, **options))


class Doubled(nn.Linear):
    def forward(self, x):
        return 1.0001 * super().forward(x)


def test_a_layer_that_only_looks_linear_is_not_taken_for_one():
    model = tiny_llama()
    layer = model.model.layers[1].mlp
    doubled = Doubled(64, 96, bias=False)
    doubled.weight = layer.up_proj.weight
    layer.up_proj = doubled
    with pytest.raises(CannotLower, match="layer 1"):
        lower(model)


def test_the_proof_catches_what_the_reading_did_not():
    """A layer of another make: its last step scales the output, by a number that no fact could explain."""
    model = tiny_llama()
    original = model.model.layers[1].forward
    model.model.layers[1].forward = lambda x, *args, **kwargs: original(x, *args, **kwargs) + 0.01 * x.roll(1, 0).sin()
    with pytest.raises(CannotLower, match="layer 1"):
        lower(model)


def test_far_positions_are_proven_too():
    """Queries that grow with the position (beyond the first thousands) look like plain ones at the beginning."""
    model = tiny_llama(max_position_embeddings=4096)
    rotary = model.model.rotary_emb
    plain = rotary.forward

    def growing(x, position_ids):
        cos, sin = plain(x, position_ids)
        return cos, sin + (position_ids > 2000)[..., None] * 0.1 * (x.sum() != 0)

    rotary.forward = growing
    with pytest.raises(CannotLower, match="layer 0"):
        lower(model)


def test_lowering_leaves_the_model_as_it_was():
    model = FAMILIES["gemma3"]()
    before, state = model.config._attn_implementation, copy.deepcopy(model.state_dict())
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    lower(model)
    assert model.config._attn_implementation == before
    assert [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()] == hooks
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("family", ["llama", "phi3", "mixtral"])
def test_quantized_models_are_lowered_with_their_modules(family):
    model = FAMILIES[family]()
    spec = QuantSpec("int4", (1, 32))
    for site in describe(model).sites:
        weight = read_weight(model, site).float()
        scale, zero = grid.choose_qparams(weight, spec)
        install(model, site, GridTensor.from_codes(grid.quantize(weight, scale, zero, spec), scale, zero, spec))
    if family == "mixtral":
        from quantkit.hf.experts import enable_experts

        enable_experts(model)
    program = lower(model)
    assert not isinstance(program.layers[0].attention.out.weight, torch.Tensor)
    assert_same_logits(model, some_ids())


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_layers_that_round_their_inputs_run_natively_with_and_without(family, tmp_path):
    model = FAMILIES[family]()
    quantize(model, "w8a8", out=tmp_path / "x", method="rtn")
    plain = load(tmp_path / "x", ignore_activations=True)
    assert_same_logits(plain, some_ids(20))
    assert [Engine(one).backend.engine for one in (model, plain)] == ["native", "native"]
    with torch.inference_mode():
        rounded, exact = (one(torch.as_tensor(some_ids(20))[None]).logits[0] for one in (model, plain))
    decoder = native_decoder(model)
    rows = Rows(torch.as_tensor(some_ids(20)), range(20), [0] * 20, torch.zeros(1, 1, dtype=torch.int32), range(20))
    ours = decoder.run(rows, KvPages(decoder.program, 1))
    assert (ours - rounded).abs().mean() < 0.3 * (exact - rounded).abs().mean()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_mixtures_whose_routers_round(family, dtype):
    """Rounded routers choose other experts here and there; the program is proven on rows where the choice is clear."""
    many = {"num_experts" if family == "qwen3_moe" else "num_local_experts": 64, "num_experts_per_tok": 6}
    model = FAMILIES[family](**many).to(dtype)
    moe = lower(model).layers[0].mlp
    assert isinstance(moe, Experts)
    assert (len(moe.experts), moe.top_k) == (64, 6)
    x = torch.randn(500, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    exact, rounded = (
        nn.functional.linear(x, moe.router.weight.to(x.dtype)).topk(6, -1).indices.sort(-1).values for x in (x.float(), x)
    )
    assert dtype == torch.float16 or not torch.equal(exact, rounded)
    model.model.layers[0].mlp.experts.act_fn = nn.Softsign()
    with pytest.raises(CannotLower, match="experts are not feed-forward networks"):
        lower(model)
