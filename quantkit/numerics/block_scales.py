r"""Search for the scales of ggml's blocks (:mod:`quantkit.numerics.ggml`), weighted by the importance of each input channel.

First every sub-block gets the scale (and minimum) that it would like best, as on any grid:
:math:`\min \sum_k h_k (w_k - s\,l_k + m)^2`. Then the block's float16 numbers and all small integers are chosen together: for
several sizes of :math:`d` every sub-block tries the integers next to what it wants, codes rounded anew for each, minimums
fitted to those codes; the size whose sub-blocks together lose least stays. One that all 6-bit scales share must be a
compromise, and rounding each to its nearest multiple is not the best one.

Codes are afterwards chosen on this fixed grid by whichever quantizer; :func:`fit` then moves scales and minimums, still on
their grid of two levels, to where the layer's output error (with the whole Hessian) is smallest for those codes.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from quantkit.dtypes import DTYPES
from quantkit.errors import SpecError
from quantkit.numerics import grid
from quantkit.numerics.descent import best_step
from quantkit.numerics.ggml import BlockType, Content, levels, steps
from quantkit.numerics.search import group_weights

_SLICE = 1 << 18
"""Weights that are looked at together."""

_RANGES = tuple(1.04 - 0.05 * i for i in range(11))
"""Factors by which the range of a sub-block is scaled."""

_SIZES = (1.0, 0.97, 0.94, 1.03, 1.08)
"""Factors by which the step between integer scales is scaled."""

_LARGEST, _SMALLEST = 65504.0, 2.0**-24


def search(weight: Tensor, kind: BlockType, importance: Tensor | None = None, scale: Tensor | None = None) -> Content:
    """Choose scales of all blocks of a weight, and the nearest codes.

    Args:
        weight: float32 (out, in).
        kind: type of the blocks.
        importance: non-negative (in,), e.g. E[x^2]; None weighs all inputs alike.
        scale: float32 (out, groups), what every sub-block would like best, where that is known already; only without minimums.

    Returns:
        Leading dimensions (out, blocks).

    Raises:
        SpecError: weights so large that their scale is not finite in float16.
    """
    per_group = group_weights(importance, weight.shape[-1], kind.group, weight.device)
    weights = per_group.unflatten(0, (-1, kind.size // kind.group))  # (blocks, sub-blocks, group)
    step = max(1, _SLICE // weight.shape[-1])
    parts = []
    for start in range(0, weight.shape[0], step):
        rows = weight[start : start + step].float().unflatten(-1, (*weights.shape[:2], kind.group))
        known = None if scale is None else scale[start : start + step].view(rows.shape[:-1])
        parts.append(_search(rows, weights, kind, known))
    joined = [None if column[0] is None else torch.cat(column) for column in zip(*parts, strict=True)]
    return Content(*joined)  # type: ignore[arg-type]


def _search(w: Tensor, h: Tensor, kind: BlockType, known: Tensor | None) -> Content:
    """Search blocks w (rows, blocks, sub-blocks, group)."""
    scale, minimum = _wanted(w, h, kind) if known is None else (known, None)
    if kind.scales is None:
        d = _half(scale.squeeze(-1))
        low = None if minimum is None else _half(minimum.squeeze(-1))
        return _with_codes(w, kind, Content(d, d, None, low, None))
    best: Content | None = None
    least: Tensor | None = None
    for size in _SIZES:
        found, loss = _two_levels(w, h, kind, scale, minimum, size)
        if best is None or least is None:
            best, least = found, loss
            continue
        better = loss < least
        least = torch.where(better, loss, least)
        best = Content(*(None if a is None else _where(better, a, b) for a, b in zip(found, best, strict=True)))  # type: ignore[arg-type]
    assert best is not None
    return _with_codes(w, kind, best)


def _where(condition: Tensor, a: Tensor, b: Tensor | None) -> Tensor:
    assert b is not None
    return torch.where(condition if a.ndim == condition.ndim else condition.unsqueeze(-1), a, b)


def _with_codes(w: Tensor, kind: BlockType, content: Content) -> Content:
    scale, minimum = steps(content)
    return content._replace(codes=_nearest(w, scale, minimum, kind).flatten(-2))


def _half(value: Tensor) -> Tensor:
    if bool((value.abs() > _LARGEST).any()) or not bool(torch.isfinite(value).all()):
        raise SpecError(
            f"a scale is not finite in float16, which is what blocks of a GGUF file have (largest {value.abs().max():.4g}); "
            "leave the layer in float by a rule"
        )
    stored = value.half()
    lost = (stored == 0) & (value != 0)  # the smallest step that there is, and few of them, are better than none
    return torch.where(lost, torch.copysign(torch.full_like(value, _SMALLEST), value).half(), stored)


def _nearest(w: Tensor, scale: Tensor, minimum: Tensor | None, kind: BlockType) -> Tensor:
    """Return uint8 codes nearest to w (..., sub-blocks, group)."""
    shifted = w if minimum is None else w + minimum.unsqueeze(-1)
    ratio = shifted / safe(scale).unsqueeze(-1)
    if DTYPES[kind.dtype].values is not None:
        return grid.nearest_in_table(ratio, kind.dtype)
    return ratio.add_(kind.zero).round_().clamp_(0, DTYPES[kind.dtype].levels - 1).to(torch.uint8)


def safe(scale: Tensor) -> Tensor:
    """Return a scale that can divide: where it is zero every code stands for the same value."""
    return torch.where(scale == 0, torch.full_like(scale, 1e-30), scale)


def _loss(w: Tensor, h: Tensor, scale: Tensor, minimum: Tensor | None, kind: BlockType) -> tuple[Tensor, Tensor]:
    """Return the weighted error (..., sub-blocks) of the nearest codes, and their levels."""
    level = levels(_nearest(w, scale, minimum, kind), kind)
    error = w - level * scale.unsqueeze(-1)
    if minimum is not None:
        error = error + minimum.unsqueeze(-1)
    return (error.square() * h).sum(-1), level


def _wanted(w: Tensor, h: Tensor, kind: BlockType) -> tuple[Tensor, Tensor | None]:
    """Return the scale and minimum that every sub-block would like best, float32 (..., sub-blocks)."""
    best: list[Tensor] = []
    for scale, minimum in _candidates(w, kind):
        for attempt in range(2):
            loss, level = _loss(w, h, scale, minimum, kind)
            tried = [loss, scale, *([] if minimum is None else [minimum])]
            best = [torch.where(loss < best[0], new, old) for new, old in zip(tried, best, strict=True)] if best else tried
            if attempt == 0:
                scale, minimum = _refit(w, h, level, scale, minimum, kind)
    return best[1], best[2] if len(best) > 2 else None


def _candidates(w: Tensor, kind: BlockType) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Yield ranges to try: of either sign where levels are not alike on both sides of zero."""
    top = DTYPES[kind.dtype].levels - 1
    if kind.minimums is None:
        table = DTYPES[kind.dtype].values
        widest = max(-table[0], table[-1]) if table is not None else top / 2
        base = w.abs().amax(-1) / widest
        yield from ((base * ratio * sign, None) for ratio in _RANGES for sign in (1, -1))
        return
    low, high = w.amin(-1), w.amax(-1)
    low = low.clamp(max=0) if kind.scales is not None else low  # minimums of two levels are not negative
    high = torch.maximum(high, low)
    for ratio in _RANGES:
        yield (high - low) * ratio / top, -low - (high - low) * (1 - ratio) / 2 if kind.scales is None else -low * ratio
        yield (high - low) * ratio / top, -low


