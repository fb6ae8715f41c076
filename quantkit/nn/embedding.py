"""An embedding table that is quantized: rows are dequantized as they are looked up.

The table of a small model is a quarter of its weights, and of a tied model the output head as well. Looking a row up costs a
few microseconds more than in float; a head that is tied to the table runs as any quantized layer, on the same codes.
"""

from typing import Any

import torch
from torch import Tensor

from quantkit.errors import SpecError
from quantkit.nn.linear import _Quantized
from quantkit.qtensor import GridTensor


class QuantEmbedding(_Quantized):
    """An embedding with a quantized table.

    Args:
        qtensor: the table, (vocabulary, hidden), whose scales belong to single rows.
        dtype: of what a look-up returns; follows ``to(dtype)``, which codes and scales do not.

    Attributes:
        num_embeddings, embedding_dim: the table's shape.

    Raises:
        SpecError: a table that is not 2-D, or with scales shared by several rows.
    """

    def __init__(self, qtensor: GridTensor, dtype: torch.dtype = torch.float32) -> None:
        if len(qtensor.shape) != 2 or qtensor.spec.block[0] != 1:
            got = f"{qtensor.spec.describe()} {qtensor.shape}"
            raise SpecError(f"QuantEmbedding: {got}; want (vocabulary, hidden) with a scale per group or row")
        super().__init__(qtensor)
        self.num_embeddings, self.embedding_dim = qtensor.shape
        self.register_buffer("like", torch.empty(0, dtype=dtype, device=qtensor.scale.device), persistent=False)

    @property
    def weight(self) -> Tensor:
        """The whole table, dequantized anew: for those who ask for its shape, device or values now and then."""
        return self.dequantize(self.like.dtype)  # type: ignore[arg-type]

    def forward(self, ids: Tensor) -> Tensor:
        """Return the rows of int64 ``ids`` (...), (..., hidden)."""
        rows = self.qtensor.rows(ids.reshape(-1))
        return rows.dequantize(self.like.dtype).view(*ids.shape, self.embedding_dim)  # type: ignore[arg-type]


def input_table(model: Any) -> tuple[int, torch.device]:
    """Return how many ids the input embedding of ``model`` knows, and where ids must be; a quantized table stays quantized."""
    table = model.get_input_embeddings()
    if isinstance(table, QuantEmbedding):
        return table.num_embeddings, table.like.device  # type: ignore[return-value]
    return table.weight.shape[0], table.weight.device
