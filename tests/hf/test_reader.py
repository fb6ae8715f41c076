"""What transformers cannot read is refused before it is written, naming the layer, the reader and the way out."""

import logging

import pytest
import torch
from transformers import AutoModelForCausalLM

from quantkit import checkpoint
from quantkit.errors import FormatError
from quantkit.hf.names import CheckpointTensor, Piece
from quantkit.hf.reader import transformers_fault
from quantkit.pipeline.quantize import quantize
from quantkit.pipeline.rules import Rule
from quantkit.pipeline.settings import Output
from quantkit.spec import QuantSpec, Scheme
from tests.tiny import FAMILIES, build, tiny_llama

NO_HEADS = {"num_attention_heads": None, "num_key_value_heads": None, "head_dim": None}
STATE_SPACE = {**NO_HEADS, "state_size": 8, "time_step_rank": 32}
MIXTURE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "n_group": 1, "topk_group": 1}
HYBRID = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "head_dim": None,
}


@torch.no_grad()
def test_a_family_that_initialises_packed_layers_is_refused(tmp_path) -> None:
    model = build("mamba", **STATE_SPACE)
    with pytest.raises(FormatError, match=r"transformers, .* cannot load MambaForCausalLM: MambaMixer is initialised by"):
        quantize(model, "w4a16", method="rtn", out=tmp_path / "ct")
    assert not list(tmp_path.rglob("*.safetensors"))
    done = quantize(model, "w4a16", method="rtn", out=tmp_path / "native", output=Output(format="native"))
    assert torch.equal(checkpoint.load(tmp_path / "native")(IDS).logits, done.model(IDS).logits)


IDS = torch.arange(3, 15).unsqueeze(0)


@torch.no_grad()
def test_convolutions_that_a_file_holds_one_by_one_are_written_and_read_back_but_not_for_transformers(tmp_path) -> None:
    model = build("olmo_hybrid", **HYBRID)
    with pytest.raises(FormatError, match=r"q_conv1d\.weight: transformers, .* drops a float tensor that it joins"):
        quantize(model, "w4a16", method="rtn", out=tmp_path / "ct")
    done = quantize(model, "w4a16", method="rtn", out=tmp_path / "native", output=Output(format="native"))
    loaded = checkpoint.load(tmp_path / "native")
    assert torch.equal(loaded.model.layers[0].linear_attn.conv1d.weight, done.model.model.layers[0].linear_attn.conv1d.weight)
    assert torch.equal(loaded(IDS).logits, done.model(IDS).logits)


@torch.no_grad()
def test_layers_that_a_file_joins_are_written_one_by_one_and_transformers_reads_them(tmp_path) -> None:
    model = build("sarvam_moe", **MIXTURE)
    done = quantize(model, "w4a16", method="rtn", out=tmp_path / "ct")
    assert {row.kind for row in done.coverage if row.name.endswith(("q_proj", "k_proj", "v_proj"))} == {"quantized"}
    assert torch.equal(checkpoint.load(tmp_path / "ct")(IDS).logits, done.model(IDS).logits)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "ct", dtype=torch.float32)
    torch.testing.assert_close(theirs(IDS).logits, done.model(IDS).logits, rtol=1e-2, atol=1e-2)


def test_experts_of_two_schemes_or_half_in_float_are_refused(tmp_path) -> None:
    two = [Rule("*.layers.1.mlp.experts.*", "w8a16")]
    with pytest.raises(FormatError, match=r"knows one scheme for the experts of all layers"):
        quantize(FAMILIES["mixtral"](), "w4a16", method="rtn", out=tmp_path / "ct", rules=two)
    half = [Rule("*.layers.1.mlp.experts.*", skip=True)]
    with pytest.raises(FormatError, match=r"drops a float tensor that it joins with others"):
        quantize(FAMILIES["mixtral"](), "w4a16", method="rtn", out=tmp_path / "ct", rules=half)


@pytest.mark.parametrize(("scheme", "warned"), [("w4a16", False), ("w4a16-asym", True), ("w8a8", True), ("fp8", False)])
def test_experts_that_only_others_unpack_are_a_warning(scheme: str, warned: bool, caplog, tmp_path) -> None:
    with caplog.at_level(logging.WARNING):
        quantize(FAMILIES["mixtral"](), scheme, method="rtn", out=tmp_path / "ct")
    assert any("does not load experts of" in record.message for record in caplog.records) == warned


def test_layers_that_share_a_packed_weight_are_refused() -> None:
    source = CheckpointTensor((Piece("a.weight", None, 0, 4),), False)
    quantized, stored = {"a.weight": Scheme(QuantSpec("int4", (1, 32)))}, {"a.weight": ("a.weight", source)}
    model = tiny_llama()
    assert transformers_fault(model, {}, stored, {"a.weight"}) is None
    name, why = transformers_fault(model, quantized, stored, {"a.weight"}) or ("", "")
    assert name == "a.weight"
    assert "does not load packed layers that share their weight" in why
