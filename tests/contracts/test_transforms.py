"""What every step promises, and every transform: a model that computes what it did, on every architecture, or a refusal."""

from pathlib import Path
from typing import cast

import pytest
import torch

from quantkit.calibrate.chain import collect_statistics
from quantkit.calibrate.collectors import COLLECTORS
from quantkit.calibrate.data import Calibration
from quantkit.errors import CalibrationError, SpecError
from quantkit.hf.structure import describe
from quantkit.nn.sites import SiteStatistics, read_weight, write_weight
from quantkit.numerics.grid import powers_of_two
from quantkit.pipeline.plan import make_plan
from quantkit.pipeline.quantize import collect, quantize
from quantkit.pipeline.settings import Run
from quantkit.presets import preset
from quantkit.system.compute import Compute
from quantkit.system.progress import Progress
from quantkit.transforms.awq import AWQ
from quantkit.transforms.base import STAGES, STEPS, Transform, step_name
from quantkit.transforms.scaling_groups import find_groups, layers_that_share_inputs
from quantkit.transforms.smoothquant import SmoothQuant
from tests.tiny import FAMILIES, tiny_llama

NAMES = [name for name, kind in STEPS if kind.stage == "before"]


def ids(count: int = 4) -> list[torch.Tensor]:
    return [torch.randint(3, 190, (2, 48), generator=torch.Generator().manual_seed(i)) for i in range(count)]


def readers(family: str) -> set[frozenset[str]]:
    model = FAMILIES[family]()
    structure = describe(model)
    before = {name: p.clone() for name, p in model.named_parameters()}
    groups = find_groups(model, structure, {site.name: 0 for site in structure.sites})
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name])
    first = [g for g in groups if g.readers[0].name.startswith(structure.blocks[0].name + ".")]
    return {frozenset(site.name.rsplit(".", 1)[-1] for site in g.readers) for g in first}


@pytest.mark.parametrize(
    ("family", "found"),
    [
        ("llama", [{"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"}, {"down_proj"}]),
        ("gemma2", [{"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"}, {"down_proj"}]),  # norms of 1 + weight
        ("phi3", [{"qkv_proj"}, {"gate_up_proj"}]),
        ("olmo2", [{"down_proj"}]),  # its norms come after the layers
        ("gpt2", [{"c_attn"}, {"c_fc"}]),  # transposed weights, norms with biases
        ("opt", [{"q_proj", "k_proj", "v_proj"}, {"out_proj"}, {"fc1"}, {"fc2"}]),  # one head per value; relu passes factors
        ("gpt_neox", [{"query_key_value"}, {"dense_h_to_4h"}]),
        ("mixtral", [{"q_proj", "k_proj", "v_proj"}]),
    ],
)
def test_groups_are_found_by_watching_and_trying(family: str, found: list[set[str]]) -> None:
    assert readers(family) == {frozenset(names) for names in found}


@pytest.mark.parametrize("family", ["llama_tied", "gemma2", "gpt2", "opt", "qwen3_moe"])
@pytest.mark.parametrize("name", NAMES)
def test_the_model_computes_what_it_did(name: str, family: str) -> None:
    model = FAMILIES[family]()
    structure, batch = describe(model), ids()[0]
    before, old = model(batch).logits, {k: v.clone() for k, v in model.named_parameters()}
    plan = make_plan(structure, "w8a8").plan
    transform = cast(Transform, STEPS.get(name)())
    compute = Compute(torch.device("cpu"), torch.float32)
    statistics = collect_statistics(model, structure, ids(), transform.needs, compute=compute, progress=lambda _: None)
    if name == "rotate" and family != "llama_tied":
        with pytest.raises(CalibrationError, match="leave rotate out"):
            transform.apply(model, structure, plan, statistics)
        assert all(torch.equal(value, old[key]) for key, value in model.named_parameters())
        return
    transform.apply(model, structure, plan, statistics)
    torch.testing.assert_close(model(batch).logits, before, rtol=1e-3, atol=1e-4)
    if name == "smoothquant":
        assert any(not torch.equal(v, old[k]) for k, v in model.named_parameters())


