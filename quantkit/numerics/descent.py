r"""Coordinate descent on a layer's squared output error: better codes for given scales, better scales for given codes.

With :math:`H = E[x x^T]` (damped), the error of the weight :math:`Q` in place of :math:`W` is
:math:`\mathrm{tr}\,(W - Q) H (W - Q)^T`. GPTQ visits every column once and can only make up for errors with columns still to
come. Afterwards all columns are known, and each may be chosen again with all others fixed:

.. math:: q_k \leftarrow \mathrm{round}\big(q_k + \tfrac{[(W - Q) H]_k}{s\, H_{kk}}\big)

never increases the error (Behdin et al. 2023, QuantEase, arXiv 2309.01885, without its outliers). In turn, for given codes the
error is quadratic in the scales of a row, :math:`Q = \sum_g s_g L_g` with the levels :math:`L_g` of group g, and smallest where

.. math:: \sum_h (L_g H L_h^T)\, s_h = L_g H W^T

Cost of each: out x in^2 multiply-adds, as much as GPTQ's sweep.
"""

import torch
from torch import Tensor

from quantkit.numerics import grid
from quantkit.numerics.sweep import per_column
from quantkit.spec import QuantSpec

_WIDEST_CHANGE = 2.0
"""A fitted scale further than this factor from the old one comes from a nearly singular system and is not taken."""


def row_errors(weight: Tensor, approximation: Tensor, hessian: Tensor) -> Tensor:
    """Return (w - q) H (w - q)^T of every row, (out,)."""
    error = weight - approximation
    return ((error @ hessian) * error).sum(-1)


def descend(
    weight: Tensor, codes: Tensor, qparams: tuple[Tensor, Tensor | None], spec: QuantSpec, order: Tensor, hessian: Tensor
) -> Tensor:
    """Choose every column's codes again, one column after the other, all others fixed.

    Args:
        weight: float32 (out, in).
        codes: uint8 (out, in); not modified.
        qparams: scale and zero point of its blocks.
        spec: the grid.
        order: int64 (in,), the order of the columns.
        hessian: float32 (in, in), symmetric, with a positive diagonal; rows and columns in the weight's order.

    Returns:
        uint8 codes (out, in) with an error that is not larger.
    """
    shape, top = tuple(weight.shape), 2**spec.bits - 1
    scale, zero = qparams
    scales = per_column(scale.float(), spec, shape).T
    zeros = torch.full_like(scales, grid.zero_code(spec)) if zero is None else per_column(zero.float(), spec, shape).T
    levels = codes.T.float() - zeros  # (in, out)
    residual = ((weight - levels.T * scales.T) @ hessian).T.contiguous()
    for k in order.tolist():
        wanted = levels[k] + residual[k] / (scales[k] * hessian[k, k])
        better = torch.clamp(wanted.round_(), -zeros[k], top - zeros[k])
        residual.addr_(hessian[k], (better - levels[k]) * scales[k], alpha=-1)
        levels[k] = better
    return (levels + zeros).T.to(torch.uint8).contiguous()


def fit_scales(
    weight: Tensor, codes: Tensor, qparams: tuple[Tensor, Tensor | None], spec: QuantSpec, hessian: Tensor
) -> Tensor:
    """Return the scales of all groups of each row that together lose least for the given codes.

    Arguments as for :func:`descend`; the blocks of ``spec`` must be one row high. A row whose error would not fall, because
    of the rounding to the stored dtype, keeps its scales.

    Returns:
        scales like ``qparams[0]``.
    """
    scale, zero = qparams
    groups = scale.shape[1]
    width = weight.shape[1] // groups
    middle = float(grid.zero_code(spec)) if zero is None else per_column(zero.float(), spec, tuple(weight.shape))
    levels = codes.float() - middle
    pairs = torch.empty(len(weight), groups, groups, device=weight.device)
    for g in range(groups):
        part = slice(g * width, (g + 1) * width)
        pairs[:, g] = ((levels[:, part] @ hessian[part]) * levels).unflatten(-1, (groups, width)).sum(-1)
    wanted = ((weight @ hessian) * levels).unflatten(-1, (groups, width)).sum(-1)
    pairs.diagonal(dim1=-2, dim2=-1).mul_(1 + 1e-4).clamp_(min=1e-30)
    fitted, failed = torch.linalg.solve_ex(pairs, wanted)
    ratio = fitted / scale.float()
    sound = (ratio > 1 / _WIDEST_CHANGE) & (ratio < _WIDEST_CHANGE) & (failed == 0).unsqueeze(-1)
    stored = grid.round_scale(torch.where(sound, fitted, scale.float()), spec.scale_dtype)
    old, new = (row_errors(weight, grid.dequantize(codes, s, zero, spec), hessian) for s in (scale, stored))
    return torch.where((new < old).unsqueeze(-1), stored, scale)
