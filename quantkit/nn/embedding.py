"""An embedding table that is quantized: rows are dequantized as they are looked up.

The table of a small model is a quarter of its weights, and of a tied model the output head as well. Looking a row up costs a
few microseconds more than in float; a head that is tied to the table runs as any quantized layer, on the same codes.
"""

from typing import Any

import torch
from torch import Tensor

from quantkit.errors import SpecError
from quantkit.nn.linear import QuantModule
from quantkit.qtensor import QTensor


class QuantEmbedding(QuantModule):
    """An embedding with a quantized table.

    Args:
        qtensor: the table, (vocabulary, hidden), whose scales belong to single rows.
        dtype: of what a look-up returns; follows ``to(dtype)``, which codes and scales do not.

    Attributes:
        num_embeddings, embedding_dim: the table's shape.

    Raises:
        SpecError: a table that is not 2-D, or with scales shared by several rows.
    """

    like: Tensor

    def __init__(self, qtensor: QTensor, dtype: torch.dtype = torch.float32) -> None:
        try:
            qtensor.rows(torch.zeros(0, dtype=torch.int64, device=qtensor.device))
        except SpecError as error:
            raise SpecError(f"QuantEmbedding: {error}; want a scale per group or row") from error
        if len(qtensor.shape) != 2:
            raise SpecError(f"QuantEmbedding: a table {qtensor.shape}; want (vocabulary, hidden)")
        super().__init__(qtensor)
        self.num_embeddings, self.embedding_dim = qtensor.shape
        self.register_buffer("like", torch.empty(0, dtype=dtype, device=qtensor.device), persistent=False)

    @property
    def weight(self) -> Tensor:
        """The whole table, dequantized anew at every access; meant for code that asks an embedding for its weight's shape."""
        return self.dequantize(self.like.dtype)

    def forward(self, ids: Tensor) -> Tensor:
        """Return the rows of int64 ``ids`` (...), (..., hidden)."""
        rows = self.qtensor.rows(ids.reshape(-1))
        return rows.dequantize(self.like.dtype).view(*ids.shape, self.embedding_dim)


def input_table(model: Any) -> tuple[int, torch.device]:
    """Return how many ids the input embedding of ``model`` knows, and where ids must be; a quantized table stays quantized."""
    table = model.get_input_embeddings()
    if isinstance(table, QuantEmbedding):
        return table.num_embeddings, table.device
    return table.weight.shape[0], table.weight.device


def max_positions(model: object) -> int | None:
    """Return the longest sequence that a model supports, or None if its config does not name one."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    limit = getattr(text, "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None
