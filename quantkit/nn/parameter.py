"""A quantized weight that stands where a parameter stood whose module multiplies by it in its own way.

Expert modules that transformers does not run through its experts interface, and linear layers with a forward of their own, read
their parameter as a tensor: ``torch.bmm(x, self.gate_up_proj)``, ``F.linear(x, self.weight[expert])``. Their code goes on
unchanged with a :class:`QuantParameter`: torch's functions, and the methods and attributes of a tensor, see the dequantized
weight, and one matrix of a stack is dequantized alone. Nothing may write to it.

Every use dequantizes anew, so this saves memory but no time. Nobody sees the inputs: they can be neither collected nor rounded.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from quantkit.nn.linear import QuantModule
from quantkit.qtensor import QTensor


class QuantParameter(QuantModule):
    """A quantized weight that can be read like the parameter it replaces.

    Args:
        qtensor: the weight as the parameter was stored: (out, in), or (experts, rows, columns) for a stack.
        dtype: of what a reader sees; follows ``to(dtype)``, which codes and scales do not.
        transposed: the parameter was stored with its last two axes the other way round.

    Attributes:
        shape: of the quantized weight; :meth:`size` and what readers see is the parameter's.
    """

    like: Tensor

    def __init__(self, qtensor: QTensor, dtype: torch.dtype = torch.float32, *, transposed: bool = False) -> None:
        super().__init__(qtensor)
        self.transposed = transposed
        self.register_buffer("like", torch.empty(0, dtype=dtype, device=qtensor.device), persistent=False)

    @property
    def dtype(self) -> torch.dtype:
        """What a reader sees."""
        return self.like.dtype

    def to(self, *args: Any, **kwargs: Any) -> Tensor:  # type: ignore[override]
        """Return the dequantized weight elsewhere, or in another dtype: what a reader of a parameter means by it."""
        return self.tensor().to(*args, **kwargs)

    def float(self) -> Tensor:  # type: ignore[override]
        """Return the dequantized weight in float32."""
        return self.tensor().float()

    def tensor(self) -> Tensor:
        """Return the whole weight in the dtype that readers see."""
        return self._turned(self.dequantize(self.like.dtype))

    def _turned(self, weight: Tensor) -> Tensor:
        return weight.transpose(-1, -2) if self.transposed else weight

    def __getitem__(self, index: Any) -> Tensor:
        """Return a part of the weight; a whole number picks one matrix of a stack, which is dequantized alone."""
        one = isinstance(index, int) or (isinstance(index, Tensor) and index.ndim == 0 and index.dtype != torch.bool)
        if one and len(self.shape) == 3:
            return self._turned(self.qtensor[int(index)].dequantize(self.like.dtype))
        return self.tensor()[index]

    def __len__(self) -> int:
        return self.shape[0]

    def __getattr__(self, name: str) -> Any:
        """Return an attribute or method of the dequantized weight, where the module has none of that name.

        Raises:
            AttributeError: a tensor has none either, or the method would change the weight in place.
        """
        try:
            return super().__getattr__(name)
        except AttributeError:
            changes = name.endswith("_") and not name.endswith("__")
            if name.startswith("_") or changes or not hasattr(Tensor, name):
                raise
        return getattr(self.tensor(), name)

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Iterable[type], args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Call a function of torch's with dequantized weights (the protocol by which torch accepts what is no tensor)."""
        return function(*_as_tensors(args), **_as_tensors(kwargs or {}))


def _as_tensors(value: Any) -> Any:
    if isinstance(value, QuantParameter):
        return value.tensor()
    if type(value) in (tuple, list):
        return type(value)(_as_tensors(item) for item in value)
    if type(value) is dict:
        return {key: _as_tensors(item) for key, item in value.items()}
    return value
