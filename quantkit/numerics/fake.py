"""Fake quantization: round to a grid and come straight back, to compute with the error without integer arithmetic."""

import torch
from torch import Tensor

from quantkit.numerics import grid
from quantkit.spec import QuantSpec


def fake_quantize(x: Tensor, spec: QuantSpec) -> Tensor:
    """Round activations to a grid found from themselves.

    Args:
        x: floating (..., in); every row is a token.
        spec: a dynamic grid, ``(1, -1)`` one scale per token or ``(-1, -1)`` one for all.

    Returns:
        The nearest values that the grid has, in x's shape and dtype. Its gradient is that of the identity.
    """
    rows = x.detach().reshape(-1, x.shape[-1]).float()
    if not rows.numel():
        return x
    qparams = grid.choose_qparams(rows, spec)
    rounded = grid.dequantize(grid.quantize(rows, *qparams, spec), *qparams, spec).to(x.dtype).view(x.shape)
    return x + (rounded - x).detach() if torch.is_grad_enabled() and x.requires_grad else rounded
