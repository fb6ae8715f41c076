"""Element-wise operations for learning scales and codes, compiled for the CPU and in plain torch elsewhere.

Both versions agree up to the rounding of float32 sums. :func:`divergence_gradient` is defined in
:mod:`quantkit.numerics.divergence`, the others in :mod:`quantkit.nn.learned`. Plain torch passes through memory once per
operation, which for small batches takes as long as the matrix products.
"""

import torch
from torch import Tensor

from quantkit.kernels import build
from quantkit.kernels.build import compiled
from quantkit.numerics import divergence


def divergence_gradient(logits: Tensor, teacher: Tensor) -> tuple[float, Tensor]:
    """Return the summed KL divergence and its gradient; see :func:`quantkit.numerics.divergence.divergence_gradient`.

    Args:
        logits: floating (rows, V).
        teacher: logits of the teacher, of the same shape and dtype.

    Returns:
        KL(teacher || logits) summed over rows in nats, and its gradient with respect to ``logits``, (rows, V).
    """
    if logits.device.type != "cpu" or logits.dtype not in build.DTYPE_CODES or not compiled("learning"):
        return divergence.divergence_gradient(logits, teacher)
    logits, teacher = logits.contiguous(), teacher.contiguous()
    gradient, total = torch.empty_like(logits), torch.empty(len(logits), dtype=torch.float64)
    build.library().qk_divergence(
        logits.data_ptr(),
        teacher.data_ptr(),
        gradient.data_ptr(),
        total.data_ptr(),
        *logits.shape,
        build.DTYPE_CODES[logits.dtype],
        torch.get_num_threads(),
    )
    return float(total.sum()), gradient


def expand_groups(levels: Tensor, scale: Tensor, weight: Tensor) -> None:
    """Write ``levels * scale`` to ``weight``, in place.

    Args:
        levels: int8 or int16 (..., row blocks, rows, column blocks, columns), contiguous.
        scale: float32 (..., row blocks, column blocks), contiguous.
        weight: floating, of the shape of ``levels``, contiguous; overwritten.
    """
    if _needs_plain(levels, weight):
        torch.mul(levels, scale[..., :, None, :, None], out=weight)
        return
    build.library().qk_expand_groups(*_arguments(levels, scale, weight))


def reduce_groups(levels: Tensor, weight: Tensor) -> Tensor:
    """Return the sum of ``levels * weight`` over every block.

    Args:
        levels: as in :func:`expand_groups`.
        weight: as in :func:`expand_groups`.

    Returns:
        float32 (..., row blocks, column blocks).
    """
    if _needs_plain(levels, weight):
        return torch.einsum("...arbc,...arbc->...ab", weight.float(), levels.float())
    scale = torch.empty((*levels.shape[:-3], levels.shape[-2]))
    build.library().qk_reduce_groups(*_arguments(levels, scale, weight))
    return scale


def drift_levels(drift: Tensor, slope: Tensor, rate: float) -> None:
    """Subtract ``rate * sign(slope)`` from ``drift``, in place.

    Args:
        drift: float16, of the shape of ``slope``, contiguous.
        slope: floating, the gradient.
        rate: step size.
    """
    if slope.device.type != "cpu" or slope.dtype not in build.DTYPE_CODES or not compiled("learning"):
        drift.sub_(slope.sign().to(drift.dtype), alpha=rate)
        return
    build.library().qk_drift(
        drift.data_ptr(),
        slope.data_ptr(),
        rate,
        slope.numel(),
        1,
        build.DTYPE_CODES[slope.dtype],
        torch.get_num_threads(),
    )


def settle_levels(levels: Tensor, drift: Tensor, low: Tensor, span: int) -> None:
    """Move each level to the one nearest to ``level + drift``; the drift keeps the remainder. In place.

    Args:
        levels: int8 or int16 (..., row blocks, rows, column blocks, columns), contiguous.
        drift: float16 of that shape, contiguous; offset of the learned value from the level.
        low: lowest level of every block, (..., row blocks, column blocks) in the dtype of ``levels``, contiguous.
        span: highest level minus lowest level.
    """
    if _needs_plain(levels, drift):
        lowest = low[..., :, None, :, None].float()
        target = levels.float() + drift.float()
        moved = (levels.float() + drift.float().round()).clamp(min=lowest, max=lowest + span)
        drift.copy_((target - moved).clamp_(-0.5, 0.5))
        levels.copy_(moved)
        return
    size = levels.shape[-1]
    groups = levels.numel() // size
    build.library().qk_settle(levels.data_ptr(), drift.data_ptr(), low.data_ptr(), span, groups, size, torch.get_num_threads())


def _needs_plain(levels: Tensor, weight: Tensor) -> bool:
    """Return whether the compiled version cannot be used: it supports int8 levels and blocks of one row only."""
    fits = levels.dtype == torch.int8 and levels.shape[-3] == 1 and weight.dtype in build.DTYPE_CODES
    return weight.device.type != "cpu" or not fits or not compiled("learning")


def _arguments(levels: Tensor, scale: Tensor, weight: Tensor) -> tuple[int, ...]:
    size = levels.shape[-1]
    return (
        levels.data_ptr(),
        scale.data_ptr(),
        weight.data_ptr(),
        levels.numel() // size,
        size,
        build.DTYPE_CODES[weight.dtype],
        torch.get_num_threads(),
    )
