"""The one-pass kernel that rounds to nearest: to the last bit what the plain definitions make of a weight."""

import pytest
import torch

from quantkit.errors import SpecError
from quantkit.kernels.build import compiled
from quantkit.kernels.functions.rounding import round_to_nearest
from quantkit.numerics import grid
from quantkit.numerics.pack import pack
from quantkit.quantizers.base import error_sizes
from quantkit.spec import QuantSpec

pytestmark = pytest.mark.skipif(not compiled("rounding"), reason="no compiler")


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 7, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("scale_dtype", ["float16", "bfloat16", "float32"])
def test_it_is_the_plain_definition_to_the_last_bit(bits: int, symmetric: bool, scale_dtype: str) -> None:
    generator = torch.Generator().manual_seed(bits)
    for rows, columns, block in ((1, 1, -1), (5, 24, 8), (7, 33, 11), (3, 130, -1), (17, 256, 128), (2, 40, 1)):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            weight = torch.randn(rows, columns, generator=generator).to(dtype)
            weight[0, ::2] = weight[0, :1].clone()  # many equal ones: ties
            weight[-1] = 0
            weight[rows // 2, : columns // 2] = 3e-7
            spec = QuantSpec(f"int{bits}", (1, block), symmetric, scale_dtype)
            found = round_to_nearest(weight, spec)
            assert found is not None
            scale, zero = grid.choose_qparams(weight, spec)
            codes = grid.quantize(weight, scale, zero, spec)
            assert torch.equal(found.scale, scale)
            assert torch.equal(found.packed, pack(codes, bits))
            assert (found.zero_point is None) == symmetric
            assert found.zero_point is None or torch.equal(found.zero_point, zero)
            values = grid.dequantize(codes, scale, zero, spec)
            noise, signal = error_sizes(weight.float(), values, None)
            assert found.noise == pytest.approx(noise, rel=1e-6, abs=1e-20)
            assert found.signal == pytest.approx(signal, rel=1e-6)
            assert found.lost == int(((weight != 0).any(-1) & (values == 0).all(-1)).sum())


def test_extreme_scales_are_kept_or_refused() -> None:
    small = torch.full((2, 32), 1e-42)
    spec = QuantSpec("int4", (1, 32), True, "float32")
    found = round_to_nearest(small, spec)
    assert found is not None
    assert torch.equal(found.scale, grid.choose_qparams(small, spec)[0])
    with pytest.raises(SpecError, match="not finite in float16"):
        round_to_nearest(torch.full((2, 32), 1e9), QuantSpec("int4", (1, 32), True, "float16"))


@pytest.mark.parametrize("spec", [QuantSpec("fp4_e2m1", (1, 32)), QuantSpec("int4", (8, 32))])
def test_other_grids_are_left_to_the_plain_definition(spec: QuantSpec) -> None:
    assert round_to_nearest(torch.randn(16, 64), spec) is None
