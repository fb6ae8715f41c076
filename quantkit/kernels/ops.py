"""``torch.ops.quantkit.wq_matmul``: the prepacked matmul as a torch operator.

Three faces, as torch wants them: a schema, a fake (shapes only, for tracing), and implementations: the compiled library on
the CPU, plain torch anywhere else. Nothing is registered before :func:`wq_matmul` is first called, and nothing is
compiled before the operator first runs on the CPU.

The compiled matmul serves any number of rows. One case is better left to torch: many bfloat16 rows on a CPU with matrix
tiles (AMX). There the weight is split, a cache-sized slice at a time, into two bfloat16 parts stacked along K, and
``[x x] @ [high; low]`` is computed: products of bfloat16 are exact in the tiles' float32 sums and the parts keep 16 bits of
each weight, so only the result's rounding shows.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from quantkit.errors import KernelError
from quantkit.kernels import build
from quantkit.numerics.pack import unpack

SCHEMA = (
    "wq_matmul(Tensor x, Tensor words, Tensor scale, Tensor? zero, "
    "int rows, int group, int bits, int zero_code, Tensor? bias) -> Tensor"
)

TILE_ROWS = 96
"""Rows of a bfloat16 x from which two products on matrix tiles are faster than the compiled float32 one."""

SLICE_BYTES = 1 << 19
"""Split weights held at a time: a quarter of a common level-2 cache."""

_library: list[torch.library.Library] = []  # keeps the registration alive


def storage_bits(bits: int) -> int:
    """Return the stored width of a code: the next of 2, 4 and 8."""
    return next(width for width in (2, 4, 8) if width >= bits)


@functools.cache
def wq_matmul() -> Callable[..., Tensor]:
    """Register the operator once and return it.

    Its arguments are x (..., K), the fields of :class:`quantkit.kernels.cpu.Prepacked`, and a bias (N,) of x's dtype or
    None; it returns (..., N) in x's dtype. It has no derivative: differentiate the reference kernel instead.
    """
    library = torch.library.Library("quantkit", "FRAGMENT")  # type: ignore[no-untyped-call]
    library.define(SCHEMA)  # type: ignore[no-untyped-call]
    library.impl("wq_matmul", _plain, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    library.impl("wq_matmul", compute, "CPU")  # type: ignore[no-untyped-call]
    torch.library.register_fake("quantkit::wq_matmul", _fake, lib=library)
    _library.append(library)
    operator: Callable[..., Tensor] = torch.ops.quantkit.wq_matmul.default
    return operator


def dequantize(words: Tensor, scale: Tensor, zero: Tensor | None, rows: int, group: int, bits: int, zero_code: int) -> Tensor:
    """Return the float32 weight (N, K) of a prepacked one, in plain torch: the layout, written down as code."""
    blocks, groups, per_group, lanes = words.shape
    stream = words.permute(0, 3, 1, 2).reshape(blocks * lanes, groups, per_group)  # (N padded, groups, words)
    codes = unpack(stream, bits, per_group * 32 // bits)[..., :group].float()
    per_row = scale.float().transpose(1, 2).reshape(-1, groups, 1)
    offset: Tensor | int = zero_code if zero is None else zero.float().transpose(1, 2).reshape(-1, groups, 1)
    return ((codes - offset) * per_row).flatten(1)[:rows]


def _plain(x: Tensor, *weight: Any) -> Tensor:
    *prepacked, bias = weight
    y = F.linear(x.float(), dequantize(*prepacked), None if bias is None else bias.float())
    return y.to(x.dtype)


def _fake(x: Tensor, words: Tensor, scale: Tensor, zero: Tensor | None, rows: int, *rest: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], rows))


def compute(
    x: Tensor,
    words: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    rows: int,
    group: int,
    bits: int,
    zero_code: int,
    bias: Tensor | None,
) -> Tensor:
    """Run the operator on CPU tensors without dispatch: what :func:`wq_matmul` does there, for eager callers in a hurry."""
    columns = x.shape[-1]
    if columns != words.shape[1] * group or x.dtype not in build.DTYPE_CODES or (bias is not None and bias.dtype != x.dtype):
        raise KernelError(
            f"wq_matmul: x is {x.dtype} {tuple(x.shape)}, bias {None if bias is None else bias.dtype}; want "
            f"float32, float16 or bfloat16 (..., {words.shape[1] * group}) and a bias of the same dtype"
        )
    y = x.new_empty((*x.shape[:-1], rows))
    m = x.numel() // columns
    if m >= TILE_ROWS and x.dtype == torch.bfloat16 and _matrix_tiles():
        _on_tiles(x.reshape(m, columns), y.view(m, rows), words, scale, zero, group, bits, zero_code, bias)
        return y
    if not x.is_contiguous():
        x = x.contiguous()
    status = build.library().qk_wq_matmul(
        words.data_ptr(),
        scale.data_ptr(),
        None if zero is None else zero.data_ptr(),
        None if bias is None else bias.data_ptr(),
        x.data_ptr(),
        y.data_ptr(),
        m,
        rows,
        columns,
        group,
        bits,
        zero_code,
        build.DTYPE_CODES[scale.dtype],
        build.DTYPE_CODES[x.dtype],
        torch.get_num_threads(),
    )
    if status:
        raise KernelError(f"wq_matmul: {'out of memory' if status == 2 else f'{bits} stored bits, want 2, 4 or 8'}")
    return y


def _on_tiles(
    x: Tensor,
    y: Tensor,
    words: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    group: int,
    bits: int,
    zero_code: int,
    bias: Tensor | None,
) -> None:
    """Write ``x @ w.T + bias`` for bfloat16 x (M, K) into y (M, N), a slice of output rows at a time."""
    columns, rows, blocks = x.shape[1], y.shape[1], words.shape[0]
    x = torch.cat([x, x], 1)
    step = max(1, min(blocks, SLICE_BYTES // (columns * 64)))  # blocks of 16 rows; two bfloat16 numbers a weight
    weight = x.new_empty(columns * 2, step * 16)
    for first in range(0, blocks, step):
        last = min(first + step, blocks)
        build.library().qk_wq_split(
            words.data_ptr(),
            scale.data_ptr(),
            None if zero is None else zero.data_ptr(),
            weight.data_ptr(),
            weight.shape[1],
            first,
            last,
            rows,
            columns,
            group,
            bits,
            zero_code,
            build.DTYPE_CODES[scale.dtype],
            torch.get_num_threads(),
        )
        start, stop = first * 16, min(last * 16, rows)
        part, out = weight[:, : stop - start], y[:, start:stop]
        if bias is None:
            torch.mm(x, part, out=out)
        else:
            torch.addmm(bias[start:stop], x, part, out=out)


@functools.cache
def _matrix_tiles() -> bool:
    """Say whether torch multiplies bfloat16 matrices on AMX tiles here."""
    return torch.cpu._is_amx_tile_supported() and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
