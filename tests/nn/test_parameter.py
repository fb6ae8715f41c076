"""A quantized parameter is read like the one it replaces, and cannot be written to."""

import copy
import re

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from quantkit import quantize
from quantkit.calibrate.data import Calibration
from quantkit.checkpoint import load
from quantkit.errors import FormatError, SpecError
from quantkit.hf.structure import describe
from quantkit.nn.install import install
from quantkit.nn.parameter import QuantParameter
from quantkit.nn.sites import Site, read_weight
from quantkit.numerics import grid
from quantkit.pipeline.rules import Rule
from quantkit.pipeline.settings import Output, Run
from quantkit.qtensor import GridTensor
from quantkit.report import coverage_table
from quantkit.spec import QuantSpec
from tests.tiny import build

SPEC = QuantSpec("int4", (1, 32))


def rounded(weight: Tensor) -> GridTensor:
    scale, zero = grid.choose_qparams(weight, SPEC)
    return GridTensor.from_codes(grid.quantize(weight, scale, zero, SPEC), scale, zero, SPEC)


@pytest.fixture
def stack() -> QuantParameter:
    return QuantParameter(rounded(torch.randn(3, 32, 64, generator=torch.Generator().manual_seed(0))))


def test_functions_methods_and_indices_see_the_dequantized_weight(stack: QuantParameter) -> None:
    whole, x = stack.dequantize(), torch.randn(3, 5, 64)
    assert torch.equal(torch.bmm(x, stack.transpose(1, 2)), torch.bmm(x, whole.transpose(1, 2)))
    assert torch.equal(x @ stack.mT, x @ whole.mT)
    assert torch.equal(torch.cat([stack, stack]), torch.cat([whole, whole]))
    assert torch.equal(functional.linear(x[0], stack[1]), functional.linear(x[0], whole[1]))
    assert torch.equal(stack[torch.tensor(2)], whole[2])
    assert torch.equal(stack[torch.tensor([2, 0])], whole[[2, 0]])
    assert torch.equal(stack[:, 1:3], whole[:, 1:3])
    assert torch.equal(torch.einsum("eoi,i->eo", stack, x[0, 0]), torch.einsum("eoi,i->eo", whole, x[0, 0]))
    assert (stack.shape, len(stack), stack.ndim, stack.dtype) == ((3, 32, 64), 3, 3, torch.float32)
    assert torch.equal(stack.view(96, 64), whole.view(96, 64))
    assert torch.equal(stack.to(torch.bfloat16), whole.to(torch.bfloat16))
    assert stack.float() is not stack


def test_one_matrix_of_a_stack_is_dequantized_alone(stack: QuantParameter, monkeypatch: pytest.MonkeyPatch) -> None:
    want = stack.dequantize()[1]
    monkeypatch.setattr(stack, "dequantize", None)
    assert torch.equal(stack[1], want)


def test_it_follows_the_modules_dtype_and_keeps_its_codes(stack: QuantParameter) -> None:
    module = nn.Module()
    module.weight = stack
    module.to(torch.bfloat16)
    assert module.weight.dtype == torch.bfloat16
    assert module.weight.tensor().dtype == torch.bfloat16
    assert stack.qtensor.scale.dtype == torch.float16
    assert torch.equal(copy.deepcopy(stack).dequantize(), stack.dequantize())


def test_nothing_can_write_to_it(stack: QuantParameter) -> None:
    with pytest.raises(AttributeError, match="div_"):
        stack.div_(2)
    with pytest.raises(AttributeError, match="no_such_thing"):
        stack.no_such_thing  # noqa: B018


LLAMA4 = {"num_local_experts": 4, "intermediate_size_mlp": 64, "intermediate_size": 64, "interleave_moe_layer_step": 1}


