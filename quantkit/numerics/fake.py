"""Fake quantization: round to a grid and come straight back, to compute with the error without integer arithmetic."""

import torch
from torch import Tensor

from quantkit.numerics import grid
from quantkit.spec import QuantSpec


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
    return x + (rounded - x).detach() if torch.is_grad_enabled() and x.requires_grad else rounded