def _refit(
    w: Tensor, h: Tensor, level: Tensor, scale: Tensor, minimum: Tensor | None, kind: BlockType
) -> tuple[Tensor, Tensor | None]:
    """Return the least-squares scale and minimum for given levels."""
    ll, lw = (level.square() * h).sum(-1), (level * w * h).sum(-1)
    if minimum is None:
        return torch.where((ll > 0) & (lw * scale > 0), lw / ll, scale), None
    one, l1, w1 = h.sum(-1).expand_as(ll), (level * h).sum(-1), (w * h).sum(-1)
    determinant = ll * one - l1 * l1
    fitted, low = (lw * one - l1 * w1) / determinant, (l1 * lw - ll * w1) / determinant
    if kind.scales is not None:
        alone = torch.where(ll > 0, lw / ll, scale)
        fitted, low = torch.where(low < 0, alone, fitted), low.clamp(min=0)
    sound = (determinant > 1e-6 * ll * one) & (fitted > 0)
    return torch.where(sound, fitted, scale), torch.where(sound, low, minimum)


def _two_levels(
    w: Tensor, h: Tensor, kind: BlockType, scale: Tensor, minimum: Tensor | None, size: float
) -> tuple[Content, Tensor]:
    """Return the blocks with a step of this size between integer scales, and their errors (..., blocks)."""
    assert kind.scales is not None
    bottom, top = kind.scales
    largest = scale.gather(-1, scale.abs().argmax(-1, keepdim=True)).squeeze(-1)
    d = _half(largest / (bottom if bottom < 0 else top) * size)
    low = None if minimum is None or kind.minimums is None else _half(minimum.amax(-1) / kind.minimums * size)
    step = safe(d.float()).unsqueeze(-1)
    nearest = (scale / step).round_()
    best: list[Tensor] = []
    for change in (0, -1, 1):
        integer = (nearest + change).clamp_(bottom, top)
        own = d.float().unsqueeze(-1) * integer
        tried = [integer]
        wanted = minimum
        for _ in range(1 if minimum is None else 2):
            if wanted is not None and low is not None:
                unit = safe(low.float()).unsqueeze(-1)
                tried = [integer, (wanted / unit).round_().clamp_(0, kind.minimums)]
            used = tried[1] * low.float().unsqueeze(-1) if low is not None else None
            loss, level = _loss(w, h, own, used, kind)
            new = [loss, *tried]
            best = [torch.where(loss < best[0], a, b) for a, b in zip(new, best, strict=True)] if best else new
            if used is not None:
                wanted = ((level * own.unsqueeze(-1) - w) * h).sum(-1) / h.sum(-1)
    minimums = best[2].short() if len(best) > 2 else None
    return Content(d, d, best[1].short(), low, minimums), best[0].sum(-1)


