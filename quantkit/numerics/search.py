r"""Search for the scale and zero point of every block that lose least, weighted by the importance of each input channel.

For a block of weights :math:`w_k` and importances :math:`h_k = E[x_k^2]` (the diagonal of the layer's Hessian), minimise

.. math:: \sum_k h_k \, (w_k - (q_k - z) s)^2

over a range shrunk by a factor :math:`r`; with ``refit``, the least-squares scale for the codes of each candidate is tried as
well, :math:`s = \sum h w (q - z) / \sum h (q - z)^2`. Scales are rounded to their stored dtype before the loss is taken. With
:math:`h = 1` this is the clip search by mean squared error. The weighting idea is llama.cpp's importance matrix.

A symmetric grid has one level more below zero than above, so scales of either sign are tried: a negative one puts that level
where the largest weights are.
Cost: about ten passes over the weight per candidate, in slices that stay in the cache.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from quantkit.numerics.grid import block_size, choose_qparams, round_scale, to_blocks, zero_code
from quantkit.spec import QuantSpec

RATIOS: tuple[float, ...] = tuple(1.06 - 0.04 * i for i in range(16))
"""Default factors by which the range of a block is scaled."""

_SLICE = 1 << 17  # elements per slice: the slice and its temporaries fit a second-level cache


def search_qparams(
    weight: Tensor, spec: QuantSpec, importance: Tensor | None = None, *, ratios: Sequence[float] = RATIOS, refit: bool = True
) -> tuple[Tensor, Tensor | None]:
    """Choose scale and zero point of every block of ``weight``.

    Args:
        weight: floating (out, in).
        spec: grid.
        importance: non-negative (in,), e.g. E[x^2]; None weighs all inputs alike.
        ratios: factors of the range to try.
        refit: also try the least-squares scale of every candidate.

    Returns:
        scale (out_blocks, in_blocks) in ``spec.scale_dtype``; uint8 zero point of that shape, or None if symmetric.
    """
    rows, cols = block_size(spec, tuple(weight.shape))
    scale, zero = choose_qparams(weight, spec)
    per_block = group_weights(importance, weight.shape[-1], cols, weight.device).repeat(1, rows)  # matching to_blocks
    step = max(1, _SLICE // (rows * weight.shape[-1]))
    for start in range(0, scale.shape[0], step):
        part = slice(start, start + step)
        blocks = to_blocks(weight[start * rows : (start + step) * rows].float(), spec)
        found, found_zero = _search(blocks, per_block, spec, ratios, refit)
        scale[part] = found
        if zero is not None:
            zero[part] = found_zero
    return scale, zero


def group_weights(importance: Tensor | None, columns: int, group: int, device: torch.device) -> Tensor:
    """Return float32 weights (columns / group, group) of the squared errors; all ones without ``importance``.

    A group none of whose inputs was ever active still deserves a sensible grid: its weights are equal.
    """
    if importance is None:
        return torch.ones(columns // group, group, device=device)
    weights = importance.to(device, torch.float32).clamp(min=0).reshape(-1, group)
    return torch.where(weights.sum(-1, keepdim=True) > 0, weights, torch.ones_like(weights))


def _search(blocks: Tensor, weights: Tensor, spec: QuantSpec, ratios: Sequence[float], refit: bool) -> tuple[Tensor, Tensor]:
    """Search blocks (n, in_blocks, size); returns float scales (already rounded) and uint8 zeros, (n, in_blocks)."""
    top = 2**spec.bits - 1
    if spec.symmetric:
        base, low = blocks.abs().amax(-1) * (2 / top), None
    else:
        low = blocks.amin(-1).clamp(max=0)
        base = (blocks.amax(-1).clamp(min=0) - low) / top
    best_loss = torch.full_like(base, torch.inf)
    best_scale, best_zero = torch.empty_like(base), torch.empty_like(base)
    weighted = blocks * weights
    for ratio in (*ratios, *(-ratio for ratio in ratios)) if spec.symmetric else ratios:
        scale = round_scale(base * ratio, spec.scale_dtype).float()
        zero = torch.full_like(scale, zero_code(spec)) if low is None else (-low * ratio / scale).round_().clamp_(0, top)
        for attempt in range(2 if refit else 1):
            levels = _levels(blocks, scale, zero, top)
            # sum h (w - s l)^2 = sum h w^2 - 2 s sum h w l + s^2 sum h l^2; the first term is the same for all candidates
            cross = torch.einsum("ngk,ngk->ng", weighted, levels)
            norm = torch.einsum("ngk,gk->ng", levels.square_(), weights)
            loss = scale * (scale * norm - 2 * cross)
            better = loss < best_loss
            best_loss = torch.where(better, loss, best_loss)
            best_scale, best_zero = torch.where(better, scale, best_scale), torch.where(better, zero, best_zero)
            if refit and attempt == 0:
                fitted = torch.where((norm > 0) & (cross * scale > 0), cross / norm, scale)
                scale = round_scale(fitted, spec.scale_dtype).float()
    return best_scale, best_zero.to(torch.uint8)


def _levels(blocks: Tensor, scale: Tensor, zero: Tensor, top: int) -> Tensor:
    """Return ``q - z`` of every weight: integers as floats, (n, in_blocks, size)."""
    levels = (blocks * scale.reciprocal().unsqueeze(-1)).round_()
    return torch.clamp(levels, -zero.unsqueeze(-1), (top - zero).unsqueeze(-1))
