"""Sums of outer products over tokens, ``left^T right``, in float32, with a compiled kernel for bfloat16 inputs.

Products of bfloat16 numbers are exact in float32. A processor with bfloat16 instructions computes them at twice the speed of
float32, and the kernel halves the arithmetic if the result is symmetric.
"""

import torch
from torch import Tensor

from quantkit.kernels import build
from quantkit.kernels.build import compiled

_STRIPS = 4


def add_moment(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add ``left^T right`` to ``total``, in place.

    Args:
        total: float32 (features, features). If ``left`` is ``right``, only the upper triangle is valid.
        left: floating (tokens, features); products of bfloat16 rows are exact, other dtypes are multiplied in float32.
        right: of the same shape and dtype; may be ``left`` itself.
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
        # One product per strip: its columns against themselves and all columns to the right; 5/8 of a full product.
        total[start : start + tile, start:] += left_rows[:, start : start + tile].T @ left_rows[:, start:]