@torch.no_grad()
def test_experts_that_their_module_runs_itself_are_quantized_and_come_back(tmp_path) -> None:
    model = build("llama4_text", **LLAMA4)
    reference, ids = copy.deepcopy(model), torch.arange(3, 19).unsqueeze(0)
    for site in describe(reference).sites:
        weight = read_weight(reference, site)
        weight.copy_(rounded(weight.contiguous()).dequantize())
    data = Calibration(data=[torch.randint(3, 90, (2, 16))])
    result = quantize(
        model, "w4a16-g32", method="rtn", out=tmp_path / "native", output=Output(format="native"), calibration=data
    )
    torch.testing.assert_close(result.model(ids).logits, reference(ids).logits, rtol=0, atol=2e-4)
    assert torch.equal(load(tmp_path / "native")(ids).logits, result.model(ids).logits)
    kinds = {row.name.rpartition(".")[2]: row.kind for row in result.coverage if "experts" in row.name}
    assert kinds == {"gate_up_proj": "quantized", "down_proj": "quantized"}
    narrow = load(tmp_path / "native", dtype=torch.bfloat16)
    assert narrow(ids).logits.dtype == torch.bfloat16
    learned = quantize(build("llama4_text", **LLAMA4), "w4a16-g32", method="gptq", calibration=data)
    fallen = {row.name.rpartition(".")[2] for row in learned.coverage if row.kind == "fell back"}
    assert fallen == {"gate_up_proj", "down_proj"}, "nobody sees what they are multiplied by"
    head = coverage_table(learned.coverage).title.plain
    assert re.search(r"\d\d% of the quantized weights fell back to plain rounding.*because: .*no calibration input", head)
    with pytest.raises(SpecError, match=r"experts\.gate_up_proj: .*nobody sees its inputs, and gptq falls back.*strict=True"):
        quantize(build("llama4_text", **LLAMA4), "w4a16-g32", method="gptq", calibration=data, run=Run(strict=True))


@torch.no_grad()
def test_transformers_reads_llama_4s_experts_one_by_one(tmp_path) -> None:
    result = quantize(build("llama4_text", **LLAMA4), "w4a16-g32", method="rtn", out=tmp_path / "ct")
    ids = torch.arange(3, 19).unsqueeze(0)
    assert {row.kind for row in result.coverage if "experts" in row.name} == {"quantized"}
    assert torch.equal(load(tmp_path / "ct")(ids).logits, result.model(ids).logits)
    theirs, found = type(result.model).from_pretrained(tmp_path / "ct", dtype=torch.float32, output_loading_info=True)
    assert not found["missing_keys"]
    torch.testing.assert_close(theirs(ids).logits, result.model(ids).logits, rtol=1e-2, atol=1e-2)
    kept = quantize(
        build("llama4_text", **LLAMA4), "w8a8", method="rtn", out=tmp_path / "f", rules=[Rule("*.experts.*", skip=True)]
    )
    theirs = type(kept.model).from_pretrained(tmp_path / "f", dtype=torch.float32)
    assert torch.equal(theirs.model.layers[0].feed_forward.experts[1].down_proj.weight, float_expert(kept.model))


def float_expert(model: nn.Module) -> Tensor:
    return model.model.layers[0].feed_forward.experts.down_proj[1].T


DBRX = {
    "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8},
    "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "head_dim", "hidden_size", "intermediate_size")),
    **{"d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 128},
    "num_hidden_layers": None,
    "max_position_embeddings": None,
}


def test_what_cannot_be_done_with_it_is_said_before_any_work(tmp_path) -> None:
    with pytest.raises(FormatError, match=r"experts\.mlp\.w1: it is a parameter of its module .* use native"):
        quantize(build("dbrx", **DBRX), "w4a16-g32", method="rtn", out=tmp_path / "ct")
    with pytest.raises(SpecError, match=r"experts\.mlp\.w1: its module multiplies by it in its own way"):
        quantize(build("dbrx", **DBRX), "w8a8", method="rtn")


def test_a_linear_layer_with_a_forward_of_its_own_keeps_it() -> None:
    class Halves(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return torch.bmm(x.view(2, -1, 32), self.weight.view(2, 16, 32).mT)

    module = nn.ModuleDict({"a": Halves(32, 32, bias=False)})
    site, x = Site("a.weight", "a", "weight", (32, 32), read=True), torch.randn(4, 32)
    want = rounded(module["a"].weight.detach())
    install(module, site, want)
    assert torch.equal(module["a"](x), torch.bmm(x.view(2, -1, 32), want.dequantize().view(2, 16, 32).mT))
