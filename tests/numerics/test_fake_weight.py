"""Weights behind their rounding: the values are those of a quantized tensor, the gradients those of the formulas."""

import dataclasses

import pytest
import torch
from torch import Tensor

from quantkit.kernels.functions import fake as functions
from quantkit.numerics import fake, grid
from quantkit.presets import preset
from quantkit.qtensor import GridTensor
from quantkit.spec import QuantSpec

SPECS = [
    QuantSpec("int4", (1, 64), False),
    QuantSpec("int2", (1, 32), False, "bfloat16"),
    QuantSpec("int3", (1, 19), True),
    QuantSpec("int8", (1, -1), True, "float32"),
    QuantSpec("int5", (4, 8), False),
    QuantSpec("int6", (-1, -1), True),
    *(preset(name, [64]).weight for name in ("nf4", "fp8", "fp8-tensor", "mxfp4", "nvfp4")),
]
each_spec = pytest.mark.parametrize("spec", SPECS, ids=QuantSpec.describe)


def problem(spec: QuantSpec, *lead: int) -> tuple[Tensor, fake.WeightGrid]:
    """Return a weight whose ends are clipped, and its grid."""
    columns = 19 * 8 if spec.block[1] == 19 else 128
    weight = torch.randn((*lead, 8, columns), generator=torch.Generator().manual_seed(spec.bits))
    weight[..., 0, 0] = 5
    largest = weight.abs().amax((-1, -2)).unsqueeze(-1)
    global_scale = grid.choose_global_scale(largest, spec) if spec.has_global_scale else None
    usual = weight if global_scale is None else weight * global_scale.unsqueeze(-1)
    scale, zero = grid.choose_qparams(usual * 0.8, spec)
    return weight, (scale, zero, global_scale)


@each_spec
@pytest.mark.parametrize("lead", [(), (3,)], ids=["matrix", "experts"])
def test_what_is_seen_is_what_a_quantized_tensor_stands_for(spec: QuantSpec, lead: tuple[int, ...]) -> None:
    functions.register()
    weight, stored = problem(spec, *lead)
    scale, zero, global_scale = stored
    qtensor = GridTensor.from_codes(fake.weight_codes(weight, stored, spec), scale, zero, spec, global_scale)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        arguments = (weight, scale.float(), zero, global_scale, functions.spec_key(spec), dtype)
        assert torch.equal(torch.ops.quantkit.fake_weight(*arguments), qtensor.dequantize(dtype))


@each_spec
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_operator_has_the_gradients_of_the_definition(spec: QuantSpec, dtype: torch.dtype) -> None:
    functions.register()
    weight, stored = problem(spec, 2)
    scale, zero, global_scale = stored
    slope = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    learned = [weight.requires_grad_(), scale.float().requires_grad_()]
    learned += [] if zero is None else [zero.float().requires_grad_()]
    given = (*learned, *([None] if zero is None else []), global_scale)
    torch.ops.quantkit.fake_weight(*given, functions.spec_key(spec), dtype).backward(slope)
    want = fake.fake_weight_gradient(slope, weight.detach(), stored, spec)
    assert torch.equal(weight.grad, want[0])
    for one, gradient in zip(learned[1:], want[1:], strict=False):
        torch.testing.assert_close(one.grad, gradient, rtol=1e-5, atol=1e-5 * float(gradient.detach().abs().max() + 1e-9))


@each_spec
def test_gradients_are_those_of_straight_through_rounding(spec: QuantSpec) -> None:
    """Rounding replaced by ``u + (round(u) - u).detach()`` and torch left to differentiate."""
    weight, (scale, zero, global_scale) = problem(spec)
    stored = (scale, zero, global_scale)
    shape = tuple(weight.shape)
    w = weight.double().requires_grad_()
    s = scale.double().requires_grad_()
    multiplier = 1.0 if global_scale is None else global_scale.double().unsqueeze(-1)
    step = grid.expand(s, spec, shape)
    u = w * multiplier / step
    levels = grid.dequantize(fake.weight_codes(weight, stored, spec), torch.ones_like(scale, dtype=torch.float32), zero, spec)
    inside = fake.fake_weight_gradient(torch.ones_like(weight), weight, stored, spec)[0].bool()
    assert 0 < int((~inside).sum()) < inside.numel()
    v = torch.where(inside, u + (levels.double() - u).detach(), levels.double())
    slope = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    (v * step / multiplier).backward(slope.double())
    by_weight, by_scale, _ = fake.fake_weight_gradient(slope, weight, stored, spec)
    torch.testing.assert_close(by_weight.double(), w.grad, rtol=1e-6, atol=1e-6)
    factor = fake.scale_factor(spec, shape)
    torch.testing.assert_close(by_scale.double(), s.grad * factor, rtol=1e-4, atol=1e-4 * float(s.grad.abs().max()) * factor)


def test_zero_points_learn_only_from_what_is_clipped() -> None:
    spec = QuantSpec("int2", (1, 4), False, "float32")
    weight = torch.tensor([[0.0, 1.0, 2.0, 9.0]])
    stored = (torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.uint8), None)
    _, by_scale, by_zero = fake.fake_weight_gradient(torch.ones(1, 4), weight, stored, spec)
    assert by_zero.item() == -1  # one weight lies beyond the grid: moving the zero point up by one moves it down by one step
    assert by_scale.item() == pytest.approx(3 * fake.scale_factor(spec, (1, 4)))


@each_spec
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_a_weight_in_the_cells_of_given_codes_rounds_to_them(spec: QuantSpec, share: float) -> None:
    weight, stored = problem(spec)
    own = fake.weight_codes(weight, stored, spec)
    other = fake.weight_codes(weight + 0.3 * weight.roll(1, -1), stored, spec)  # chosen in another way
    for codes in (own, other):
        inside = fake.nearest_in_cell(weight, codes, stored, spec, share)
        assert torch.equal(fake.weight_codes(inside, stored, spec), codes)
    if share == 1:
        clipped = fake.fake_weight_gradient(torch.ones_like(weight), weight, stored, spec)[0] == 0
        near = fake.nearest_in_cell(weight, own, stored, spec)
        assert torch.equal(near[~clipped], weight[~clipped])
        assert bool((fake.fake_weight_gradient(torch.ones_like(weight), near, stored, spec)[0] == 1).all())
        levels = fake.fake_weight(inside, stored, spec)
        assert bool(((inside - weight).abs() <= (levels - weight).abs() + 1e-6).all())


def test_a_scale_that_is_learned_is_rounded_as_it_is_stored() -> None:
    spec = dataclasses.replace(SPECS[0], scale_dtype="float16")
    weight, (scale, zero, _) = problem(spec)
    learned = scale.float() * 1.0001
    seen = fake.fake_weight(weight, fake.stored_grid(learned, zero, None, spec), spec)
    assert torch.equal(seen, fake.fake_weight(weight, (learned.half(), zero, None), spec))


@each_spec
def test_the_gradient_of_scales_whose_weights_move_along_is_that_of_fixed_codes(spec: QuantSpec) -> None:
    if spec.has_global_scale:
        return  # its scales are not learned
    weight, stored = problem(spec, 2)
    scale, zero, _ = stored
    slope = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    by_weight, by_scale, _ = fake.fake_weight_gradient(slope, weight, stored, spec)
    found = fake.whole_scale_gradient(by_scale, by_weight, weight, scale.float(), spec)
    levels = grid.dequantize(fake.weight_codes(weight, stored, spec), torch.ones_like(scale.float()), zero, spec)
    want = grid.to_blocks(slope * levels, spec).sum(-1)
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-4 * float(want.abs().max()))
