"""Building models in several threads at once.

transformers changes the whole process while it builds a model: torch's default dtype, functions of its own and of torch. So one
thread at a time builds, which takes a moment; everything else of loading goes on in parallel. Building without memory for the
parameters is done by a hook of torch that looks at nothing but the thread it is called in: layers that other threads make
meanwhile, and any made afterwards, are as they always are.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

building = threading.Lock()
"""Held while transformers builds a model."""


_PLAIN = (nn.Linear, nn.Embedding)
"""Layers that hold parameters and nothing else: transformers has nothing to initialise in them that has memory."""


class _Thread(threading.local):
    """What is so in one thread only."""

    on_meta = False


_thread = _Thread()


def _onto_meta(module: nn.Module, name: str, parameter: nn.Parameter) -> nn.Parameter | None:
    """Replace a parameter that a thread in :func:`parameters_on_meta` gives to a module; leave those of others alone."""
    if not _thread.on_meta:
        return None
    if type(module) in _PLAIN:
        module._is_hf_initialized = True  # type: ignore[assignment]  # random numbers for nothing, which takes most of the time
    if parameter.is_meta:
        return None
    made = type(parameter)(parameter.to("meta"), requires_grad=parameter.requires_grad)
    made.__dict__.update(parameter.__dict__)
    return made


register_module_parameter_registration_hook(_onto_meta)  # type: ignore[arg-type]  # it may return a parameter


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Give modules that this thread makes parameters on the meta device, and real buffers."""
    _thread.on_meta = True
    try:
        yield
    finally:
        _thread.on_meta = False