def as_grid(weight: Tensor, content: Content, kind: BlockType) -> tuple[Tensor, tuple[Tensor, Tensor | None]]:
    """Return the problem of choosing codes as one on an ordinary grid.

    A weight near ``s l - m`` is one moved by m near ``s l``, so minimums become a zero point of zero and another target.

    Returns:
        The target float32 (out, in); scale (out, groups) and zero point as :func:`quantkit.numerics.sweep.sweep` wants them.
    """
    scale, minimum = (None if one is None else one.flatten(1) for one in steps(content))
    assert scale is not None
    if minimum is None:
        return weight, (safe(scale), None)
    return weight + minimum.repeat_interleave(kind.group, -1), (safe(scale), torch.zeros_like(scale, dtype=torch.uint8))


def fit(weight: Tensor, content: Content, kind: BlockType, hessian: Tensor) -> tuple[Content, Tensor]:
    """Move scales and minimums of all blocks to where they lose least for the given codes, one after the other.

    Args:
        weight: float32 (out, in).
        content: blocks (out, blocks); not modified.
        kind: their type.
        hessian: float32 (in, in), damped.

    Returns:
        Blocks with the same codes and an error that is not larger, and the residual ``(W - Q) H`` that they leave, (out, in).
    """
    level = levels(content.codes, kind).flatten(-2)
    scale, minimum = steps(content)
    value = level.unflatten(-1, (*scale.shape[1:], kind.group)) * scale.unsqueeze(-1)
    value = value if minimum is None else value - minimum.unsqueeze(-1)
    residual = (weight - value.flatten(1)) @ hessian
    moved = Content(*(None if part is None else part.clone() for part in content))  # type: ignore[arg-type]

    def move(own: Tensor, part: slice, rounded: Callable[[Tensor], Tensor], current: Tensor) -> Tensor:
        """Return ``current`` (out,) moved along ``own`` (out, n), as far as rounding lets the error fall."""
        nonlocal residual
        change, slope, curvature = best_step(residual[:, part], own, hessian[part, part])
        change = rounded(current + change) - current
        change = change * (2 * slope * change > curvature * change.square())
        residual = residual - (change.unsqueeze(-1) * own) @ hessian[part]
        return current + change

    for block in range(content.d.shape[1]):
        _fit_block(moved, block, level, kind, move)
    return moved, residual


def _fit_block(content: Content, block: int, level: Tensor, kind: BlockType, move: Callable[..., Tensor]) -> None:
    """Move integers of one block (of every row), then its float16 numbers, in place."""
    whole = slice(block * kind.size, (block + 1) * kind.size)
    d, low = content.d[:, block].float(), None if content.low is None else content.low[:, block].float()
    groups = [slice(start, start + kind.group) for start in range(whole.start, whole.stop, kind.group)]
    for index, part in enumerate(groups):
        if content.scales is not None and kind.scales is not None:
            content.scales[:, block, index] = _moved_integer(
                content.scales[:, block, index], d, level[:, part], part, kind.scales, move
            )
        if content.minimums is not None and low is not None and kind.minimums is not None:
            ones = torch.full_like(level[:, part], -1.0)
            limits = (0, kind.minimums)
            content.minimums[:, block, index] = _moved_integer(content.minimums[:, block, index], low, ones, part, limits, move)
    scales, minimums = (None if one is None else one[:, block].float() for one in (content.scales, content.minimums))
    own = level[:, whole] if scales is None else level[:, whole] * scales.repeat_interleave(kind.group, -1)
    content.d[:, block] = move(own, whole, _as_half, d).half()
    if low is not None and content.low is not None:
        ones = torch.ones_like(own)
        ones = -(ones if minimums is None else ones * minimums.repeat_interleave(kind.group, -1))
        content.low[:, block] = move(ones, whole, _as_half, low).half()


def _as_half(value: Tensor) -> Tensor:
    return value.clamp(-_LARGEST, _LARGEST).half().float()


def _moved_integer(
    integer: Tensor, unit: Tensor, own: Tensor, part: slice, limits: tuple[int, int], move: Callable[..., Tensor]
) -> Tensor:
    """Return integers (out,), multiples of ``unit`` that the columns ``own`` are multiplied by, moved where that helps."""
    step = safe(unit)

    def rounded(value: Tensor) -> Tensor:
        return (value / step).round_().clamp_(*limits) * unit

    moved = move(own, part, rounded, integer.float() * unit)
    return torch.where(unit == 0, integer, (moved / step).round().to(integer.dtype))
