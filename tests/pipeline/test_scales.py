"""Numbers at the edges: scales that their stored dtype cannot hold, and layers that are hardly what they were."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from quantkit import checkpoint
from quantkit.calibrate.data import Calibration
from quantkit.errors import CalibrationError, QuantkitError, SpecError
from quantkit.numerics import grid
from quantkit.pipeline.quantize import quantize
from quantkit.pipeline.settings import Output
from quantkit.quantizers.base import QUANTIZERS, quantize_site, relative_error
from quantkit.quantizers.rtn import RTN
from quantkit.spec import QuantSpec
from tests.tiny import tiny_llama

UP = "model.layers.0.mlp.up_proj"


def halved(weight: Tensor) -> Tensor:
    """Return a weight every other row of which is 2^-30 times as large."""
    return weight * torch.tensor([1.0, 2.0**-30]).repeat(weight.shape[0] // 2)[:, None]


CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "small": lambda weight: weight * 1e-6,
    "tiny": lambda weight: weight * 1e-30,
    "large": lambda weight: weight * 1e9,
    "rows": halved,
}


def odd_model(change: Callable[[Tensor], Tensor], dtype: torch.dtype = torch.float32):
    """Return a model whose first up projection has unusual numbers, and that weight in float32."""
    model = tiny_llama(num_hidden_layers=1, intermediate_size=128)
    weight = model.get_submodule(UP).weight
    weight.data = change(weight.data)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype
    return model, weight.detach().float()


def row_errors(weight: Tensor, approximation: Tensor) -> Tensor:
    return (weight - approximation).double().norm(dim=1) / weight.double().norm(dim=1)


@pytest.mark.parametrize(
    ("change", "format", "dtype"),
    [
        ("small", "native", torch.float32),
        ("small", "compressed-tensors", torch.float32),
        ("tiny", "compressed-tensors", torch.bfloat16),
        ("large", "native", torch.float32),
        ("rows", "compressed-tensors", torch.float32),
        ("rows", "native", torch.bfloat16),
    ],
)
def test_extreme_weights_get_scales_that_hold_them(change: str, format: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model, weight = odd_model(CHANGES[change], dtype)
    result = quantize(model, "w8a16", out=tmp_path / "q", method="rtn", output=Output(format=format))
    found = checkpoint.load(tmp_path / "q", cache=False).get_submodule(UP).qtensor
    qtensor = result.model.get_submodule(UP).qtensor
    assert found.spec == qtensor.spec
    assert float(row_errors(weight, qtensor.dequantize()).max()) < 0.02
    wider = dtype == torch.float32
    assert qtensor.spec.scale_dtype == "bfloat16"
    row = next(row for row in result.coverage if row.name == UP)
    assert ("scales are bfloat16, because float16 cannot hold them" in (row.reason or "")) == wider
    others = {
        one.qtensor.spec.scale_dtype for name, one in result.model.named_modules() if hasattr(one, "qtensor") and name != UP
    }
    assert others == ({"float16"} if wider else {"bfloat16"})


def test_a_format_that_cannot_store_wider_scales_is_an_error_before_any_work(tmp_path: Path) -> None:
    model, _ = odd_model(CHANGES["small"], torch.float16)
    with pytest.raises(SpecError, match=rf"{UP}: its weights are too small for scales in float16 .*load the model in bfloat16"):
        quantize(model, "w8a16", out=tmp_path / "q", method="rtn")
    assert not list(tmp_path.iterdir())
    model, weight = odd_model(CHANGES["small"], torch.float16)
    result = quantize(model, "w8a16", out=tmp_path / "q", method="rtn", output=Output(format="native"))
    assert relative_error(weight, result.model.get_submodule(UP).qtensor.dequantize(), None) < 1e-3


def test_blocks_that_do_not_matter_are_told_of_where_nothing_wider_exists() -> None:
    model, _ = odd_model(halved)
    result = quantize(model, "nvfp4", method="rtn")
    row = next(row for row in result.coverage if row.name == UP)
    assert "256 of 512 blocks are too small for scales in float8_e4m3fn and become zero" in (row.reason or "")
    model, _ = odd_model(lambda weight: weight * 1e-39)
    for scheme in ("nvfp4", "mxfp4", "w4a16"):
        with pytest.raises(SpecError, match=f"{UP}: its weights are too small"):
            quantize(model, scheme, method="rtn")


@pytest.mark.parametrize("method", QUANTIZERS.names())
def test_every_quantizer_holds_extreme_numbers(method: str) -> None:
    ids = [torch.randint(3, 190, (1, 32), generator=torch.Generator().manual_seed(0))]
    for change in ("tiny", "large"):
        model, weight = odd_model(lambda weight, change=change: CHANGES[change](weight))
        result = quantize(model, "w4a16", method=method, calibration=Calibration(ids))
        approximation = result.model.get_submodule(UP).qtensor.dequantize()
        assert float((weight - approximation).double().norm() / weight.double().norm()) < 0.25
        assert all(0 <= loss < 1 for loss in result.losses.values())


@pytest.mark.parametrize("size", [1e-12, 1e12])
def test_static_input_scales_that_are_not_held_name_the_layer(size: float) -> None:
    model, _ = odd_model(lambda weight: weight * size)
    ids = [torch.randint(3, 190, (1, 32), generator=torch.Generator().manual_seed(0))]
    with pytest.raises(CalibrationError, match=r"mlp\.down_proj: its inputs reach .*float16 cannot hold their static scale"):
        quantize(model, "w8a8-static", method="rtn", calibration=Calibration(ids))


def test_a_layer_that_is_hardly_what_it_was_is_named(caplog: pytest.LogCaptureFixture) -> None:
    def spiked(weight: Tensor) -> Tensor:
        weight = weight.clone()
        weight[:, 0] = 20.0 * weight.std()
        weight[:, 0] *= 1 - 2 * (torch.arange(len(weight)) % 2)
        return weight

    model, _ = odd_model(spiked)
    model.get_submodule(UP).weight.data[:, 0] *= 0.4
    result = quantize(model, "w2a16-asym-channel", method="rtn")
    row = next(row for row in result.coverage if row.name == UP)
    assert "relative error 0." in (row.reason or "")
    assert f"layers have a relative error above 0.5: {UP}" in caplog.text
    fine = quantize(tiny_llama(), "w4a16", method="rtn")
    assert not any("relative error" in (row.reason or "") for row in fine.coverage)


def test_channels_that_become_zero_are_counted() -> None:
    model, _ = odd_model(halved)
    result = quantize(model, "fp8-tensor", method="rtn")
    row = next(row for row in result.coverage if row.name == UP)
    assert "64 of 128 output channels become zero" in (row.reason or "")


def test_errors_of_any_size_are_measured_alike() -> None:
    weight = torch.randn(8, 32, generator=torch.Generator().manual_seed(0))
    usual = relative_error(weight, weight * 0.9, None)
    for exponent in (-120, -60, 60, 100):
        other = grid.shifted(weight, exponent)
        assert relative_error(other, other * 0.9, None) == pytest.approx(usual, rel=1e-5)
    assert relative_error(torch.zeros(2, 2), torch.zeros(2, 2), None) == 0


def test_a_quantizer_that_loses_a_scale_is_named() -> None:
    class Careless(RTN):
        def quantize(self, weight, spec, statistics):
            qtensor, notes = super().quantize(weight, spec, statistics)
            return qtensor.with_parts({"scale": torch.zeros_like(qtensor.scale)}), notes

    with pytest.raises(QuantkitError, match=r"some\.layer: a scale is zero or not finite in float16"):
        quantize_site(Careless(), "some.layer", torch.randn(4, 32), QuantSpec("int4"), None)
