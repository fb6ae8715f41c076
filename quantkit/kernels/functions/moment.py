"""Sums of outer products over tokens, ``left^T right``: in float32, or of bfloat16 numbers by a compiled kernel.

Rows in bfloat16 lose nothing: their products are exact in float32, and a processor that multiplies bfloat16 sums them at
twice the speed of float32, here with half the arithmetic where the result is symmetric.
"""

import torch
from torch import Tensor

from quantkit.kernels import build
from quantkit.kernels.build import compiled

_STRIPS = 4


def add_moment(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add ``left^T right`` to ``total``, in place.

    Args:
        total: float32 (features, features). If ``left`` is ``right``, only what lies on and above the diagonal counts.
        left: floating (tokens, features); products of bfloat16 rows are exact, others are multiplied in float32.
        right: the same shape and dtype.
    """
    if left.dtype == torch.bfloat16 and left.device.type == "cpu" and compiled("second moments"):
        left_rows = left.contiguous()
        right_rows = left_rows if right is left else right.contiguous()
        status = build.library().qk_moment(
            left_rows.data_ptr(),
            right_rows.data_ptr(),
            total.data_ptr(),
            *left.shape,
            build.DTYPE_CODES[left.dtype],
            torch.get_num_threads(),
        )
        if status == 0:
            return
    left_rows, right_rows = left.float(), right.float()
    if right is not left:
        total += left_rows.T @ right_rows
        return
    tile = max(64, -(-left.shape[1] // _STRIPS))
    for start in range(0, left.shape[1], tile):
        # One product per strip, columns of this tile against everything from it to the right: 5/8 of a full product.
        total[start : start + tile, start:] += left_rows[:, start : start + tile].T @ left_rows[:, start:]
