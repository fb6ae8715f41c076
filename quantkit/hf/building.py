"""Building models in several threads at once.

transformers changes the whole process while it builds a model: torch's default dtype, functions of its own and of torch. So one
thread at a time builds, which takes a moment; everything else of loading goes on in parallel. Building without memory for the
parameters is done by a hook of torch that looks at nothing but the thread it is called in: layers that other threads make
meanwhile, and any made afterwards, are as they always are. The same hook puts parameters that transformers has made anew while
it loads, such as joined experts, somewhere else than in memory, one by one as they come.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

building = threading.Lock()
"""Held while transformers builds a model."""


_PLAIN = (nn.Linear, nn.Embedding)
"""Layers that hold parameters and nothing else: transformers has nothing to initialise in them that has memory."""


class _Thread(threading.local):
    """What is so in one thread only."""

    on_meta = False
    keep: Callable[[Tensor], Tensor] | None = None


_thread = _Thread()


def _replaced(module: nn.Module, name: str, parameter: nn.Parameter) -> nn.Parameter | None:
    """Replace a parameter that a thread in one of the contexts below gives to a module; leave those of others alone."""
    if not _thread.on_meta:
        return _kept(parameter)
    if type(module) in _PLAIN:
        module._is_hf_initialized = True  # type: ignore[assignment]  # random numbers for nothing, which takes most of the time
    if parameter.is_meta:
        return None
    return _with_data(parameter, parameter.to("meta"))


def _kept(parameter: nn.Parameter) -> nn.Parameter | None:
    if _thread.keep is None or parameter.is_meta:
        return None
    data = _thread.keep(parameter.data)
    return None if data is parameter.data or data.data_ptr() == parameter.data_ptr() else _with_data(parameter, data)


def _with_data(parameter: nn.Parameter, data: Tensor) -> nn.Parameter:
    made = type(parameter)(data, requires_grad=parameter.requires_grad)
    made.__dict__.update(parameter.__dict__)
    return made


register_module_parameter_registration_hook(_replaced)  # type: ignore[arg-type]  # it may return a parameter


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Give modules that this thread makes parameters on the meta device, and real buffers."""
    _thread.on_meta = True
    try:
        yield
    finally:
        _thread.on_meta = False


@contextmanager
def parameters_kept(keep: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Give modules in this thread, for every parameter that they are given, what ``keep`` makes of its data, or the same."""
    _thread.keep = keep
    try:
        yield
    finally:
        _thread.keep = None
