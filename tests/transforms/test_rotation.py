"""Rotations: what computes the same afterwards, what is refused and left untouched, and what they are good for."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from quantkit import load, quantize
from quantkit.errors import CalibrationError, SpecError
from quantkit.hf.native import native_decoder
from quantkit.hf.structure import describe
from quantkit.kernels.cpu.decoder import NativeDecoder
from quantkit.pipeline.rules import Rule
from quantkit.transforms.rotate import Rotate, rotate
from tests import tiny
from tests.contracts.test_transforms import ids, planted

LAYERS = 2


@pytest.mark.parametrize(
    ("family", "count"),
    [("llama", 1 + LAYERS), ("llama_tied", 1 + LAYERS), ("mistral", 1 + LAYERS), ("qwen2", 1 + LAYERS),
     ("qwen3", 1 + LAYERS), ("smollm3", 1 + LAYERS), ("phi3", 1)],
)  # fmt: skip
def test_a_rotated_model_computes_what_it_did(family: str, count: int) -> None:
    model, batch = tiny.FAMILIES[family](), ids()[0]
    before, old = model(batch).logits, {name: value.clone() for name, value in model.state_dict().items()}
    assert rotate(model, describe(model), Rotate()) == count  # fused query, key and value have no rows of values alone
    torch.testing.assert_close(model(batch).logits, before, rtol=1e-3, atol=1e-4)
    for name, value in model.state_dict().items():
        if "norm" in name and "q_norm" not in name and "k_norm" not in name:
            assert torch.allclose(value, torch.ones_like(value)), name
        elif value.ndim == 2:
            assert not torch.allclose(value, old[name]), name
    assert not describe(model).tied


@pytest.mark.parametrize("family", ["gpt2", "opt", "gpt_neox", "gemma2", "gemma3", "olmo2", "mixtral", "falcon"])
def test_what_cannot_be_rotated_is_refused_and_left_as_it_was(family: str) -> None:
    model = tiny.FAMILIES[family]()
    tied = describe(model).tied
    old = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(CalibrationError, match=r"rotate: .*leave rotate out"):
        rotate(model, describe(model), Rotate())
    assert describe(model).tied == tied
    for name, value in model.state_dict().items():
        assert torch.equal(value, old[name]), name


def test_outliers_are_spread_and_8_bit_activations_saved() -> None:
    errors, wanted = {}, tiny.FAMILIES["llama"]()(ids()[0]).logits
    for label, factor, transforms in (("none", 1.0, ()), ("planted", 256.0, ()), ("rotated", 256.0, ("rotate",))):
        model = planted(factor)
        quantize(model, "w8a8", method="rtn", steps=transforms)
        errors[label] = (model(ids()[0]).logits - wanted).square().mean().sqrt().item()
    assert errors["planted"] > 10 * errors["none"]
    assert errors["rotated"] < 2 * errors["none"]


def test_a_column_of_large_weights_is_spread() -> None:
    model = tiny.FAMILIES["llama"]()
    model.model.embed_tokens.weight.data[:, 5] *= 50  # an outlier channel of the residual stream
    rotate(model, describe(model), Rotate())
    table = model.model.embed_tokens.weight
    assert table.abs().amax() / table.square().mean().sqrt() < 8


@pytest.mark.parametrize("family", ["llama", "llama_tied"])
def test_the_checkpoint_needs_nothing_else(family: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = tiny.FAMILIES[family]()
    result = quantize(model, "w4a16-g32", out=tmp_path / "x", method="rtn", steps=["rotate"])
    assert result.metadata["transforms"] == ["Rotate(values=True, seed=0)"]
    assert any(row.name == "lm_head" and row.kind == "skipped" for row in result.coverage)
    with safe_open(tmp_path / "x" / "model.safetensors", "pt") as file:
        assert "lm_head.weight" in file.keys()  # noqa: SIM118
    loaded, theirs = load(tmp_path / "x"), AutoModelForCausalLM.from_pretrained(tmp_path / "x", dtype=torch.float32)
    torch.testing.assert_close(loaded(ids()[0]).logits, model(ids()[0]).logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(theirs(ids()[0]).logits, model(ids()[0]).logits, rtol=1e-4, atol=1e-4)
    assert isinstance(native_decoder(loaded), NativeDecoder)


def test_a_tied_table_cannot_be_rotated_and_quantized_as_one() -> None:
    with pytest.raises(SpecError, match="rotate parts the tied head"):
        quantize(tiny.FAMILIES["llama_tied"](), "w8a16", method="rtn", steps=["rotate"], rules=[Rule("head", "w8a16")])
