"""Our experts function computes what transformers' own loop does, for float and quantized stacks, and shows it to a probe."""

import copy

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, use_experts_implementation

from quantkit.hf.experts import enable_experts, expert_parameters, experts_forward, uses_experts_interface
from quantkit.hf.structure import describe
from quantkit.nn.install import install
from quantkit.nn.linear import QuantWeight
from quantkit.nn.probes import attach_probe
from quantkit.nn.sites import read_weight
from quantkit.numerics import grid
from quantkit.qtensor import GridTensor
from quantkit.spec import QuantSpec
from tests.tiny import FAMILIES, MOE_FAMILIES, VOCAB, tiny_llama

IDS = torch.randint(3, VOCAB, (2, 17), generator=torch.Generator().manual_seed(0))
SPEC = QuantSpec("int4", (1, 32))


def round_to_nearest(weight: Tensor, spec: QuantSpec = SPEC) -> GridTensor:
    scale, zero_point = grid.choose_qparams(weight, spec)
    return GridTensor.from_codes(grid.quantize(weight, scale, zero_point, spec), scale, zero_point, spec)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", MOE_FAMILIES)
@torch.no_grad()
def test_float_experts_equal_eager(family: str, dtype: torch.dtype) -> None:
    model = FAMILIES[family](experts_implementation="eager").to(dtype)
    want = model(IDS).logits
    switched = enable_experts(model)
    assert len(switched) == model.config.num_hidden_layers
    assert model.config._experts_implementation == "quantkit"
    assert all(uses_experts_interface(model.get_submodule(path)) for path in switched)
    got = model(IDS).logits
    tolerance = 1e-5 if dtype == torch.float32 else 0.1
    assert not torch.equal(got, torch.zeros_like(got))
    torch.testing.assert_close(got, want, rtol=0, atol=tolerance)


@pytest.mark.parametrize("family", MOE_FAMILIES)
@torch.no_grad()
def test_quantized_stacks_equal_float_experts_of_the_same_values(family: str) -> None:
    quantized = FAMILIES[family](experts_implementation="eager")
    reference = copy.deepcopy(quantized)
    float_logits = reference(IDS).logits
    for site in describe(quantized).sites:
        if len(site.shape) == 3:
            qtensor = round_to_nearest(read_weight(quantized, site))
            read_weight(reference, site).copy_(qtensor.dequantize())
            install(quantized, site, qtensor)
            assert isinstance(getattr(quantized.get_submodule(site.module), site.parameter), QuantWeight)
    enable_experts(quantized)
    got, want = quantized(IDS).logits, reference(IDS).logits
    torch.testing.assert_close(got, want, rtol=0, atol=1e-4)
    assert (got - float_logits).abs().max() > 1e-3


@pytest.mark.parametrize("family", MOE_FAMILIES)
@torch.no_grad()
def test_the_probe_sees_the_rows_of_each_expert_before_each_matmul(family: str) -> None:
    model = FAMILIES[family]()
    enable_experts(model)
    structure = describe(model)
    site = next(site for site in structure.sites if site.parameter == "gate_up_proj")
    module = model.get_submodule(site.module)
    routed: list[tuple[Tensor, Tensor]] = []
    module.register_forward_pre_hook(lambda _module, args: routed.append((args[0], args[1])))
    seen: list[tuple[str, Tensor, Tensor]] = []
    detach = attach_probe(module, lambda name, x, ids: seen.append((name, x, ids)))
    with_probe = model(IDS).logits
    detach()
    torch.testing.assert_close(model(IDS).logits, with_probe, rtol=0, atol=0)

    hidden, chosen = routed[0]
    (up, x, ids), (down, y, ids_again) = seen
    assert (up, down) == expert_parameters(module) == ("gate_up_proj", "down_proj")
    rows = IDS.numel() * chosen.shape[1]
    assert x.shape == (rows, 64)
    assert y.shape == (rows, 96)
    assert torch.equal(ids, ids_again)
    assert torch.equal(ids, ids.sort().values)
    for expert in range(4):
        tokens = (chosen == expert).any(-1).nonzero().squeeze(-1)
        assert torch.equal(x[ids == expert], hidden[tokens])
    weight, bias = read_weight(model, site), getattr(module, "gate_up_proj_bias", torch.zeros(4, 192))
    products = torch.stack([weight[e] @ row + bias[e] for e, row in zip(ids.tolist(), x, strict=True)])
    torch.testing.assert_close(module._apply_gate(products), y)


class Ungated(nn.Module):
    """Experts with every flag set the other way than in the models above."""

    def __init__(self, config: object) -> None:
        super().__init__()
        self.up_proj = nn.Parameter(torch.randn(3, 8, 12))
        self.up_proj_bias = nn.Parameter(torch.randn(3, 12))
        self.down_proj = nn.Parameter(torch.randn(3, 12, 8))
        self.down_proj_bias = nn.Parameter(torch.randn(3, 8))
        self.act_fn = nn.GELU()
        self.post_expert_norm = nn.LayerNorm(8)

    def forward(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(hidden)
        for token, slot in torch.cartesian_prod(torch.arange(len(hidden)), torch.arange(index.shape[1])).tolist():
            e = int(index[token, slot])
            if e < 3:
                up = self.act_fn(hidden[token] @ self.up_proj[e] + self.up_proj_bias[e])
                row = self.post_expert_norm(up @ self.down_proj[e] + self.down_proj_bias[e])
                out[token] += weights[token, slot] * row
        return out


@torch.no_grad()
def test_ungated_biased_transposed_normed_experts_and_masked_indices() -> None:
    cls = use_experts_implementation(Ungated, has_gate=False, has_bias=True, is_transposed=True)
    torch.manual_seed(0)
    config = AutoConfig.for_model("mixtral")
    config._experts_implementation = "eager"
    module = cls(config)
    module.has_post_expert_norm = True  # older releases have no such flag
    hidden, index, weights = torch.randn(9, 8), torch.randint(0, 4, (9, 2)), torch.rand(9, 2)
    want = module(hidden, index, weights)
    assert enable_experts(nn.ModuleDict({"experts": module})) == ("experts",)
    torch.testing.assert_close(module(hidden, index, weights), want)


@torch.no_grad()
def test_no_token_for_any_expert() -> None:
    for family in MOE_FAMILIES:
        model = FAMILIES[family]()
        module = model.get_submodule(enable_experts(model)[0])
        nobody, weights = torch.full((5, 2), 4), torch.rand(5, 2)
        assert torch.equal(module(torch.randn(5, 64), nobody, weights), torch.zeros(5, 64))
        empty = module(torch.randn(0, 64), torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0, 2))
        assert empty.shape == (0, 64)


def test_enabling_is_idempotent_and_leaves_dense_models_alone() -> None:
    dense, moe = tiny_llama(), FAMILIES["mixtral"]()
    before = dense.config._experts_implementation
    assert enable_experts(dense) == ()
    assert dense.config._experts_implementation == before
    assert enable_experts(moe) == enable_experts(moe)
    assert ALL_EXPERTS_FUNCTIONS["quantkit"] is experts_forward
    assert "experts_implementation" not in moe.config.to_json_string()


def test_float_experts_are_differentiable() -> None:
    model = FAMILIES["mixtral"]()
    enable_experts(model)
    model(IDS, labels=IDS).loss.backward()
    for site in describe(model).sites:
        gradient = getattr(model.get_submodule(site.module), site.parameter).grad
        assert gradient.abs().sum() > 0, site.name
