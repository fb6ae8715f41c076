"""Schemes that round activations, end to end: dynamic and static, int8 and FP8, beside weights of 8 and 4 bits."""

from pathlib import Path

import pytest
import torch

from quantkit import load, quantize
from quantkit.errors import CalibrationError, SpecError
from quantkit.nn.linear import QuantLinear
from quantkit.numerics.fake import fake_quantize
from quantkit.numerics.grid import choose_qparams
from quantkit.pipeline import collect
from quantkit.quantizers.rtn import nearest
from quantkit.spec import QuantSpec, Scheme, preset
from tests import tiny

SCHEMES = ["w8a8", "w8a8-static", "w8a8-g32", "w4a8", "w4a8-asym", "fp8-dynamic", "fp8-static", "nvfp4", "mxfp4"]


def ids() -> list[torch.Tensor]:
    return [torch.randint(3, tiny.VOCAB, (2, 24), generator=torch.Generator().manual_seed(seed)) for seed in range(2)]


@pytest.mark.parametrize("format", ["native", "compressed-tensors"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme_survives_its_checkpoint(scheme: str, format: str, tmp_path: Path) -> None:
    model = tiny.FAMILIES["mixtral"]()
    batch = ids()[0]
    wanted = model(batch).logits
    result = quantize(model, scheme, quantizer="rtn", data=ids(), out=tmp_path / "x", format=format)
    loaded = load(tmp_path / "x")
    grids = {name: (m.spec, m.activation) for name, m in model.named_modules() if isinstance(m, QuantLinear)}
    assert grids == {name: (m.spec, m.activation) for name, m in loaded.named_modules() if isinstance(m, QuantLinear)}
    for name, tensor in model.state_dict().items():
        assert torch.equal(*(one.flatten().view(torch.uint8) for one in (tensor, loaded.state_dict()[name]))), name
    error = (loaded(batch).logits - wanted).norm() / wanted.norm()
    assert error < (0.3 if result.plan[next(iter(grids))].weight.dtype == "int8" else 0.6)


@pytest.mark.parametrize("scheme", ["w8a8-static", "fp8-static", "w8a8-g32", "w4a8", "nvfp4", "mxfp4"])
def test_transformers_reads_the_checkpoint(scheme: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    dtype = torch.bfloat16 if scheme.endswith("fp4") else torch.float32  # they make bfloat16 of FP4, whatever the model is
    model = tiny.FAMILIES["llama"]().to(dtype)
    quantize(model, scheme, quantizer="rtn", data=ids(), out=tmp_path / "x")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "x", dtype=dtype)
    batch = ids()[1]
    ours, found = model(batch).logits, theirs(batch).logits
    assert (found - ours).norm() / ours.norm() < 0.02  # roundings of activations may fall to the other side


def test_a_static_scale_is_the_largest_input_over_the_grid() -> None:
    model = tiny.FAMILIES["llama"]()
    known, _ = collect(tiny.FAMILIES["llama"](), ["abs_max"], data=ids())
    result = quantize(model, "w8a8-static", quantizer="rtn", statistics=known)
    for name, statistics in known.items():
        layer = model.get_submodule(name)
        assert isinstance(layer, QuantLinear)
        assert layer.input_scale is not None
        assert layer.input_scale.item() == pytest.approx(statistics.results["abs_max"].max().item() / 127.5, rel=1e-3)
    assert all(scheme.static for scheme in result.plan.values())
    layer = model.get_submodule("model.layers.0.mlp.down_proj")
    x = torch.randn(3, 96)
    want = fake_quantize(x, layer.activation, layer.input_scale) @ layer.dequantize().T
    torch.testing.assert_close(layer(x), want, rtol=1e-4, atol=1e-4)
    layer.keeps_codes = False
    layer(x)
    assert layer.qtensor.input_scale is layer.input_scale  # kernels know nothing of it; it stays when codes are let go


def test_query_key_value_and_gate_up_share_their_scales() -> None:
    model = tiny.FAMILIES["llama"]()
    quantize(model, "nvfp4", quantizer="rtn")
    layer = model.model.layers[0]
    attention, mlp = layer.self_attn, layer.mlp
    assert attention.q_proj.global_scale == attention.k_proj.global_scale == attention.v_proj.global_scale
    assert mlp.gate_proj.global_scale == mlp.up_proj.global_scale
    assert mlp.gate_proj.global_scale != attention.q_proj.global_scale


def test_static_scales_need_calibration() -> None:
    known, _ = collect(tiny.FAMILIES["llama"](), ["mean_square"], data=ids())
    with pytest.raises(CalibrationError, match="static input scale"):
        quantize(tiny.FAMILIES["llama"](), "w8a8-static", quantizer="rtn-importance", statistics=known)
    weight, spec = torch.randn(4, 8), QuantSpec("int8")
    qtensor = nearest(weight, choose_qparams(weight, spec), spec)
    with pytest.raises(SpecError, match="wants a stored input scale"):
        QuantLinear(qtensor, activation=preset("w8a8-static", ()).activation)


def test_grids_of_activations_that_make_no_sense_are_refused() -> None:
    weight = QuantSpec("int8")
    with pytest.raises(SpecError, match="one scale per tensor"):
        Scheme(weight, QuantSpec("int8", (1, -1)))
    with pytest.raises(SpecError, match="symmetric"):
        Scheme(weight, QuantSpec("int8", (-1, -1), symmetric=False))
    with pytest.raises(SpecError, match="per token"):
        Scheme(weight, QuantSpec("int8", (4, 16), dynamic=True))
    assert preset("w8a8-g32", ()).activation == QuantSpec("int8", (1, 32), True, "float32", True)
    assert preset("w4a8", (576, 1536)).weight.block == (1, 64)
