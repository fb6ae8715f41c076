r"""The column sweep of GPTQ: round one column, spread its error over the columns still to come, go on.

(Frantar, Ashkboos, Hoefler, Alistarh 2022, arXiv 2210.17323, algorithm 1, with the updates of later columns put off and
applied a block of columns at a time, section 3.3.)
"""

import torch
from torch import Tensor

from quantkit.dtypes import table
from quantkit.numerics import grid
from quantkit.spec import QuantSpec

BLOCK_COLUMNS = 64
"""Columns whose updates of the later ones are applied together; the result does not depend on it but for rounding."""


def sweep(weight: Tensor, qparams: tuple[Tensor, Tensor | None], spec: QuantSpec, order: Tensor, factor: Tensor) -> Tensor:
    """Round the columns of ``weight`` in ``order`` on a fixed grid.

    Args:
        weight: floating (out, in).
        qparams: scale and zero point of its blocks.
        spec: the grid.
        order: int64 (in,), the order in which columns are rounded.
        factor: float32 (in, in), upper triangular: U of the inverse Hessian, rows and columns in that order.

    Returns:
        uint8 codes (out, in).
    """
    # Everything is kept transposed, (in, out), so that a column is contiguous.
    shape = tuple(weight.shape)
    top = 2**spec.bits - 1
    columns = weight.float().T[order].contiguous()
    scale, zero = qparams
    scales = per_column(scale.float(), spec, shape).T[order]
    zeros = None if zero is None else per_column(zero.float(), spec, shape).T[order]
    values = None if spec.is_integer else table(spec.dtype)[0].to(weight.device)
    codes = torch.empty_like(columns)
    diagonal = factor.diagonal().tolist()
    for start in range(0, shape[1], BLOCK_COLUMNS):
        stop = min(start + BLOCK_COLUMNS, shape[1])
        block, errors = columns[start:stop], torch.empty_like(columns[start:stop])
        for i in range(stop - start):
            k = start + i
            middle = grid.zero_code(spec) if zeros is None else zeros[k]
            if values is None:
                code = torch.div(block[i], scales[k], out=codes[k]).round_().add_(middle).clamp_(0, top)
                level = code - middle
            else:
                nearest = grid.nearest_in_table(block[i] / scales[k], spec.dtype)
                codes[k], level = nearest, values[nearest.int()]
            torch.sub(block[i], level.mul_(scales[k]), out=errors[i])
            errors[i].mul_(1 / diagonal[k])
            if k + 1 < stop:
                block[i + 1 :].addr_(factor[k, k + 1 : stop], errors[i], alpha=-1)
        columns[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)
    result = torch.empty(shape[1], shape[0], dtype=torch.uint8, device=weight.device)
    result[order] = codes.to(torch.uint8)
    return result.T.contiguous()


def per_column(values: Tensor, spec: QuantSpec, shape: tuple[int, ...]) -> Tensor:
    """Expand one value per block to one per weight, (out, in)."""
    return grid.expand(values, spec, shape).expand(shape)
