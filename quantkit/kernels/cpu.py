"""The compiled CPU kernel: float activations times 2- to 8-bit weights, accumulated in float32.

Weights are never rounded to a smaller float: codes become ``code - zero_point`` exactly, products and sums are float32, and
only the result is rounded to x's dtype. Prepacking reorders the canonical words into blocks of 16 rows, one row per SIMD
lane (the layout is drawn in ``csrc/wq_matmul.cpp``). 3-bit codes are stored in 4 bits and 5- to 7-bit codes in 8, since
only widths that divide a word unpack without crossing it.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from quantkit.errors import KernelError
from quantkit.kernels import build, ops
from quantkit.kernels.select import KERNELS, Problem
from quantkit.numerics import grid
from quantkit.numerics.pack import pack
from quantkit.qtensor import QTensor

LANES = 16
"""Rows per block."""


class Prepacked(NamedTuple):
    """The kernel's layout, and the arguments of ``torch.ops.quantkit.wq_matmul`` between x and bias.

    Attributes:
        words: int32 (blocks, groups, words per group, 16).
        scale: float16 or float32 (blocks, groups, 16).
        zero: uint8 of the scale's shape, or None where ``zero_code`` serves all.
        rows: N; the last block may be partly padding.
        group: input channels per scale.
        bits: stored bits per code: 2, 4 or 8.
        zero_code: zero point of a symmetric grid.
    """

    words: Tensor
    scale: Tensor
    zero: Tensor | None
    rows: int
    group: int
    bits: int
    zero_code: int


class CpuKernel:
    """``torch.ops.quantkit.wq_matmul`` on a library compiled on first use."""

    priority = 10

    def rejects(self, problem: Problem) -> str | None:
        """Reject other devices and activation dtypes, empty weights, and machines where the library cannot be built."""
        if problem.device != "cpu":
            return f"runs on the cpu, not on {problem.device}"
        if problem.dtype not in build.DTYPE_CODES:
            return f"activations are {problem.dtype}, want float32, float16 or bfloat16"
        if not problem.spec.is_integer:
            return f"codes are {problem.spec.dtype}, want integers"
        if 0 in problem.shape:
            return f"the weight {problem.shape} is empty"
        try:
            build.library()
        except KernelError as error:
            build.warn_once(f"quantized layers run on the slow reference kernel: {error}")
            return str(error)
        return None

    def prepack(self, qtensor: QTensor) -> Prepacked:
        """Copy a 2-D weight into blocks of 16 rows."""
        spec, (rows, columns) = qtensor.spec, qtensor.shape
        block_rows, group = grid.block_size(spec, qtensor.shape)
        groups, bits = columns // group, ops.storage_bits(spec.bits)
        if bits == spec.bits and group % (32 // bits) == 0:
            words = qtensor.packed.view(rows, groups, -1)
        else:
            words = pack(qtensor.codes().view(rows, groups, group), bits)
        scale = qtensor.scale.float() if qtensor.scale.dtype == torch.bfloat16 else qtensor.scale
        zero = qtensor.zero_point
        return Prepacked(
            _lanes(words),
            _lanes(_per_row(scale, block_rows).unsqueeze(-1)).squeeze(-2),
            None if zero is None else _lanes(_per_row(zero, block_rows).unsqueeze(-1)).squeeze(-2),
            rows,
            group,
            bits,
            grid.zero_code(spec),
        )

    def matmul(self, x: Tensor, state: Prepacked, bias: Tensor | None) -> Tensor:
        """Return ``x @ w.T + bias`` in x's dtype, summed in float32."""
        if type(x) is Tensor and not torch.compiler.is_compiling():
            return ops.compute(x, *state, bias)  # the same function, without 3 us of dispatch
        return ops.wq_matmul()(x, *state, bias)

    def restore(self, state: Prepacked) -> Tensor:
        """Return the weight as float32 (N, K)."""
        return ops.dequantize(*state)

    def details(self) -> dict[str, str]:
        """Return compiler, instruction set, threads and where the library lies."""
        return build.details()


def _per_row(values: Tensor, block_rows: int) -> Tensor:
    return values if block_rows == 1 else values.repeat_interleave(block_rows, 0)


def _lanes(values: Tensor) -> Tensor:
    """(rows, groups, n) to (blocks, groups, n, 16), rows padded with zeros to whole blocks."""
    padded = F.pad(values, (0, 0, 0, 0, 0, -values.shape[0] % LANES))
    return padded.view(-1, LANES, *values.shape[1:]).permute(0, 2, 3, 1).contiguous()


KERNELS.register("cpu")(CpuKernel())
