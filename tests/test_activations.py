"""Schemes that round activations, end to end: dynamic and static, int8 and FP8, beside weights of 8 and 4 bits."""

from pathlib import Path

import pytest
import torch

from quantkit import load, quantize
from quantkit.calibrate.data import Calibration
from quantkit.errors import CalibrationError, SpecError
from quantkit.generation.generate import generate
from quantkit.nn.linear import QuantLinear
from quantkit.numerics.fake import fake_quantize
from quantkit.numerics.grid import choose_qparams
from quantkit.numerics.hadamard import hadamard_transform
from quantkit.pipeline.quantize import collect
from quantkit.pipeline.settings import Output
from quantkit.presets import preset
from quantkit.quantizers.autoround import AutoRound
from quantkit.quantizers.rtn import nearest
from quantkit.spec import TOKEN_INT8, ActivationSpec, QuantSpec, Scheme
from tests import tiny

SCHEMES = [
    "w8a8",
    "w8a8-static",
    "w8a8-rotated",
    "w8a8-g32",
    "w4a8",
    "w4a8-asym",
    "fp8-dynamic",
    "fp8-static",
    "nvfp4",
    "mxfp4",
]


def ids() -> list[torch.Tensor]:
    return [torch.randint(3, tiny.VOCAB, (2, 24), generator=torch.Generator().manual_seed(seed)) for seed in range(2)]


