r"""Coordinate descent on a layer's squared output error: better codes for given scales, better scales for given codes.

With :math:`H = E[x x^T]` (damped), the error of the weight :math:`Q` in place of :math:`W` is
:math:`\mathrm{tr}\,(W - Q) H (W - Q)^T`. GPTQ visits every column once and can only make up for errors with columns still to
come. Afterwards all columns are known, and each may be chosen again with all others fixed:

.. math:: q_k \leftarrow \mathrm{round}\big(q_k + \tfrac{[(W - Q) H]_k}{s\, H_{kk}}\big)

never increases the error (Behdin et al. 2023, QuantEase, arXiv 2309.01885, without its outliers). In turn, for given codes the
error is quadratic in the scale of every group g with levels :math:`L_g = q_g - z_g`, and smallest along it where

.. math:: s_g \leftarrow s_g + \frac{[(W - Q) H]_g \cdot L_g}{L_g H_{gg} L_g^T}

one group after the other. Cost of a pass of either: out x in^2 multiply-adds, as much as GPTQ's sweep.
"""

import torch
from torch import Tensor

from quantkit.dtypes import table
from quantkit.numerics import grid
from quantkit.numerics.sweep import per_column
from quantkit.spec import QuantSpec


def row_errors(weight: Tensor, approximation: Tensor, hessian: Tensor) -> Tensor:
    """Return (w - q) H (w - q)^T of every row, (out,)."""
    error = weight - approximation
    return ((error @ hessian) * error).sum(-1)


def descend(
    residual: Tensor, codes: Tensor, qparams: tuple[Tensor, Tensor | None], spec: QuantSpec, order: Tensor, hessian: Tensor
) -> Tensor:
    """Choose every column's codes again, one column after the other, all others fixed.

    Args:
        residual: float32 (out, in), ``(W - Q) H`` of the weight W and what the codes stand for, Q; not modified.
        codes: uint8 (out, in); not modified.
        qparams: scale and zero point of its blocks.
        spec: the grid.
        order: int64 (in,), the order of the columns.
        hessian: float32 (in, in), symmetric, with a positive diagonal; rows and columns in the weight's order.

    Returns:
        uint8 codes (out, in) with an error that is not larger.
    """
    shape, top = tuple(codes.shape), 2**spec.bits - 1
    scale, zero = qparams
    scales = per_column(scale.float(), spec, shape).T
    zeros = torch.full_like(scales, grid.zero_code(spec)) if zero is None else per_column(zero.float(), spec, shape).T
    if not spec.is_integer:
        return _descend_in_table(residual, codes, scales, spec, order, hessian)
    levels = codes.T.float() - zeros  # (in, out)
    residual = residual.T.clone(memory_format=torch.contiguous_format)  # (in, out)
    for k in order.tolist():
        wanted = levels[k] + residual[k] / (scales[k] * hessian[k, k])
        better = torch.clamp(wanted.round_(), -zeros[k], top - zeros[k])
        residual.addr_(hessian[k], (better - levels[k]) * scales[k], alpha=-1)
        levels[k] = better
    return (levels + zeros).T.to(torch.uint8).contiguous()


def _descend_in_table(
    residual: Tensor, codes: Tensor, scales: Tensor, spec: QuantSpec, order: Tensor, hessian: Tensor
) -> Tensor:
    """Do the same on a table's values; ``scales`` are (in, out)."""
    values = table(spec.dtype)[0].to(codes.device)
    chosen = codes.T.contiguous()
    residual = residual.T.clone(memory_format=torch.contiguous_format)  # (in, out)
    for k in order.tolist():
        level = values[chosen[k].int()]
        chosen[k] = grid.nearest_in_table(level + residual[k] / (scales[k] * hessian[k, k]), spec.dtype)
        residual.addr_(hessian[k], (values[chosen[k].int()] - level) * scales[k], alpha=-1)
    return chosen.T.contiguous()


def best_step(residual: Tensor, own: Tensor, hessian: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return how far to go along ``own`` so that the error falls most, with what says by how much any other way would do.

    Args:
        residual: ``(W - Q) H`` of some columns, (out, n).
        own: what is added to these columns of Q, (out, n).
        hessian: of these columns, (n, n).

    Returns:
        step, slope and curvature, (out,): by a step t the error falls by 2 slope t - curvature t^2.
    """
    slope = (residual * own).sum(-1)
    curvature = ((own @ hessian) * own).sum(-1)
    return slope / curvature.clamp(min=1e-30), slope, curvature


def fit_scales(
    weight: Tensor, codes: Tensor, qparams: tuple[Tensor, Tensor | None], spec: QuantSpec, hessian: Tensor
) -> tuple[Tensor, Tensor]:
    """Move the scale of every group to where it loses least for the given codes, one group after the other.

    Arguments as for :func:`descend`, with the float32 ``weight`` (out, in); the blocks of ``spec`` must be one row high. A
    scale that would not get better by its move, because it is rounded to the stored dtype, keeps its value. Repeated calls
    come closer to the scales that together lose least.

    Returns:
        scales like ``qparams[0]``, and the residual ``(W - Q) H`` float32 (out, in) that they leave.
    """
    scale, zero = qparams
    width = weight.shape[1] // scale.shape[1]
    middle = float(grid.zero_code(spec)) if zero is None else per_column(zero.float(), spec, tuple(weight.shape))
    levels = codes.float() - middle
    current = scale.float().clone()
    residual = (weight - levels * per_column(current, spec, tuple(weight.shape))) @ hessian
    for g in range(scale.shape[1]):
        part = slice(g * width, (g + 1) * width)
        own = levels[:, part]
        step, slope, curvature = best_step(residual[:, part], own, hessian[part, part])
        fitted = current[:, g] + step
        sound = (curvature > 0) & (fitted * current[:, g] > 0)  # a sign that turns round is no small correction
        change = grid.round_scale(torch.where(sound, fitted, current[:, g]), spec.scale_dtype).float() - current[:, g]
        change *= 2 * slope * change > curvature * change.square()  # by how much the error falls
        residual -= (change.unsqueeze(-1) * own) @ hessian[part]
        current[:, g] += change
    return current.to(scale.dtype), residual
