r"""Fake quantization: round to a grid and come straight back, to compute with the error without integer arithmetic.

Training a weight behind its rounding wants a gradient where rounding has none. Rounding counts as the identity
(straight-through, Bengio, Leonard, Courville 2013, arXiv 1308.3432), except where the grid ends. With u the weight in steps of
the grid and v(u) the nearest level,

.. math:: \hat w = s\, v(w / s), \qquad
    \frac{\partial \hat w}{\partial w} = [\text{inside}], \qquad
    \frac{\partial \hat w}{\partial s} = v - u\,[\text{inside}], \qquad
    \frac{\partial \hat w}{\partial z} = -s\,[\text{outside}]

as in LSQ (Esser, McKinstry, Bablani, Appuswamy, Modha 2020, arXiv 1902.08153, section 2.1) and LSQ+ for the zero point z
(Bhalgat, Lee, Nagel, Blankevoort, Kwak 2020, arXiv 2004.09576, equations 6 and 7). Gradients of scales are multiplied by
:math:`1 / \sqrt{n\, v_{max}}`, n weights to a scale. *Inside* reaches half a step beyond the outermost level: what rounds to it
without being clipped. The same holds for a table of values (FP8, FP4, NF4), whose steps are not even.

Rounding itself is :func:`quantkit.numerics.grid.quantize` and :func:`quantkit.numerics.grid.dequantize`, of scales rounded to
their stored dtype: what is trained is what a :class:`quantkit.qtensor.GridTensor` of the weight stands for, bit for bit.
"""

from typing import Any

import torch
from torch import Tensor

from quantkit.dtypes import DTYPES, table
from quantkit.numerics import grid
from quantkit.spec import QuantSpec

WeightGrid = tuple[Tensor, Tensor | None, Tensor | None]
"""Scale (..., out_blocks, in_blocks), zero point of that shape and global scale (..., 1) of a weight, as stored."""


class _StraightThrough(torch.autograd.Function):
    """``rounded``, with the gradient of the identity in ``x``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rounded: Tensor) -> Tensor:
        return rounded.view_as(rounded)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return slope, None


def straight_through(x: Tensor, rounded: Tensor) -> Tensor:
    """Return ``rounded`` exactly; its gradient goes to ``x``, of the same shape and dtype, as if nothing had been rounded."""
    return _StraightThrough.apply(x, rounded)  # type: ignore[no-any-return, no-untyped-call]


def fake_quantize(x: Tensor, spec: QuantSpec, scale: Tensor | None = None) -> Tensor:
    """Round activations to a grid: one found from themselves, or a static one of the given scale.

    Args:
        x: floating (..., in); every row is a token.
        spec: ``(1, -1)`` one scale per token, ``(1, n)`` one per token and n channels, or ``(-1, -1)`` one for all.
        scale: (1,), for a static grid, which is symmetric and has block ``(-1, -1)``.

    Returns:
        The nearest values that the grid has, in x's shape and dtype. Rounding has the gradient of the identity.
    """
    rows = x.detach().reshape(-1, x.shape[-1]).float()
    if not rows.numel():
        return x
    qparams = grid.choose_qparams(rows, spec) if scale is None else (scale.view(1, 1), None)
    rounded = grid.dequantize(grid.quantize(rows, *qparams, spec), *qparams, spec).to(x.dtype).view(x.shape)
    return straight_through(x, rounded) if torch.is_grad_enabled() and x.requires_grad else rounded


def stored_grid(scale: Tensor, zero_point: Tensor | None, global_scale: Tensor | None, spec: QuantSpec) -> WeightGrid:
    """Return a grid that is being learned as it is stored: scales in their dtype, zero points whole and uint8."""
    zero = zero_point
    if zero is not None and zero.is_floating_point():
        zero = zero.round().clamp(0, 2**spec.bits - 1).to(torch.uint8)
    return grid.round_scale(scale.float(), spec.scale_dtype), zero, global_scale


def weight_codes(weight: Tensor, stored: WeightGrid, spec: QuantSpec) -> Tensor:
    """Return the codes (..., out, in) that a weight of that shape has on a stored grid, uint8."""
    scale, zero, global_scale = stored
    return grid.quantize(_multiplied(weight, global_scale), scale, zero, spec)


def fake_weight(weight: Tensor, stored: WeightGrid, spec: QuantSpec) -> Tensor:
    """Return what the codes of ``weight`` (..., out, in) stand for, float32."""
    scale, zero, global_scale = stored
    step = scale if global_scale is None else scale.float() / global_scale.unsqueeze(-1)
    return grid.dequantize(weight_codes(weight, stored, spec), step, zero, spec)


def fake_weight_gradient(slope: Tensor, weight: Tensor, stored: WeightGrid, spec: QuantSpec) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients by a weight, its scales and its zero points.

    Args:
        slope: (..., out, in), the gradient of :func:`fake_weight`'s result.
        weight: of that shape.
        stored: its grid.
        spec: the kind of grid.

    Returns:
        float32: (..., out, in); and two of the scale's shape, that of the scales multiplied by :func:`scale_factor`.
    """
    scale, zero, global_scale = stored
    shape = tuple(weight.shape)
    steps = _multiplied(weight, global_scale).float() / grid.expand(scale.float(), spec, shape)
    codes = weight_codes(weight, stored, spec)
    if spec.is_integer:
        middle = grid.zero_code(spec) if zero is None else grid.expand(zero, spec, shape).float()
        levels = codes.float() - middle
        low: Tensor | float = -0.5 - middle
        inside = (steps >= low) & (steps <= low + 2**spec.bits)
    else:
        values = table(spec.dtype)[0].to(weight.device)
        levels = values[codes.int()]
        inside = steps.abs() <= _reach(spec.dtype)
    wide = slope.float()
    by_scale = grid.to_blocks(wide * torch.where(inside, levels - steps, levels), spec).sum(-1)
    if global_scale is not None:
        by_scale = by_scale / global_scale.unsqueeze(-1)
    by_zero = grid.to_blocks(torch.where(inside, 0.0, wide), spec).sum(-1) * -scale.float()
    return torch.where(inside, wide, 0.0), by_scale * scale_factor(spec, shape), by_zero


