"""Observe the inputs of expert weights: the counterpart of a forward pre-hook for 3-D stacks, which are not modules.

The function that runs experts (``quantkit/hf/experts.py``) calls the probe of a module just before each of its two products.
"""

import weakref
from collections.abc import Callable

from torch import Tensor, nn

Probe = Callable[[str, Tensor, Tensor], None]
"""A function ``probe(parameter, x, expert_ids)``, which must not change the tensors.

Its arguments are the name of the weight that is about to be used, the input x (rows, in) sorted by expert, and the expert of
each row, int64 (rows,).
"""

_probes: weakref.WeakKeyDictionary[nn.Module, Probe] = weakref.WeakKeyDictionary()


def attach_probe(module: nn.Module, probe: Probe) -> Callable[[], None]:
    """Let ``probe`` observe the inputs of an experts module; a module has one probe at a time.

    Returns:
        A function that detaches the probe.
    """
    _probes[module] = probe

    def detach() -> None:
        _probes.pop(module, None)

    return detach


def probe_of(module: nn.Module) -> Probe | None:
    """Return the probe of an experts module, or None."""
    return _probes.get(module)
