"""Where and how modules run: device and dtype of a block, and evaluation mode."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import nn

from quantkit.errors import SpecError


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
    def default(cls, model: nn.Module, device: str = "auto") -> "Compute":
        """Return a GPU with the model's dtype, or the CPU with float32; ``"auto"`` is the GPU if there is one.

        On a CPU with bfloat16 instructions, products round their inputs to bfloat16, which halves their time.
        """
        place = known_device(device)
        if place.type != "cpu":
            return cls(place, next(model.parameters()).dtype)
        return cls(place, torch.float32, torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else None)

    def rounding_products(self, enabled: bool = True) -> contextlib.AbstractContextManager[object]:
        """Return a context in which matrix products round their inputs to ``products`` (or, if not ``enabled``, do not).

        Rounded weights are not cached, because weights change within the context.
        """
        if self.products is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.products, enabled=enabled, cache_enabled=False)


def known_device(device: torch.device | str) -> torch.device:
    """Return a device of this machine; ``"auto"`` is the GPU if there is one, else the CPU.

    Raises:
        SpecError: torch does not know it, or this machine does not have it.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise SpecError(f"device={device!r}: want cpu or cuda, one of several as cuda:1, or auto") from error
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise SpecError(f"device={device!r}: torch sees {torch.cuda.device_count()} GPUs on this machine; use cpu")
    return found


@runtime_checkable
class PlacesItself(Protocol):
    """A module that holds tensors elsewhere than in its parameters and buffers."""

    def placed_on(self, device: torch.device) -> contextlib.AbstractContextManager[None]:
        """Return the context in which those tensors are on ``device``."""
        ...


@contextlib.contextmanager
def on_device(module: nn.Module, compute: Compute) -> Iterator[None]:
    """Give ``module`` its parameters in the compute dtype, and everything on the compute device; undo it afterwards.

    A parameter that got a new value meanwhile keeps it, in its own dtype and on its own device. Every other gets its own
    memory back, so that a narrower dtype leaves no trace in it. Buffers move but keep their dtype: positions and frequencies
    do not survive a cast.
    """
    home = [(parameter, parameter.data) for parameter in module.parameters()]
    buffers = [(owner, name, b) for owner in module.modules() for name, b in owner._buffers.items() if b is not None]
    for parameter, own in home:
        parameter.data = own.to(compute.device, compute.dtype)
    for owner, name, buffer in buffers:
        owner._buffers[name] = buffer.to(compute.device)
    moved = [parameter.data_ptr() for parameter, _ in home]
    try:
        with contextlib.ExitStack() as placed:
            for part in module.modules():
                if isinstance(part, PlacesItself):
                    placed.enter_context(part.placed_on(compute.device))
            yield
    finally:
        for (parameter, own), address in zip(home, moved, strict=True):
            written = parameter.data_ptr() != address
            parameter.data = parameter.data.to(own.device, own.dtype) if written else own
        for owner, name, buffer in buffers:
            owner._buffers[name] = buffer


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
