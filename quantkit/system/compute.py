"""Where and how modules run: device and dtype of a block, and evaluation mode."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class Compute:
    """Device and dtypes with which a block is computed.

    Attributes:
        device: the device.
        dtype: dtype of weights and activations.
        products: dtype to which matrix products round their inputs, with sums in float32; None for ``dtype``.
    """

    device: torch.device
    dtype: torch.dtype
    products: torch.dtype | None = None

    @classmethod
    def default(cls, model: nn.Module) -> "Compute":
        """Return the GPU with the model's dtype if there is one, else the CPU with float32.

        On a CPU with bfloat16 instructions, products round their inputs to bfloat16, which halves their time.
        """
        if torch.cuda.is_available():
            return cls(torch.device("cuda"), next(model.parameters()).dtype)
        return cls(torch.device("cpu"), torch.float32, torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else None)

    def rounding_products(self, enabled: bool = True) -> contextlib.AbstractContextManager[object]:
        """Return a context in which matrix products round their inputs to ``products`` (or, if not ``enabled``, do not).

        Rounded weights are not cached, because weights change within the context.
        """
        if self.products is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.products, enabled=enabled, cache_enabled=False)


@contextlib.contextmanager
def on_device(block: nn.Module, compute: Compute) -> Iterator[None]:
    """Move ``block`` to the device and dtype of ``compute``, and back at the end.

    A tensor that was not written to gets its original memory back, so that a narrower dtype does not round it.
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


@contextlib.contextmanager
def evaluation_mode(*models: object) -> Iterator[None]:
    """Put modules in eval mode and disable gradients; restore the mode of every submodule at the end.

    Arguments that are not modules are ignored.
    """
    training = [module for model in models if isinstance(model, nn.Module) for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True
