"""The passes through memory that learning scales needs, compiled for the CPU, in plain torch elsewhere.

They do what their plain forms say up to the rounding of float32 sums: :func:`divergence_gradient` that of
:mod:`quantkit.numerics.divergence`, the other two the formulas of :mod:`quantkit.nn.learned`. Plain torch goes through memory
once for every operation, which with small steps costs as much as the products.
"""

import torch
from torch import Tensor

from quantkit.kernels import build
from quantkit.kernels.build import compiled
from quantkit.numerics import divergence


def divergence_gradient(logits: Tensor, wanted: Tensor) -> tuple[float, Tensor]:
    """Return the summed KL and its gradient by ``logits``; see :func:`quantkit.numerics.divergence.divergence_gradient`."""
    if logits.device.type != "cpu" or logits.dtype not in build.DTYPE_CODES or not compiled("learning"):
        return divergence.divergence_gradient(logits, wanted)
    logits, wanted = logits.contiguous(), wanted.contiguous()
    gradient, total = torch.empty_like(logits), torch.empty(len(logits), dtype=torch.float64)
    build.library().qk_divergence(
        logits.data_ptr(),
        wanted.data_ptr(),
        gradient.data_ptr(),
        total.data_ptr(),
        *logits.shape,
        build.DTYPE_CODES[logits.dtype],
        torch.get_num_threads(),
    )
    return float(total.sum()), gradient


def expand_groups(levels: Tensor, scale: Tensor, weight: Tensor) -> None:
    """Write ``levels * scale`` to ``weight``.

    Args:
        levels: int8 or int16 (..., row blocks, rows, column blocks, columns), contiguous.
        scale: float32 (..., row blocks, column blocks), contiguous.
        weight: floating, shape of ``levels``, contiguous; overwritten.
    """
    if _plain(levels, weight):
        torch.mul(levels, scale[..., :, None, :, None], out=weight)
        return
    build.library().qk_expand_groups(*_arguments(levels, scale, weight))


def reduce_groups(levels: Tensor, weight: Tensor) -> Tensor:
    """Return the sum of ``levels * weight`` over every block, float32 (..., row blocks, column blocks); shapes as above."""
    if _plain(levels, weight):
        return torch.einsum("...arbc,...arbc->...ab", weight.float(), levels.float())
    scale = torch.empty((*levels.shape[:-3], levels.shape[-2]))
    build.library().qk_reduce_groups(*_arguments(levels, scale, weight))
    return scale


def drift_levels(drift: Tensor, slope: Tensor, rate: float) -> None:
    """Move ``drift`` (float16, shape of ``slope``, contiguous) by ``rate`` against the sign of ``slope``, in place."""
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
    """Let levels follow their drift once it is nearer to another level; the drift keeps the rest. In place.

    Args:
        levels: int8 or int16 (..., row blocks, rows, column blocks, columns), contiguous.
        drift: float16 of that shape, contiguous; how far each level wants to be from where it is.
        low: lowest level of every block, in the dtype of ``levels``: (..., row blocks, column blocks), contiguous.
        span: highest level minus lowest.
    """
    if _plain(levels, drift):
        lowest = low[..., :, None, :, None].float()
        wanted = levels.float() + drift.float()
        moved = (levels.float() + drift.float().round()).clamp(min=lowest, max=lowest + span)
        drift.copy_((wanted - moved).clamp_(-0.5, 0.5))
        levels.copy_(moved)
        return
    size = levels.shape[-1]
    groups = levels.numel() // size
    build.library().qk_settle(levels.data_ptr(), drift.data_ptr(), low.data_ptr(), span, groups, size, torch.get_num_threads())


def _plain(levels: Tensor, weight: Tensor) -> bool:
    """Say whether this is nothing for the compiled form: its groups are runs of one row, its levels bytes."""
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
