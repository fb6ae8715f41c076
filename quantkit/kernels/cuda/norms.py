"""The operations between the matrix products of a decoder layer on CUDA: norms with residuals, and gated activations.

Each kernel is defined by a function in plain torch (``*_plain``), against which it is tested and which runs on other devices.
"""

from typing import Final

import torch
from torch import Tensor

from quantkit.kernels.build import DTYPE_CODES
from quantkit.kernels.cuda import calls
from quantkit.kernels.cuda.calls import activation_code, launch, pointer, struct
from quantkit.kernels.program.reference import ACTIVATIONS

NONE, RMS, LAYER = range(3)
"""Kinds of norm."""
ROUNDINGS: Final = ("float", "int8", "fp8_e4m3")
"""What a norm's output can be rounded to, with a scale per token, as in :mod:`quantkit.numerics.grid`."""

NormStruct = struct("NormStruct", "x residual gain shift sum y scales", "rows n kind rounding dtype", "eps factor")
ActivateStruct = struct("ActivateStruct", "x y", "rows n activation gated interleaved dtype")


def norm(
    x: Tensor,
    residual: Tensor | None,
    gain: Tensor | None,
    shift: Tensor | None,
    *,
    kind: int = RMS,
    eps: float = 1e-6,
    factor: float = 1.0,
    rounding: str = "float",
) -> tuple[Tensor, Tensor, Tensor]:
    """Add, normalize and round in one pass: ``s = residual + factor * x``, ``y = round(norm(s) * gain + shift)``.

    Args:
        x, residual: float16 or bfloat16 (rows, n), contiguous; without a residual, s is x.
        gain, shift: float32 (n,), or None.
        kind: :data:`NONE`, :data:`RMS` or :data:`LAYER`.
        eps: added to the variance.
        factor: factor of x.
        rounding: one of :data:`ROUNDINGS`.

    Returns:
        s (rows, n) in x's dtype; y (rows, n) in x's dtype, or int8 or float8_e4m3fn codes; scales float32 (rows,), empty
        without rounding.
    """
    rows, n = x.shape
    total = torch.empty_like(x) if residual is not None else x
    stored = {"float": x.dtype, "int8": torch.int8, "fp8_e4m3": torch.float8_e4m3fn}[rounding]
    y = torch.empty(x.shape, dtype=stored, device=x.device)
    scales = torch.empty(0 if rounding == "float" else rows, dtype=torch.float32, device=x.device)
    filled = NormStruct(
        *map(pointer, (x, residual, gain, shift, total if residual is not None else None, y, scales)),
        *(rows, n, kind, ROUNDINGS.index(rounding), DTYPE_CODES[x.dtype], eps, factor),
    )
    launch("qk_norm", filled, x.device)
    return total, y, scales


def norm_plain(
    x: Tensor,
    residual: Tensor | None,
    gain: Tensor | None,
    shift: Tensor | None,
    *,
    kind: int = RMS,
    eps: float = 1e-6,
    factor: float = 1.0,
    rounding: str = "float",
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute :func:`norm` in plain torch; this is its definition."""
    total = x if residual is None else (residual.float() + factor * x.float()).to(x.dtype)
    y = total.float()
    if kind != NONE:
        if kind == LAYER:
            y = y - y.mean(-1, keepdim=True)
        assert gain is not None
        y = y / (y.square().mean(-1, keepdim=True) + eps).sqrt() * gain + (0 if shift is None else shift)
    y = y.to(x.dtype)
    if rounding == "float":
        return total, y, torch.empty(0, device=x.device)
    largest = y.float().abs().amax(-1)
    scales = torch.where(largest == 0, 1.0, largest / (127.5 if rounding == "int8" else 448.0))
    codes = y.float() / scales[:, None]
    if rounding == "int8":
        return total, codes.round().clamp(-128, 127).to(torch.int8), scales
    return total, codes.clamp(-448, 448).to(torch.float8_e4m3fn), scales


def activate(x: Tensor, activation: str, gated: bool = True, interleaved: bool = False) -> Tensor:
    """Return ``act(gate) * up`` (rows, n), or ``act(x)`` if not ``gated``.

    Args:
        x: float16 or bfloat16 (rows, 2 n), contiguous: [gate | up], or alternating columns of gate and up if ``interleaved``.
        activation: a key of :data:`quantkit.kernels.program.reference.ACTIVATIONS`.
        gated: False for x (rows, n) without a gate.
        interleaved: whether gate and up alternate, as after :func:`quantkit.kernels.cuda.layout.prepack` with ``interleave``.
    """
    n = x.shape[1] // 2 if gated else x.shape[1]
    y = x.new_empty((x.shape[0], n))
    filled = ActivateStruct(
        *map(pointer, (x, y)), len(x), n, activation_code(activation), gated, interleaved, DTYPE_CODES[x.dtype]
    )
    launch("qk_activate", filled, x.device)
    return y


def activate_plain(x: Tensor, activation: str, gated: bool = True, interleaved: bool = False) -> Tensor:
    """Compute :func:`activate` in plain torch; this is its definition."""
    wide = x.float()
    if not gated:
        return ACTIVATIONS[activation](wide).to(x.dtype)
    gate, up = wide.unflatten(-1, (-1, 2)).unbind(-1) if interleaved else wide.chunk(2, -1)
    return (ACTIVATIONS[activation](gate) * up).to(x.dtype)


def round_tokens(x: Tensor, dtype: str) -> tuple[Tensor, Tensor]:
    """Round x (rows, n) per token to ``"int8"`` or ``"fp8_e4m3"``; return codes (rows, n) and float32 scales (rows,)."""
    function = norm if calls.runs_on(x) else norm_plain
    _, codes, scales = function(x, None, None, None, kind=NONE, rounding=dtype)
    return codes, scales
