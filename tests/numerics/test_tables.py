"""Dtypes that are tables of values: golden values, rounding against brute force, and the way through a checkpoint."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantkit import checkpoint
from quantkit.calibrate.data import Calibration
from quantkit.dtypes import DTYPES
from quantkit.errors import SpecError
from quantkit.numerics import grid
from quantkit.pipeline.quantize import quantize
from quantkit.pipeline.settings import Output
from quantkit.presets import NAMED, preset
from quantkit.qtensor import GridTensor
from quantkit.quantizers.rtn import nearest
from quantkit.spec import QuantSpec
from tests.tiny import tiny_llama

# The values printed in QLoRA's appendix E.
NF4_NEGATIVE = [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635]
NF4_SMALL = [-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725]
NF4_POSITIVE = [0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0]
NF4 = [*NF4_NEGATIVE, *NF4_SMALL, *NF4_POSITIVE]
FP4 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
SPECS = [
    QuantSpec("nf4", (1, 64)),
    QuantSpec("fp4_e2m1", (1, 32), scale_dtype="float8_e8m0fnu"),
    QuantSpec("fp4_e2m1", (1, 16), scale_dtype="float32"),
    QuantSpec("fp8_e4m3", (1, -1)),
    QuantSpec("fp8_e4m3", (-1, -1), scale_dtype="float32"),
    QuantSpec("fp8_e4m3", (8, 32), scale_dtype="bfloat16"),
]


def test_values_are_those_of_the_standards() -> None:
    torch.testing.assert_close(torch.tensor(DTYPES["nf4"].values), torch.tensor(NF4), rtol=0, atol=2e-7)
    assert list(DTYPES["fp4_e2m1"].values or ()) == FP4 + [-value for value in FP4]
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    assert torch.equal(torch.tensor(DTYPES["fp8_e4m3"].values).nan_to_num(999), every.nan_to_num(999))
    assert (DTYPES["fp8_e4m3"].largest, DTYPES["fp4_e2m1"].largest, DTYPES["nf4"].largest) == (448.0, 6.0, 1.0)


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: f"{s.describe()} {s.scale_dtype}")
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), size=st.floats(1e-2, 1e2))
def test_every_weight_goes_to_a_nearest_value(spec: QuantSpec, seed: int, size: float) -> None:
    weight = size * torch.randn(16, 64, generator=torch.Generator().manual_seed(seed))
    weight[:, :2] = 0
    scale, zero = grid.choose_qparams(weight, spec)
    assert zero is None
    codes = grid.quantize(weight, scale, None, spec)
    back = grid.dequantize(codes, scale, None, spec)
    values = torch.tensor([v for v in DTYPES[spec.dtype].values or () if v == v])
    step = grid.expand(scale.float(), spec, (16, 64)).expand(16, 64)
    best = (values * step.unsqueeze(-1) - weight.unsqueeze(-1)).abs().amin(-1)
    torch.testing.assert_close((back - weight).abs(), best, rtol=1e-5, atol=1e-6 * size)
    assert (back[:, :2] == 0).all()
    again = GridTensor.from_codes(codes, scale, None, spec)
    assert torch.equal(again.dequantize(), back)
    assert torch.equal(again.codes(), codes)


def test_ties_go_to_the_even_mantissa() -> None:
    spec = QuantSpec("fp4_e2m1", (1, -1), scale_dtype="float32")
    x = torch.tensor([[0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, -0.25, -5.0, 6.0]])
    back = grid.dequantize(grid.quantize(x, torch.ones(1, 1), None, spec), torch.ones(1, 1), None, spec)
    assert back.tolist() == [[0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, 0.0, -4.0, 6.0]]


def test_microscaling_scales_are_the_powers_of_two_of_the_standard() -> None:
    weight = torch.zeros(1, 128)
    weight[0, [0, 32, 64]] = torch.tensor([7.0, -0.9, 2.0**-20])
    scale, _ = grid.choose_qparams(weight, SPECS[1])
    assert scale.dtype == torch.float8_e8m0fnu
    assert scale.float().tolist() == [[1.0, 0.125, 2.0**-22, 1.0]]
    assert nearest(weight, (scale, None), SPECS[1]).bits_per_weight == 4.25


@pytest.mark.parametrize("name", [name for name in NAMED if name != "fp8-block"])
def test_a_model_in_each_format_comes_back_from_the_disk(tmp_path: Path, name: str) -> None:
    model, ids = tiny_llama(intermediate_size=128), torch.arange(3, 40)[None]
    before = model(ids).logits
    quantize(model, name, out=tmp_path / "q", method="rtn", calibration=Calibration(data=[ids]), output=Output(format="native"))
    after = model(ids).logits
    loaded = checkpoint.load(tmp_path / "q", compute="exact")(ids).logits  # on kernels, which add in another order
    assert torch.allclose(loaded, after, rtol=0, atol=2e-5)
    error = ((after - before).square().mean() / before.square().mean()).sqrt().item()
    assert 1e-4 < error < (0.15 if "fp8" in name else 0.5)


def test_what_does_not_fit_is_refused_before_any_work() -> None:
    with pytest.raises(SpecError, match="GPTQ chooses integers, not nf4; use quantizer rtn"):
        quantize(tiny_llama(intermediate_size=128), "nf4", calibration=Calibration(data=[torch.ones(1, 16, dtype=torch.int64)]))
    with pytest.raises(SpecError, match="compressed-tensors nf4 g64 is not written"):
        quantize(tiny_llama(intermediate_size=128), "nf4", out="nowhere", method="rtn")
    with pytest.raises(SpecError, match="no zero point"):
        QuantSpec("nf4", (1, 64), symmetric=False)
    with pytest.raises(SpecError, match="float8_e8m0fnu goes with"):
        QuantSpec("int4", (1, 64), scale_dtype="float8_e8m0fnu")
    with pytest.raises(SpecError, match="did you mean 'nf4'"):
        preset("nf44", [64])
