"""One matrix product of a decoder on CUDA: float or quantized weights, of activations as they are or rounded before."""

from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from quantkit.kernels.cuda import layout
from quantkit.kernels.cuda import ops as cuda_ops

INVARIANT_ROWS: Final = 32
"""Rows of every dense product where batches must not matter."""


class Rounded(NamedTuple):
    """Activations in 8 bits, a scale per token: int8 or float8 codes (rows, K), float32 (rows,)."""

    codes: Tensor
    scales: Tensor

    def part(self, rows: Any) -> "Rounded":
        """Return some of the rows."""
        return Rounded(self.codes[rows], self.scales[rows])


class Product(NamedTuple):
    """Linears side by side, laid out: one float weight, or one quantized one.

    Where ``activation`` is given, the quantized rows are gate and up in turn, and the result is ``activation(gate) * up``.
    """

    floats: Tensor | None
    weight: layout.Fragments | None
    bias: Tensor | None
    form: str
    activation: str | None = None

    @property
    def rounding(self) -> str:
        """What a norm may round its output to for this product: one of :data:`~quantkit.kernels.cuda.norms.ROUNDINGS`."""
        return cuda_ops.ROUNDED.get(self.form, "float")

    def __call__(self, x: Tensor | Rounded, dtype: torch.dtype, batch_invariant: bool = False) -> Tensor:
        """Return ``x @ w.T + bias`` for x (rows, K), or what its gate makes of it, in ``dtype``.

        With ``batch_invariant``, a row's result does not depend on how many there are.
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
        """Multiply so few rows at a time that they all go the same way.

        A dense product, whose library chooses another order of summing for other shapes, always has :data:`INVARIANT_ROWS`.
        """
        dense = self.floats is not None or not cuda_ops.takes_codes(1, self.form)
        size, rows = INVARIANT_ROWS if dense else cuda_ops.SURE_CODES_ROWS, len(x.scales) if isinstance(x, Rounded) else len(x)
        pieces: Sequence[Tensor | Rounded]
        if isinstance(x, Rounded):  # which no dense product takes
            pieces = [x.part(slice(start, start + size)) for start in range(0, max(rows, 1), size)]
        else:
            pieces = (F.pad(x, (0, 0, 0, -rows % size)) if dense else x).split(size)
        parts = [self(piece, dtype) for piece in pieces]
        return (parts[0] if len(parts) == 1 else torch.cat(parts))[:rows]


def common_rounding(products: tuple[Product, ...]) -> str:
    """Return what the norm before some products may round to; floats if they do not agree, or for experts and their router."""
    kinds = {product.rounding for product in products}
    return kinds.pop() if len(kinds) == 1 else "float"