@pytest.mark.parametrize("format", ["native", "compressed-tensors"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme_survives_its_checkpoint(scheme: str, format: str, tmp_path: Path) -> None:
    model = tiny.FAMILIES["mixtral"]()
    batch = ids()[0]
    wanted = model(batch).logits
    if scheme.endswith("rotated") and format == "compressed-tensors":
        with pytest.raises(SpecError, match="its readers would not rotate them"):
            quantize(model, scheme, out=tmp_path / "x", method="rtn", output=Output(format=format))
        return
    result = quantize(
        model, scheme, out=tmp_path / "x", method="rtn", calibration=Calibration(data=ids()), output=Output(format=format)
    )
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
    quantize(model, scheme, out=tmp_path / "x", method="rtn", calibration=Calibration(data=ids()))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "x", dtype=dtype)
    batch = ids()[1]
    ours, found = model(batch).logits, theirs(batch).logits
    assert (found - ours).norm() / ours.norm() < 0.02  # roundings of activations may fall to the other side


def test_a_static_scale_is_the_largest_input_over_the_grid() -> None:
    model = tiny.FAMILIES["llama"]()
    known, _ = collect(tiny.FAMILIES["llama"](), ["abs_max"], calibration=Calibration(data=ids()))
    result = quantize(model, "w8a8-static", method="rtn", calibration=Calibration(statistics=known))
    for name, statistics in known.items():
        layer = model.get_submodule(name)
        assert isinstance(layer, QuantLinear)
        assert layer.qtensor.input_scale is not None
        assert layer.qtensor.input_scale.item() == pytest.approx(statistics.results["abs_max"].max().item() / 127.5, rel=1e-3)
    assert all(scheme.static for scheme in result.plan.values())
    layer = model.get_submodule("model.layers.0.mlp.down_proj")
    x = torch.randn(3, 96)
    want = fake_quantize(x, layer.activation.grid, layer.qtensor.input_scale) @ layer.dequantize().T
    torch.testing.assert_close(layer(x), want, rtol=1e-4, atol=1e-4)
    scale = layer.unpack().input_scale
    layer.pack()
    assert layer.qtensor.input_scale is scale  # kernels know nothing of it


def test_query_key_value_and_gate_up_share_their_scales() -> None:
    model = tiny.FAMILIES["llama"]()
    quantize(model, "nvfp4", method="rtn")
    layer = model.model.layers[0]
    attention, mlp = layer.self_attn, layer.mlp
    assert (
        attention.q_proj.qtensor.global_scale == attention.k_proj.qtensor.global_scale == attention.v_proj.qtensor.global_scale
    )
    assert mlp.gate_proj.qtensor.global_scale == mlp.up_proj.qtensor.global_scale
    assert mlp.gate_proj.qtensor.global_scale != attention.q_proj.qtensor.global_scale


def test_static_scales_need_calibration() -> None:
    known, _ = collect(tiny.FAMILIES["llama"](), ["mean_square"], calibration=Calibration(data=ids()))
    with pytest.raises(CalibrationError, match="static input scale"):
        quantize(tiny.FAMILIES["llama"](), "w8a8-static", method="rtn-importance", calibration=Calibration(statistics=known))
    weight, spec = torch.randn(4, 8), QuantSpec("int8")
    qtensor = nearest(weight, choose_qparams(weight, spec), spec)
    with pytest.raises(SpecError, match="wants a stored input scale"):
        QuantLinear(qtensor, activation=preset("w8a8-static", ()).activation)


def test_grids_of_activations_that_make_no_sense_are_refused() -> None:
    with pytest.raises(SpecError, match="one scale per tensor"):
        ActivationSpec(QuantSpec("int8", (1, -1)), dynamic=False)
    with pytest.raises(SpecError, match="symmetric"):
        ActivationSpec(QuantSpec("int8", (-1, -1), symmetric=False), dynamic=False)
    with pytest.raises(SpecError, match="per token"):
        ActivationSpec(QuantSpec("int8", (4, 16)))
    assert preset("w8a8-g32", ()).activation == ActivationSpec(QuantSpec("int8", (1, 32), True, "float32"))
    assert preset("w4a8", (576, 1536)).weight.block == (1, 64)


@pytest.mark.parametrize("quantizer", ["rtn", "gptq", "gptaq", AutoRound(iters=4)])
def test_rotated_activations_do_not_mind_outliers(quantizer: str | AutoRound) -> None:
    wanted = tiny.FAMILIES["llama"]()(ids()[0]).logits
    errors = {}
    for scheme in ("w8a8", "w8a8-rotated"):
        model = tiny.FAMILIES["llama"]()
        for layer in model.model.layers:  # the same function, with one hidden unit 64 times larger than the others
            layer.mlp.up_proj.weight.data[3] *= 64
            layer.mlp.down_proj.weight.data[:, 3] /= 64
        result = quantize(model, scheme, method=quantizer, calibration=Calibration(data=ids()))
        errors[scheme] = ((model(ids()[0]).logits - wanted).norm() / wanted.norm()).item()
        assert not any(row.kind == "fell back" for row in result.coverage)
    assert errors["w8a8-rotated"] < errors["w8a8"] / 2
    assert errors["w8a8-rotated"] < 0.06


def test_a_rotated_layer_is_the_layer_on_turned_inputs() -> None:
    weight, x = torch.randn(24, 96, generator=torch.Generator().manual_seed(1)), torch.randn(5, 96)
    scheme = preset("w8a8-rotated", (96,))
    qtensor = nearest(hadamard_transform(weight), choose_qparams(hadamard_transform(weight), scheme.weight), scheme.weight)
    layer = QuantLinear(qtensor, activation=scheme.activation)
    want = fake_quantize(hadamard_transform(x), TOKEN_INT8.grid) @ qtensor.dequantize().T
    torch.testing.assert_close(layer(x), want, rtol=1e-4, atol=1e-4)
    assert (layer(x) - x @ weight.T).norm() < 0.02 * (x @ weight.T).norm()
    learning = x.clone().requires_grad_()
    layer(learning).square().sum().backward()  # through the rotation and the rounding
    exact = x.clone().requires_grad_()
    (exact @ weight.T).square().sum().backward()
    assert (learning.grad - exact.grad).norm() < 0.03 * exact.grad.norm()  # type: ignore[operator, union-attr]


def test_the_native_engine_rotates_inputs_itself() -> None:
    model = tiny.FAMILIES["llama"]()
    quantize(model, "w8a8-rotated", method="rtn")
    prompt = ids()[0][0, :9]
    found = generate(model, prompt.tolist(), max_new_tokens=1, logprobs=tiny.VOCAB, engine="native").logprobs[0].top
    with torch.inference_mode():
        want = model(prompt[None]).logits[0, -1].log_softmax(-1)
    torch.testing.assert_close(torch.tensor([value for _, value in sorted(found)]), want, atol=2e-2, rtol=2e-2)


def test_rotated_grids_that_make_no_sense_are_refused() -> None:
    known, _ = collect(tiny.FAMILIES["llama"](), ["hessian"], calibration=Calibration(data=ids()))
    with pytest.raises(CalibrationError, match="inputs that are not rotated"):
        quantize(tiny.FAMILIES["llama"](), "w8a8-rotated", method="gptq", calibration=Calibration(statistics=known))
    rotated = ActivationSpec(QuantSpec("int8"), rotated=True)
    with pytest.raises(SpecError, match="inputs of NVFP4 weights cannot be rotated"):
        Scheme(preset("nvfp4", ()).weight, rotated)
    assert Scheme.from_dict(preset("w4a8-rotated", (64,)).to_dict()) == preset("w4a8-rotated", (64,))
