"""install(): the quantized weight stands where the float one stood, and nothing else changes."""

import copy

import pytest
import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from quantkit.errors import QuantkitError, SpecError
from quantkit.hf.experts import enable_experts
from quantkit.hf.structure import describe
from quantkit.nn.install import install
from quantkit.nn.linear import QuantLinear, QuantWeight
from quantkit.nn.sites import Site, read_weight
from quantkit.numerics import grid
from quantkit.qtensor import GridTensor
from quantkit.spec import QuantSpec
from tests.tiny import FAMILIES, VOCAB, tiny_llama

SPEC = QuantSpec("int4", (1, 32), symmetric=False)


def round_to_nearest(weight: Tensor) -> GridTensor:
    scale, zero_point = grid.choose_qparams(weight, SPEC)
    return GridTensor.from_codes(grid.quantize(weight, scale, zero_point, SPEC), scale, zero_point, SPEC)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_installed_everywhere_the_model_computes_with_the_dequantized_weights(family: str) -> None:
    model = FAMILIES[family](experts_implementation="eager")
    reference = copy.deepcopy(model)
    structure = describe(model)
    biases = {name: p for name, p in model.named_parameters() if name.endswith("bias")}
    for site in (*structure.sites, *structure.outside):
        qtensor = round_to_nearest(read_weight(model, site))
        read_weight(reference, site).copy_(qtensor.dequantize())
        install(model, site, qtensor)
    enable_experts(model)
    ids = torch.randint(3, VOCAB, (2, 9), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(model(ids).logits, reference(ids).logits, rtol=0, atol=2e-4)
    kinds = {type(module) for module in model.modules()}
    assert QuantLinear in kinds
    assert Conv1D not in kinds
    left = dict(model.named_parameters())
    assert sorted(set(structure.skipped) & set(left)) == sorted(left)
    for name, bias in biases.items():
        assert torch.equal(left[name], bias)
    assert not model.training
    assert not any(module.training for module in model.modules())


def test_a_wrong_shape_or_place_is_refused() -> None:
    model = tiny_llama()
    site = describe(model).sites[0]
    good = round_to_nearest(read_weight(model, site))
    with pytest.raises(SpecError, match=r"q_proj: quantized weight has shape \(96, 64\), want \(64, 64\)"):
        install(model, site, round_to_nearest(torch.randn(96, 64)))
    with pytest.raises(SpecError, match=r"has no module 'model\.layers\.9\.x'"):
        install(model, Site("x", "model.layers.9.x", "weight", (64, 64)), good)
    with pytest.raises(SpecError, match="LlamaMLP has no float parameter 'weight'"):
        install(model, Site("x", "model.layers.0.mlp", "weight", (64, 64)), good)
    wrong = Site("x", "model.layers.0.mlp.up_proj", "weight", (64, 96))
    with pytest.raises(SpecError, match=r"weight has shape \(96, 64\) \(out, in\), the site says \(64, 96\)"):
        install(model, wrong, round_to_nearest(torch.randn(64, 96)))
    install(model, site, good)
    with pytest.raises(SpecError, match="QuantLinear has no float parameter 'weight'; is it quantized already"):
        install(model, site, good)


def test_a_weight_shared_with_another_kind_of_module_is_refused() -> None:
    model = FAMILIES["llama_tied"]()
    head = Site("lm_head", "lm_head", "weight", (VOCAB, 64))
    with pytest.raises(SpecError, match=r"lm_head: its weight is shared with model\.embed_tokens\.weight, which is no Linear"):
        install(model, head, round_to_nearest(read_weight(model, head)))


@pytest.mark.parametrize("what", ["weight", "layer", "mlp"])
@pytest.mark.parametrize("bias", [False, True])
def test_all_that_share_a_weight_are_replaced_together(what: str, bias: bool) -> None:
    model = tiny_llama(mlp_bias=bias)
    first, second = model.model.layers
    match what:
        case "weight":
            second.mlp.up_proj.weight = first.mlp.up_proj.weight
        case "layer":
            second.mlp.up_proj = first.mlp.up_proj
        case "mlp":
            second.mlp = first.mlp
    site = Site("model.layers.0.mlp.up_proj", "model.layers.0.mlp.up_proj", "weight", (96, 64))
    qtensor = round_to_nearest(read_weight(model, site))
    install(model, site, qtensor)
    new = [layer.mlp.up_proj for layer in (first, second)]
    assert all(type(one) is QuantLinear and one.qtensor is qtensor for one in new)
    assert (new[0] is new[1]) == (what != "weight" or not bias), "biases of their own need modules of their own"
    assert [one.tied_to for one in new] == [None, None if new[0] is new[1] else site.name]


def test_saving_as_a_float_model_is_refused(tmp_path) -> None:
    model = tiny_llama()
    site = describe(model).sites[0]
    install(model, site, round_to_nearest(read_weight(model, site)))
    for part in (model, model.model, copy.deepcopy(model)):
        for method in ("save_pretrained", "push_to_hub"):
            with pytest.raises(QuantkitError, match=r"quantkit\.save"):
                getattr(part, method)(tmp_path)
    assert not list(tmp_path.iterdir())
    model.config.save_pretrained(tmp_path)


def test_training_flag_and_bias_dtype_are_kept() -> None:
    model = FAMILIES["gpt2"]().to(torch.bfloat16).train()
    site = describe(model).sites[0]
    bias = model.get_submodule(site.module).bias
    install(model, site, round_to_nearest(read_weight(model, site)))
    module = model.get_submodule(site.module)
    assert module.training
    assert module.bias.dtype == torch.bfloat16
    assert torch.equal(module.bias, bias)


def test_an_expert_stack_keeps_its_name() -> None:
    model = FAMILIES["gpt_oss"]()
    site = next(site for site in describe(model).sites if site.parameter == "down_proj")
    install(model, site, round_to_nearest(read_weight(model, site)))
    module = model.get_submodule(site.module)
    assert isinstance(module.down_proj, QuantWeight)
    assert isinstance(module.gate_up_proj, torch.nn.Parameter)
    assert f"{site.name}.packed" in model.state_dict()