def test_layers_that_read_one_tensor_are_found_together() -> None:
    model = FAMILIES["mixtral"]()
    groups = layers_that_share_inputs(model, describe(model))
    names = [tuple(site.name.rsplit(".", 1)[-1] for site in group) for group in groups]
    assert names[: len(names) // 2] == [("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_up_proj",), ("down_proj",)]
    assert names[: len(names) // 2] == names[len(names) // 2 :]


def test_every_step_says_when_it_is_done_and_what_it_needs() -> None:
    for name, kind in STEPS:
        step = kind()
        assert step.stage in STAGES
        assert set(step.needs) <= set(COLLECTORS.names())
        assert step.rejects(preset("w4a16", (64,))) is None
        assert step_name(step) == name


def planted(factor: float) -> torch.nn.Module:
    """Return a llama whose third channel is ``factor`` times larger after every norm, and which computes the same."""
    model = tiny_llama()
    structure = describe(model)
    for block in structure.blocks:
        module = model.get_submodule(block.name)
        module.input_layernorm.weight.data[2] *= factor
        module.post_attention_layernorm.weight.data[2] *= factor
        for site in block.sites:
            if site.name.rsplit(".", 1)[-1] in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"):
                weight = read_weight(model, site).clone()
                weight[:, 2] /= factor
                write_weight(model, site, weight)
    return model


def test_smoothquant_saves_8_bit_activations_from_planted_outliers() -> None:
    errors = {}
    wanted = tiny_llama()(ids()[0]).logits
    torch.testing.assert_close(planted(256.0)(ids()[0]).logits, wanted, rtol=1e-3, atol=1e-4)
    for label, factor, transforms in (("none", 1.0, ()), ("planted", 256.0, ()), ("smoothed", 256.0, ("smoothquant",))):
        model = planted(factor)
        quantize(model, "w8a8", method="rtn", steps=transforms, calibration=Calibration(data=ids()))
        errors[label] = (model(ids()[0]).logits - wanted).square().mean().sqrt().item()
    assert errors["planted"] > 10 * errors["none"]
    assert errors["smoothed"] < 2 * errors["none"]


def test_smoothquant_leaves_sites_with_float_activations_alone() -> None:
    model = tiny_llama()
    before = {name: p.clone() for name, p in model.named_parameters() if "norm" in name}
    result = quantize(model, "w4a16", method="rtn", steps=[SmoothQuant()], calibration=Calibration(data=ids()))
    assert result.metadata["transforms"] == ["SmoothQuant(alpha=0.5)"]
    for name, value in before.items():
        assert torch.equal(model.get_parameter(name), value)


def test_awq_lowers_the_output_error_of_rounding() -> None:
    plain, scaled = (
        quantize(planted(0.05), "w3a16-asym", method="rtn-importance", steps=transforms, calibration=Calibration(data=ids()))
        for transforms in ((), [AWQ()])
    )
    wanted = tiny_llama()(ids()[0]).logits
    before, after = ((r.model(ids()[0]).logits - wanted).square().mean().item() for r in (plain, scaled))
    assert after < before


def test_factors_are_powers_of_two() -> None:
    factors = powers_of_two(torch.tensor([1e-9, 0.3, 0.9, 1.0, 1.5, 6.0, 1e9]))
    assert factors.tolist() == [2.0**-12, 0.25, 1.0, 1.0, 2.0, 8.0, 2.0**12]


def test_bad_names_and_hopeless_models_are_refused() -> None:
    with pytest.raises(SpecError, match="did you mean 'smoothquant'"):
        STEPS.get("smothquant")
    with pytest.raises(SpecError, match="alpha=2"):
        SmoothQuant(alpha=2)
    model = tiny_llama()
    structure = describe(model)
    with pytest.raises(CalibrationError, match="nothing in this model can be rescaled"):
        AWQ().apply(model, structure, {}, {})


def test_smoothquant_finds_its_exponent_per_tensor() -> None:
    wanted = tiny_llama()(ids()[0]).logits
    errors = {}
    for label, transforms in (("none", []), ("half", [SmoothQuant(0.5)]), ("found", [SmoothQuant(None)])):
        model = planted(256.0)
        quantize(model, "w8a8", method="rtn", steps=transforms, calibration=Calibration(data=ids()))
        errors[label] = (model(ids()[0]).logits - wanted).square().mean().sqrt().item()
    assert errors["found"] < errors["none"] / 4
    assert errors["found"] < 1.05 * errors["half"]
    x, weight = torch.randn(64, 32), torch.randn(16, 32)
    found = SiteStatistics({"abs_max": x.abs().amax(0), "samples": x}, (64,))
    even = SmoothQuant(None).factors([weight], [preset("w8a8", ())], found)
    assert torch.equal(even, torch.ones(32)) or (even.log2().abs() <= 1).all()  # nothing sticks out: next to nothing to do


@pytest.mark.parametrize("quantizer", ["rtn", "gptq"])
def test_bias_correction_keeps_average_outputs(quantizer: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    batches = ids(8)
    sites = ["model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj"]  # the first to read: inputs are as before
    shifts = {}
    for transforms in ((), ("bias-correction",)):
        model = FAMILIES["starcoder2"]()
        wanted = means_of_outputs(model, sites, batches)
        quantize(
            model,
            "w3a16-g32",
            out=tmp_path / str(len(transforms)),
            method=quantizer,
            steps=transforms,
            calibration=Calibration(data=batches),
        )
        shifts[transforms] = (means_of_outputs(model, sites, batches) - wanted).norm().item()
    assert shifts[("bias-correction",)] < shifts[()] / 20
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "1", dtype=torch.float32)
    torch.testing.assert_close(theirs(batches[0]).logits, model(batches[0]).logits, rtol=1e-3, atol=1e-3)


def test_a_corrected_bias_keeps_the_checkpoints_dtype(tmp_path: Path) -> None:
    model = FAMILIES["starcoder2"]().to(torch.bfloat16)
    quantize(model, "w4a16-g32", out=tmp_path / "x", steps=["bias-correction"], calibration=Calibration(data=ids()))
    assert model.get_parameter("model.layers.0.self_attn.q_proj.bias").dtype == torch.bfloat16


def means_of_outputs(model: torch.nn.Module, sites: list[str], batches: list[torch.Tensor]) -> torch.Tensor:
    seen: dict[str, list[torch.Tensor]] = {site: [] for site in sites}
    hooks = [
        model.get_submodule(site).register_forward_hook(lambda _m, _a, y, site=site: seen[site].append(y.flatten(0, -2)))
        for site in sites
    ]
    with torch.no_grad():
        for batch in batches:
            model(batch)
    for hook in hooks:
        hook.remove()
    return torch.cat([torch.cat(ys).mean(0) for ys in seen.values()])


def test_bias_correction_continues_and_refuses(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="none of the planned layers has a bias"):
        quantize(tiny_llama(), "w4a16", steps=["bias-correction"], calibration=Calibration(data=ids()))
    with pytest.raises(CalibrationError, match="leave one out"):
        quantize(FAMILIES["opt"](), "w4a16", method="autoround", steps=["bias-correction"], calibration=Calibration(data=ids()))
    known = collect(FAMILIES["opt"](), ["hessian"], calibration=Calibration(data=ids()))[0]
    with pytest.raises(CalibrationError, match="pass data= instead"):
        quantize(FAMILIES["opt"](), "w4a16", steps=["bias-correction"], calibration=Calibration(statistics=known))

    def correct(out: Path, stop: str | None = None) -> dict[str, bytes]:
        def progress(event: Progress) -> None:
            if event.detail == stop:
                raise KeyboardInterrupt

        model, text = FAMILIES["opt"](), Calibration(data=ids())
        quantize(model, "w4a16", out=out, steps=["bias-correction"], calibration=text, run=Run(progress=progress))
        return {file.name: file.read_bytes() for file in sorted(out.iterdir())}

    with pytest.raises(KeyboardInterrupt):
        correct(tmp_path / "stopped", stop="model.decoder.layers.0")
    assert correct(tmp_path / "stopped") == correct(tmp_path / "whole")


def test_a_massive_channel_does_not_hide_a_wrong_producer() -> None:
    model = tiny_llama()
    for layer in model.model.layers:
        layer.mlp.gate_proj.weight.data[7] *= 1e3  # far from zero a gate passes factors on, and this unit outweighs all
        layer.mlp.down_proj.weight.data[0, 7] = 1e4
    structure = describe(model)
    found = {
        (g.readers[0].name.rsplit(".", 1)[-1], g.producer.rsplit(".", 1)[-1])
        for g in find_groups(model, structure, dict.fromkeys(s.name for s in structure.sites))
    }
    assert found == {("q_proj", "input_layernorm"), ("gate_proj", "post_attention_layernorm"), ("down_proj", "up_proj")}
