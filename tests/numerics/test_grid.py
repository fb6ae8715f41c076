"""Grids: every dtype, block and scale dtype against a plain loop over blocks."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantkit.errors import SpecError
from quantkit.numerics import grid
from quantkit.numerics.search import search_qparams
from quantkit.spec import QuantSpec

BLOCKS = [(1, 8), (1, -1), (-1, -1), (4, 8), (-1, 8), (2, -1)]


def weight(seed: int = 0, shape: tuple[int, ...] = (8, 24)) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_equals_a_loop_over_blocks(block: tuple[int, int], symmetric: bool, bits: int) -> None:
    spec, w = QuantSpec(f"int{bits}", block, symmetric, "float32"), weight()
    scale, zero = grid.choose_qparams(w, spec)
    back = grid.dequantize(grid.quantize(w, scale, zero, spec), scale, zero, spec)
    rows, cols = grid.block_size(spec, (8, 24))
    top = 2**bits - 1
    for i in range(0, 8, rows):
        for j in range(0, 24, cols):
            part = w[i : i + rows, j : j + cols]
            if symmetric:
                step, z = part.abs().max() / (top / 2), float(1 << (bits - 1))
            else:
                low, high = part.min().clamp(max=0), part.max().clamp(min=0)
                step = (high - low) / top
                z = float((-low / step).round())
            want = ((part / step).round().add(z).clamp(0, top) - z) * step
            torch.testing.assert_close(back[i : i + rows, j : j + cols], want)


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 1000),
    size=st.floats(1e-2, 1e4),
    symmetric=st.booleans(),
    dtype=st.sampled_from(["float16", "bfloat16", "float32"]),
)
def test_error_is_at_most_half_a_step_and_zero_is_exact(seed: int, size: float, symmetric: bool, dtype: str) -> None:
    spec = QuantSpec("int4", (1, 8), symmetric, dtype)
    w = weight(seed) * size
    w[:, ::5] = 0
    scale, zero = grid.choose_qparams(w, spec)
    back = grid.dequantize(grid.quantize(w, scale, zero, spec), scale, zero, spec)
    step = grid.expand(scale.float(), spec, (8, 24))
    # Rounding the scale can move the ends of the range by a little more than half a step.
    assert ((back - w).abs() <= step * (0.5 + 0.6 * symmetric + 0.15)).all()
    assert (back[:, ::5] == 0).all()


def test_constant_zero_and_tiny_blocks() -> None:
    for value in (0.0, 1e-9, -3e-8):
        for symmetric in (True, False):
            spec = QuantSpec("int4", (1, 8), symmetric)
            w = torch.full((2, 16), value)
            scale, zero = grid.choose_qparams(w, spec)
            assert (scale > 0).all()
            back = grid.dequantize(grid.quantize(w, scale, zero, spec), scale, zero, spec)
            assert torch.isfinite(back).all()
            assert (back - w).abs().max() <= scale.float().max()


def test_overflowing_scale_names_the_way_out() -> None:
    with pytest.raises(SpecError, match="use scale_dtype float32"):
        grid.choose_qparams(torch.full((1, 8), 1e9), QuantSpec("int4", (1, 8)))


def test_three_dimensional_weights_are_a_loop_of_two() -> None:
    spec, w = QuantSpec("int4", (1, 8), symmetric=False), weight(shape=(3, 8, 24))
    scale, zero = grid.choose_qparams(w, spec)
    assert zero is not None
    codes = grid.quantize(w, scale, zero, spec)
    for i in range(3):
        own_scale, own_zero = grid.choose_qparams(w[i], spec)
        assert torch.equal(codes[i], grid.quantize(w[i], own_scale, own_zero, spec))


@pytest.mark.parametrize("block", [(1, 8), (1, -1), (4, 8), (-1, -1)])
@pytest.mark.parametrize("symmetric", [True, False])
def test_search_never_loses_to_absmax(block: tuple[int, int], symmetric: bool) -> None:
    spec = QuantSpec("int3", block, symmetric)
    w = weight(3)
    w[0, 0] = 40.0  # an outlier that is worth clipping
    importance = torch.rand(24, generator=torch.Generator().manual_seed(9))

    def loss(qparams: tuple[torch.Tensor, torch.Tensor | None], weights: torch.Tensor) -> float:
        back = grid.dequantize(grid.quantize(w, *qparams, spec), *qparams, spec)
        return float(((w - back).square() * weights).sum())

    ones = torch.ones(24)
    assert loss(search_qparams(w, spec), ones) <= loss(grid.choose_qparams(w, spec), ones) * 1.001
    weighted = loss(search_qparams(w, spec, importance), importance)
    assert weighted <= loss(grid.choose_qparams(w, spec), importance) * 1.001
    assert weighted <= loss(search_qparams(w, spec), importance) * 1.001
    assert loss(search_qparams(w, spec, refit=True), ones) <= loss(search_qparams(w, spec, refit=False), ones) * 1.001
