"""Tied, untied and shared weights: written as they are, counted once, or refused before work."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from quantkit import checkpoint
from quantkit.calibrate.data import Calibration
from quantkit.errors import FormatError, SpecError
from quantkit.hf.load import load_float
from quantkit.pipeline.quantize import quantize
from quantkit.pipeline.rules import Rule
from quantkit.pipeline.settings import Output
from tests.tiny import TEXT, VOCAB, tiny_llama, tiny_tokenizer

IDS = torch.randint(3, 190, (2, 9), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model(input_ids=IDS).logits


def edit_config(path: Path, **values) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **values}))


@pytest.fixture
def untied(tmp_path) -> Path:
    """A float directory with a head of its own whose config calls it tied."""
    tiny_llama().save_pretrained(tmp_path / "m")
    edit_config(tmp_path / "m", tie_word_embeddings=True)
    return tmp_path / "m"


@pytest.mark.parametrize("change", ["other", "nearly"])
@pytest.mark.parametrize("format", ["native", "compressed-tensors"])
def test_a_stored_head_wins_over_the_flag(change: str, format: str, untied, tmp_path, caplog) -> None:
    tensors = load_file(untied / "model.safetensors")
    if change == "nearly":
        table = tensors["model.embed_tokens.weight"]
        tensors["lm_head.weight"] = table + 0.01 * table.abs().mean() * torch.randn(table.shape)
        save_file(tensors, untied / "model.safetensors", {"format": "pt"})
    done = quantize(untied, method="rtn", out=tmp_path / "q", output=Output(format=format))
    assert "tie_word_embeddings=True" in caplog.text
    assert json.loads((tmp_path / "q" / "config.json").read_text())["tie_word_embeddings"] is False
    again = checkpoint.load(tmp_path / "q")
    assert torch.equal(again.lm_head.weight, tensors["lm_head.weight"])
    assert torch.equal(logits(again), logits(done.model))
    total = sum(tensor.nbytes for tensor in tensors.values())
    assert sum(row.bytes_before for row in done.coverage) == total


def test_a_head_stored_twice_is_written_once_and_counted(tmp_path) -> None:
    tiny_llama(tie_word_embeddings=True).save_pretrained(tmp_path / "m")
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "m" / "model.safetensors", {"format": "pt"})
    done = quantize(tmp_path / "m", method="rtn", out=tmp_path / "q", output=Output(format="native"))
    assert "lm_head.weight" not in load_file(tmp_path / "q" / "quantkit.safetensors")
    assert sum(row.bytes_before for row in done.coverage) == sum(tensor.nbytes for tensor in tensors.values())
    assert sum(row.bytes_after for row in done.coverage) == checkpoint.inspect(tmp_path / "q")["tensor_bytes"]


def test_equal_and_untied_stays_untied(tmp_path) -> None:
    model = tiny_llama()
    model.lm_head.weight.data.copy_(model.model.embed_tokens.weight)
    model.save_pretrained(tmp_path / "m")
    quantize(tmp_path / "m", method="rtn", out=tmp_path / "q")
    again = checkpoint.load(tmp_path / "q")
    assert not again.config.tie_word_embeddings
    assert torch.equal(again.lm_head.weight, again.model.embed_tokens.weight)
    assert again.lm_head.weight is not again.model.embed_tokens.weight


def test_a_model_with_a_head_of_its_own_that_is_declared_tied(tmp_path) -> None:
    model = tiny_llama(tie_word_embeddings=True)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach() * 1.01)
    head = model.lm_head.weight.detach().clone()
    path = quantize(model, method="rtn", out=tmp_path / "q").path
    again = checkpoint.load(path)
    assert not again.config.tie_word_embeddings
    assert torch.equal(again.lm_head.weight, head)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(path).lm_head.weight, head)


def test_a_flipped_flag_in_a_quantized_checkpoint_is_refused(tmp_path) -> None:
    path = quantize(tiny_llama(), method="rtn", out=tmp_path / "q").path
    edit_config(path, tie_word_embeddings=True)
    with pytest.raises(FormatError, match=r"ties lm_head\.weight to model\.embed_tokens\.weight, but the files hold another"):
        checkpoint.load(path)


@pytest.fixture
def zamba(tmp_path) -> Path:
    """A directory of a model whose second hybrid layer shares the transformer block of the first."""
    config = AutoConfig.for_model(
        "zamba2",
        vocab_size=VOCAB,
        hidden_size=64,
        num_hidden_layers=4,
        layers_block_type=["mamba", "hybrid", "mamba", "hybrid"],
        num_attention_heads=4,
        num_key_value_heads=4,
        attention_head_dim=32,
        attention_hidden_size=128,
        intermediate_size=96,
        num_mem_blocks=1,
        mamba_d_state=16,
        mamba_headdim=32,
        mamba_expand=2,
        n_mamba_heads=4,
        mamba_ngroups=1,
        chunk_size=8,
        adapter_rank=32,
        use_shared_attention_adapter=False,
        max_position_embeddings=256,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    model.save_pretrained(tmp_path / "m")
    tiny_tokenizer().save_pretrained(tmp_path / "m")
    return tmp_path / "m"


def test_blocks_that_share_their_weights_are_quantized_once(zamba, tmp_path) -> None:
    stored = load_file(zamba / "model.safetensors")
    model, _ = load_float(zamba)
    shared = [name for name in model.all_tied_weights_keys if "shared_transformer" in name and name.endswith("weight")]
    assert shared
    assert not stored.keys() & set(shared)
    with pytest.raises(FormatError, match=r"shared_transformer.*: transformers.* does not load packed layers that share"):
        quantize(zamba, method="rtn", out=tmp_path / "q")
    native = Output(format="native")
    done = quantize(zamba, method="rtn", out=tmp_path / "q", output=native)
    names = {row.name for row in done.coverage if row.kind == "quantized"}
    assert any("shared_transformer" in name for name in names)
    assert not names & {name.removesuffix(".weight") for name in shared}
    assert sum(row.bytes_before for row in done.coverage) == sum(tensor.nbytes for tensor in stored.values())
    assert checkpoint.inspect(tmp_path / "q")["tensor_bytes"] == sum(row.bytes_after for row in done.coverage)
    assert torch.equal(logits(checkpoint.load(tmp_path / "q")), logits(done.model))
    # calibrated, with the inputs of the first block that has them
    calibration = Calibration([TEXT * 4], samples=4, length=64, batch_size=2)
    again = quantize(zamba, "w8a16", method="gptq", calibration=calibration)
    assert {row.name for row in again.coverage if row.kind in ("quantized", "fell back")} == names
    with pytest.raises(SpecError, match=r"tied to .*would rewrite it for one block"):
        quantize(zamba, method="rtn", steps=["awq"], output=native)
    # in float, what is shared can be written in either format
    float_blocks = [Rule("*shared_transformer*", skip=True)]
    path = quantize(zamba, method="rtn", rules=float_blocks, out=tmp_path / "other").path
    assert path is not None
    ids = torch.arange(3, 19).unsqueeze(0)
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)(ids).logits
        assert torch.allclose(theirs, checkpoint.load(path)(ids).logits, atol=1e-3)


@pytest.mark.parametrize("what", ["mlp", "weight", "norm"])
def test_sharing_that_the_config_does_not_know(what: str, tmp_path) -> None:
    model = tiny_llama()
    first, second = model.model.layers
    match what:
        case "mlp":
            second.mlp = first.mlp
        case "weight":
            second.mlp.up_proj.weight = first.mlp.up_proj.weight
        case "norm":
            second.input_layernorm = first.input_layernorm
    before = logits(model)
    if what == "norm":  # stays in float: written under both names
        done = quantize(model, method="rtn", out=tmp_path / "q")
        again = checkpoint.load(tmp_path / "q")
        assert torch.equal(again.model.layers[1].input_layernorm.weight, first.input_layernorm.weight)
        assert sum(row.parameters for row in done.coverage if "input_layernorm" in row.name) == 64
        return
    with pytest.raises(FormatError, match=r"layers\.1\.mlp\..*_proj.* and model\.layers\.0\.mlp\..*_proj.* are one tensor"):
        quantize(model, method="rtn", out=tmp_path / "q")
    assert torch.equal(logits(model), before), "nothing was done"
    skip = [Rule("*.mlp.*", skip=True)]
    path = quantize(model, method="rtn", rules=skip, out=tmp_path / "q").path
    assert checkpoint.load(path).model.layers[1].mlp.up_proj.weight.shape == (96, 64)
