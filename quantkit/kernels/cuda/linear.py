"""A matrix product of a decoder on CUDA, with a float or quantized weight and float or rounded activations."""

from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from quantkit.kernels.cuda import layout
from quantkit.kernels.cuda import ops as cuda_ops

INVARIANT_ROWS: Final = 32
"""Rows of every dense product where results must not depend on the batch."""


class Rounded(NamedTuple):
    """Activations rounded to 8 bits with one scale per token.

    Attributes:
        codes: int8 or float8_e4m3fn (rows, K).
        scales: float32 (rows,).
    """

    codes: Tensor
    scales: Tensor

    def part(self, rows: Any) -> "Rounded":
        """Return the given rows."""
        return Rounded(self.codes[rows], self.scales[rows])


class Product(NamedTuple):
    """One or several linears, combined into one product.

    Attributes:
        floats: float weight (N, K), or None.
        weight: quantized weight, or None.
        bias: (N,), or None.
        form: the form of the product, see :data:`quantkit.kernels.cuda.ops.SCHEMAS`; empty for a float weight.
        activation: if given, rows of gate and up alternate, and the result is ``activation(gate) * up``.
    """

    floats: Tensor | None
    weight: layout.Fragments | None
    bias: Tensor | None
    form: str
    activation: str | None = None

    @property
    def rounding(self) -> str:
        """What the norm before this product can round its output to, of :data:`~quantkit.kernels.cuda.norms.ROUNDINGS`."""
        return cuda_ops.ROUNDED.get(self.form, "float")

    def __call__(self, x: Tensor | Rounded, dtype: torch.dtype, batch_invariant: bool = False) -> Tensor:
        """Return ``x @ w.T + bias``, or ``activation(gate) * up``.

        Args:
            x: (rows, K), floats or rounded.
            dtype: dtype of the result.
            batch_invariant: make the result of a row independent of the number of rows.

        Returns:
            (rows, N), or (rows, N / 2) with an activation.
        """
        if batch_invariant:
            return self._in_pieces(x, dtype)
        if self.floats is not None:
            assert isinstance(x, Tensor)
            return F.linear(x, self.floats, self.bias)
        assert self.weight is not None
        ops, rest = cuda_ops.ops(), (*self.weight, self.bias, self.form, self.activation)
        y: Tensor = ops.rounded_matmul(*x, *rest, dtype) if isinstance(x, Rounded) else ops.fragment_matmul(x, *rest)
        return y

    def _in_pieces(self, x: Tensor | Rounded, dtype: torch.dtype) -> Tensor:
        """Multiply a few rows at a time, such that every call uses the same algorithm.

        The library for dense products chooses the order of sums by shape, so these always have :data:`INVARIANT_ROWS` rows.
        """
        dense = self.floats is not None or not cuda_ops.takes_codes(1, self.form)
        size, rows = INVARIANT_ROWS if dense else cuda_ops.SURE_CODES_ROWS, len(x.scales) if isinstance(x, Rounded) else len(x)
        pieces: Sequence[Tensor | Rounded]
        if isinstance(x, Rounded):  # dense products do not take rounded activations
            pieces = [x.part(slice(start, start + size)) for start in range(0, max(rows, 1), size)]
        else:
            pieces = (F.pad(x, (0, 0, 0, -rows % size)) if dense else x).split(size)
        parts = [self(piece, dtype) for piece in pieces]
        return (parts[0] if len(parts) == 1 else torch.cat(parts))[:rows]


def common_rounding(products: tuple[Product, ...]) -> str:
    """Return what the norm before several products can round its output to; ``"float"`` if they differ or there is none."""
    kinds = {product.rounding for product in products}
    return kinds.pop() if len(kinds) == 1 else "float"
