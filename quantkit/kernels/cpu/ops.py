"""``torch.ops.quantkit.wq_matmul``: the product with a prepacked weight as a torch operator.

The operator has a schema, a fake for tracing, and two implementations: the compiled library on the CPU, and plain torch on
other devices. It is registered when :func:`wq_matmul` is first called; the library is compiled when it first runs on the CPU.
"""

import ctypes
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from quantkit.errors import KernelError
from quantkit.kernels import build
from quantkit.kernels.cpu import layout
from quantkit.kernels.cpu.layout import LinearStruct, Prepacked

SCHEMA = (
    "wq_matmul(Tensor x, Tensor codes, Tensor? scale, Tensor? zero, "
    "int rows, int group, int kind, int zero_code, Tensor? offset, Tensor? supers, Tensor? global_scale, str numbers, "
    "int block, Tensor? bias) -> Tensor"
)

LARGEST_BLOCK = 256
"""Largest number of columns per activation scale, such that the sum of their int8 values fits in 16 bits."""

_library: list[torch.library.Library] = []  # keeps the registration alive


@functools.cache
def wq_matmul() -> Callable[..., Tensor]:
    """Return the operator, registering it at the first call.

    Its arguments are x (..., K), the fields of :class:`quantkit.kernels.cpu.layout.Prepacked`, the columns per int8 activation
    scale (0 for float activations), and a bias (N,) in x's dtype or None. It returns (..., N) in x's dtype. It has no
    derivative; the reference kernel has one.
    """
    library = torch.library.Library("quantkit", "FRAGMENT")  # type: ignore[no-untyped-call]
    library.define(SCHEMA)  # type: ignore[no-untyped-call]
    library.impl("wq_matmul", wq_matmul_plain, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    library.impl("wq_matmul", _compiled, "CPU")  # type: ignore[no-untyped-call]
    torch.library.register_fake("quantkit::wq_matmul", _fake, lib=library)
    _library.append(library)
    operator: Callable[..., Tensor] = torch.ops.quantkit.wq_matmul.default
    return operator


def round_activations(x: Tensor, group: int, block: int) -> Tensor:
    r"""Return x as the int8 products see it: rounded block by block to :math:`q \cdot s`.

    Blocks of up to ``block`` columns within each group have :math:`s = \max|x| / 127` and :math:`q = \mathrm{round}(x / s)`. A
    block with an infinity or a NaN becomes NaN.

    Args:
        x: floating (..., K).
        group: columns per group of the weight.
        block: columns per scale.

    Returns:
        float32 (..., K).
    """
    groups = x.float().unflatten(-1, (-1, group))
    parts = []
    for part in groups.split(block, -1):
        largest = part.abs().amax(-1, keepdim=True)
        largest = torch.where(largest.isfinite(), largest, torch.nan)
        # A division of tensors, as in the kernel: torch computes `127 / largest` by a reciprocal.
        inverse = torch.where(largest < 2.0**-100, 0.0, torch.full_like(largest, 127) / largest)
        whole = (part.double() * inverse.double()).round().float()  # the float64 product is exact, so it is rounded once
        parts.append(whole * (largest / 127))
    rounded: Tensor = torch.cat(parts, -1).flatten(-2)
    return rounded


def wq_matmul_plain(x: Tensor, *arguments: Any) -> Tensor:
    """Compute :func:`wq_matmul` in plain torch; this is its definition."""
    *fields, block, bias = arguments
    weight = Prepacked(*fields)
    rounds = bool(block) and weight.scale is not None and weight.kind != layout.F8
    wide = round_activations(x, weight.group, block) if rounds else x.float()
    y = F.linear(wide, layout.dequantize(*weight, whole=rounds), None if bias is None else bias.float())
    return y.to(x.dtype)


def _fake(x: Tensor, codes: Tensor, scale: Tensor | None, zero: Tensor | None, rows: int, *rest: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], rows))


def _compiled(x: Tensor, *arguments: Any) -> Tensor:
    *weight, block, bias = arguments
    prepacked = Prepacked(*weight)
    return compute(x, prepacked, prepacked.struct(), block, bias)


def compute(x: Tensor, weight: Prepacked, struct: LinearStruct, block: int, bias: Tensor | None) -> Tensor:
    """Compute :func:`wq_matmul` for CPU tensors without torch's dispatcher, which saves a few microseconds per call.

    Args:
        x: float32, float16 or bfloat16 (..., K).
        weight: the prepacked weight.
        struct: ``weight.struct()``.
        block: columns per int8 activation scale, a multiple of 8 up to :data:`LARGEST_BLOCK`; 0 for float activations.
        bias: (N,) in x's dtype, or None.

    Returns:
        (..., N) in x's dtype.

    Raises:
        KernelError: x, bias or block has a wrong shape, dtype or value.
    """
    columns, rows = weight.columns, weight.rows
    if x.shape[-1] != columns or x.dtype not in build.DTYPE_CODES or (bias is not None and bias.dtype != x.dtype):
        raise KernelError(
            f"wq_matmul: x is {x.dtype} {tuple(x.shape)}, bias {None if bias is None else bias.dtype}; want "
            f"float32, float16 or bfloat16 (..., {columns}) and a bias of the same dtype"
        )
    if block % 8 or not 0 <= block <= LARGEST_BLOCK:
        raise KernelError(f"wq_matmul: block={block}; want a multiple of 8 up to {LARGEST_BLOCK}, or 0 for float activations")
    y = x.new_empty((*x.shape[:-1], rows))
    x = x.contiguous()
    bias = None if bias is None else bias.float().contiguous()
    status = build.library().qk_linear(
        ctypes.addressof(struct),
        None if bias is None else bias.data_ptr(),
        x.data_ptr(),
        y.data_ptr(),
        x.numel() // columns,
        block if weight.scale is not None else 0,
        build.DTYPE_CODES[x.dtype],
        torch.get_num_threads(),
    )
    if status:
        raise KernelError("wq_matmul: out of memory")
    return y
