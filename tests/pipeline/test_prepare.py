"""prepare and convert: the start is the quantized model's, what cannot be trained is refused, and torch's own ways work."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import quantkit
from quantkit.errors import QuantkitError, SpecError
from quantkit.nn.fake import FakeLinear, FakeModule
from tests.tiny import build, tiny_llama

IDS = torch.randint(3, 190, (2, 24), generator=torch.Generator().manual_seed(0))
TEXT = quantkit.Calibration(data=[torch.randint(3, 190, (8, 32), generator=torch.Generator().manual_seed(1))])


@pytest.fixture(autouse=True)
def _sums_as_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUANTKIT_KERNEL", "reference")


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model.eval()(input_ids=IDS, use_cache=False).logits


@pytest.mark.parametrize(
    ("scheme", "steps"),
    [("w4a16-asym-g32", ()), ("w3a16-g32", ()), ("w4a8-g32", ()), ("w8a8-static", ()), ("w4a16-asym-g32", ("awq",))],
)
@pytest.mark.parametrize("share", [0.0, 1.0])
def test_training_begins_with_the_logits_of_the_start(scheme: str, steps: tuple[str, ...], share: float) -> None:
    start = quantkit.quantize(tiny_llama(), scheme, steps=steps, calibration=TEXT)
    want = logits(start.model)
    model = quantkit.prepare(tiny_llama(), start=start, share=share)
    assert torch.equal(logits(model), want)
    weights = {name: one.weight.detach() for name, one in model.named_modules() if isinstance(one, FakeModule)}
    floats = dict(tiny_llama().named_parameters())
    codes = dict(start.model.named_modules())
    for name, weight in weights.items() if share and not steps else ():  # closer to the float weight than the codes are
        assert (weight - floats[f"{name}.weight"]).norm() < (codes[name].dequantize() - floats[f"{name}.weight"]).norm()
    assert torch.equal(logits(quantkit.convert(model)), want)


def test_a_checkpoint_and_a_quantized_model_are_starts_too(tmp_path: Path) -> None:
    start = quantkit.quantize(tiny_llama(), "w4a16-asym-g32", method="rtn", out=tmp_path / "start")
    want = logits(start.model)
    assert torch.equal(logits(quantkit.prepare(tiny_llama(), start=tmp_path / "start")), want)
    assert torch.equal(logits(quantkit.prepare(quantkit.load(tmp_path / "start"))), want)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "scheme=None without start"),
        ({"scheme": "w8a8-static"}, "static scale of its inputs is found in calibration"),
        ({"scheme": "w4a16", "kv": "int8"}, "keys and values are not trained"),
        ({"scheme": "w4a16-g80"}, "not a multiple of group_size 80"),
        ({"scheme": "w4a16", "share": 2}, "share=2"),
        ({"scheme": "w4a16", "start": "nowhere"}, "nowhere"),
        ({"start": nn.Linear(2, 2)}, "no quantized layer"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_anything_changes(arguments: dict, message: str) -> None:
    model = tiny_llama()
    want = logits(model)
    with pytest.raises(QuantkitError, match=message):
        quantkit.prepare(model, **arguments)
    assert torch.equal(logits(model), want)
    assert not any(isinstance(part, FakeModule) for part in model.modules())


def test_weights_that_their_module_reads_are_refused_by_name() -> None:
    experts = {"num_local_experts": 2, "intermediate_size_mlp": 64, "interleave_moe_layer_step": 1}
    with pytest.raises(SpecError, match=r"experts\.gate_up_proj: .*in its own way.*by a rule"):
        quantkit.prepare(build("llama4_text", **experts), "w4a16-g32")


def test_another_scheme_than_the_starts_is_refused_by_name() -> None:
    start = quantkit.quantize(tiny_llama(), "w4a16-g32", method="rtn")
    with pytest.raises(SpecError, match=r"layers\.0\.self_attn\.q_proj: the start has int4 g32, the scheme says int3 g32"):
        quantkit.prepare(tiny_llama(), "w3a16-g32", start=start)
    with pytest.raises(SpecError, match="leave scheme and start out"):
        quantkit.prepare(start.model, "w4a16-g32")


def test_converting_what_is_not_prepared_or_not_finite_is_refused() -> None:
    with pytest.raises(SpecError, match=r"make one by quantkit\.prepare"):
        quantkit.convert(tiny_llama())
    model = quantkit.prepare(tiny_llama(), "w4a16-g32")
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(SpecError, match=r"model\.layers\.1\.mlp\.up_proj: .*NaN"):
        quantkit.convert(model)


def test_a_prepared_model_is_an_ordinary_module(tmp_path: Path) -> None:
    model = quantkit.prepare(tiny_llama(), "w4a16-asym-g32", learn_zero=True)
    want = logits(model)
    layer = model.model.layers[0].mlp.up_proj
    assert {name for name, _ in layer.named_parameters()} == {"weight", "scale", "zero_point"}
    assert torch.equal(logits(copy.deepcopy(model)), want)
    other = quantkit.prepare(tiny_llama(seed=1), "w4a16-asym-g32", learn_zero=True)
    assert not torch.equal(logits(other), want)
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits(other), want)
    model.save_pretrained(tmp_path)  # the state of training, as Trainer writes it
    quantkit.convert(model)
    with pytest.raises(QuantkitError, match="save_pretrained"):
        model.save_pretrained(tmp_path)


def gradients(model: nn.Module, call: nn.Module) -> dict[str, Tensor]:
    model.zero_grad()
    call(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_gradient_checkpointing_changes_no_gradient() -> None:
    model = quantkit.prepare(tiny_llama(), "w4a8-asym-g32").train()
    want = gradients(model, model)
    assert {name.rpartition(".")[2] for name in want} == {"weight", "scale"}
    model.gradient_checkpointing_enable()
    found = gradients(model, model)
    assert want.keys() == found.keys()
    assert all(torch.equal(want[name], found[name]) for name in want)


def test_half_precision_products_leave_weights_in_float32() -> None:
    model = quantkit.prepare(tiny_llama(), "w4a16-asym-g32").train()
    with torch.autocast("cpu", torch.bfloat16):
        assert model(input_ids=IDS, use_cache=False).logits.dtype == torch.bfloat16
        found = gradients(model, model)
    want = gradients(model, model)
    for name, one in want.items():
        assert found[name].dtype == torch.float32
        assert (found[name] - one).norm() < 0.1 * one.norm(), name


def test_a_layer_compiles_as_one_graph() -> None:
    command = [sys.executable, "-c", "from tests.pipeline.test_prepare import compile_a_layer; compile_a_layer()"]
    counts = "SLIPCOVER_ENABLED"  # the compiler cannot follow code whose lines are counted
    env = {name: value for name, value in os.environ.items() if name != counts}
    subprocess.run(command, check=True, env=env, cwd=Path(__file__).parents[2])


def compile_a_layer() -> None:
    """Compare a layer with itself compiled; raises if they differ, or if it takes more than one graph."""
    model = quantkit.prepare(tiny_llama(), "w4a16-asym-g32")
    layer = model.model.layers[0].mlp.up_proj
    assert isinstance(layer, FakeLinear)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    kept = []
    for call in (layer, compiled):
        layer.zero_grad()
        y = call(x)
        y.square().sum().backward()
        kept.append((y.detach(), layer.weight.grad.clone(), layer.scale.grad.clone()))
    for one, other in zip(*kept, strict=True):
        torch.testing.assert_close(one, other)
