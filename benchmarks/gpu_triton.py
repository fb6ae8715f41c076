"""A plain Triton product of a few tokens and a 4-bit weight: what an afternoon's kernel does, for comparison.

Written to be read: no split of K, no second layout, configurations tried once per size. Needs ``triton`` and a CUDA device.
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantkit.errors import KernelError
from quantkit.qtensor import GridTensor

_CONFIGS = [
    triton.Config({"BLOCK_N": block_n, "BLOCK_K": block_k}, num_warps=warps, num_stages=stages)
    for block_n, block_k, warps, stages in ((32, 128, 4, 4), (64, 128, 4, 4), (128, 64, 4, 4), (128, 64, 8, 3), (64, 64, 8, 4))
]


@triton.autotune(configs=_CONFIGS, key=["n", "k", "BLOCK_M"])
@triton.jit
def _product(
    x, codes, scale, y, m, n, k, GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):
    """Multiply x (m, k) by codes int32 (k / 8, n), scale float16 (k / GROUP, n) into y (m, n) of x's dtype."""
    rows = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inner = tl.arange(0, BLOCK_K)
    there = rows[:, None] < m
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, k, BLOCK_K):
        at = start + inner
        part = tl.load(x + rows[:, None] * k + at[None, :], mask=there, other=0.0)
        words = tl.load(codes + (at // 8)[:, None] * n + columns[None, :])
        weight = ((words >> ((at % 8) * 4)[:, None]) & 15) - 8
        scales = tl.load(scale + (start // GROUP) * n + columns).to(tl.float32)
        total += tl.dot(part, weight.to(part.dtype)) * scales[None, :]
    tl.store(y + rows[:, None] * n + columns[None, :], total.to(y.dtype.element_ty), mask=there)


def product(weight: GridTensor) -> Callable[[Tensor], Tensor]:
    """Lay a symmetric 4-bit weight (N, K) out and return ``x @ w.T`` for x bfloat16 (tokens, K).

    Raises:
        KernelError: sizes that the blocks do not divide.
    """
    (n, k), group = weight.shape, weight.spec.group_size
    if n % 128 or k % 128 or group % 128:
        raise KernelError(f"a weight of {n} x {k} in groups of {group}: want multiples of 128")
    nibbles = weight.codes().T.reshape(k // 8, 8, n).int()
    packed = torch.zeros((k // 8, n), dtype=torch.int32, device=nibbles.device)
    for i in range(8):
        packed |= nibbles[:, i] << 4 * i
    scale = weight.scale.T.contiguous()

    def run(x: Tensor) -> Tensor:
        m = len(x)
        block_m = max(16, min(64, triton.next_power_of_2(m)))
        y = torch.empty((m, n), dtype=x.dtype, device=x.device)
        _product[lambda chosen: (n // chosen["BLOCK_N"], triton.cdiv(m, block_m))](
            x, packed, scale, y, m, n, k, GROUP=group, BLOCK_M=block_m
        )
        return y

    return run
