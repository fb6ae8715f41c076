"""Where and in which dtype a block of the model runs while it is at work."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class Compute:
    """Where and in which dtype a block runs while it is at work.

    Attributes:
        device: where.
        dtype: of weights and activations.
        products: what matrix products round their inputs to, summing in float32; None is ``dtype``.
    """

    device: torch.device
    dtype: torch.dtype
    products: torch.dtype | None = None

    @classmethod
    def default(cls, model: nn.Module) -> "Compute":
        """Use the GPU in the model's dtype if there is one, otherwise the CPU in float32, with products of bfloat16 numbers
        where the processor has them: they take half the time."""
        if torch.cuda.is_available():
            return cls(torch.device("cuda"), next(model.parameters()).dtype)
        return cls(torch.device("cpu"), torch.float32, torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else None)

    def rounding_products(self, enabled: bool = True) -> contextlib.AbstractContextManager[object]:
        """Return the context in which products round their inputs (or again do not). Weights change while it lasts, so none
        is kept rounded."""
        if self.products is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.products, enabled=enabled, cache_enabled=False)


@contextlib.contextmanager
def on_device(block: nn.Module, compute: Compute) -> Iterator[None]:
    """Move ``block`` to the compute device and dtype; afterwards every tensor is back where and what it was.

    A tensor that was not written to meanwhile gets its own memory back, so that a narrower dtype leaves no trace in it.
    """
    tensors = [*block.parameters(), *block.buffers()]
    home = [tensor.data for tensor in tensors]
    block.to(compute.device, compute.dtype)
    tensors = [*block.parameters(), *block.buffers()]  # buffers are new objects now
    moved = [tensor.data_ptr() for tensor in tensors]
    try:
        yield
    finally:
        for tensor, own, address in zip(tensors, home, moved, strict=True):
            tensor.data = own if tensor.data_ptr() == address else tensor.data.to(own.device, own.dtype)