def scale_factor(spec: QuantSpec, shape: tuple[int, ...]) -> float:
    """Return what LSQ multiplies the gradient of a scale by: one over the root of weights per scale times highest level."""
    rows, columns = grid.block_size(spec, shape)
    highest = (2**spec.bits - 1) / 2 if spec.is_integer else DTYPES[spec.dtype].largest
    return float((rows * columns * highest) ** -0.5)


def whole_scale_gradient(by_scale: Tensor, by_weight: Tensor, weight: Tensor, scale: Tensor, spec: QuantSpec) -> Tensor:
    r"""Return the gradient by scales of weights that keep their place in the grid: as if they grew along with their scale.

    With w = s u, what is rounded is s v(u), and its gradient by s at a fixed u is v, where :func:`fake_weight_gradient` holds w
    fixed and returns v - u. A weight that begins with its code's own value has v = u: then the latter is nothing but noise.

    Args:
        by_scale: gradient by scales, multiplied by :func:`scale_factor`, of the scale's shape.
        by_weight: gradient by the weight (..., out, in).
        weight: of that shape.
        scale: float32 (..., out_blocks, in_blocks).
        spec: the kind of grid; its scales are learned, so there is no global one.
    """
    along = grid.to_blocks(by_weight * weight, spec).sum(-1) / scale
    return by_scale / scale_factor(spec, tuple(weight.shape)) + along


def nearest_in_cell(weight: Tensor, codes: Tensor, stored: WeightGrid, spec: QuantSpec, share: float = 1.0) -> Tensor:
    """Return the weight closest to ``weight`` that still rounds to ``codes``, float32.

    Args:
        weight: floating (..., out, in).
        codes: uint8 of that shape, chosen in whatever way.
        stored: the grid.
        spec: its kind.
        share: how far to go there from the codes' own values, 0 to 1.

    A weight beyond the grid goes no further than where it starts to be clipped, and gets no gradient any more.
    """
    scale, zero, global_scale = stored
    step = scale if global_scale is None else scale.float() / global_scale.unsqueeze(-1)
    own = grid.dequantize(codes, step, zero, spec)
    wanted = _without_clipping(weight.float(), step, stored, spec)
    low, high = torch.zeros_like(own), torch.ones_like(own)
    for _ in range(_HALVINGS):  # cells of a table are not even: the border is found by halving
        at = (low + high) / 2
        fits = weight_codes(own + at * (wanted - own), stored, spec) == codes
        low, high = torch.where(fits, at, low), torch.where(fits, high, at)
    low = torch.where(weight_codes(wanted, stored, spec) == codes, 1.0, low)
    found = own + share * low * (wanted - own)
    return torch.where(weight_codes(found, stored, spec) == codes, found, own)


_HALVINGS, _MARGIN = 12, 2.0**-10


def _without_clipping(weight: Tensor, step: Tensor, stored: WeightGrid, spec: QuantSpec) -> Tensor:
    """Return ``weight``, but a little inside the reach of the grid where it is beyond."""
    shape = tuple(weight.shape)
    wide = grid.expand(step.float(), spec, shape)
    if spec.is_integer:
        zero = torch.full_like(stored[0].float(), grid.zero_code(spec)) if stored[1] is None else stored[1].float()
        low, width = grid.expand(-0.5 - zero, spec, shape), float(2**spec.bits)
    else:
        low, width = torch.full_like(wide, -_reach(spec.dtype)), 2 * _reach(spec.dtype)
    steps = weight / wide
    inside = steps.maximum(low + _MARGIN).minimum(low + (width - _MARGIN)) * wide
    return torch.where((steps < low) | (steps > low + width), inside, weight)


def _reach(dtype: str) -> float:
    """Return how far from zero a table rounds without clipping: half of its last step beyond its largest value."""
    values, rising, _ = table(dtype)
    last, before = (float(values[int(code)]) for code in (rising[-1], rising[-2]))
    return last + (last - before) / 2


def _multiplied(weight: Tensor, global_scale: Tensor | None) -> Tensor:
    return weight if global_scale is None else weight.float() * global_scale.unsqueeze(-1)
