"""Observe the inputs of expert weights: the counterpart of a forward pre-hook for 3-D stacks, which are not modules.

The function that runs experts (``quantkit/hf/experts.py``) calls the probe of a module just before each of its two products,
and the watcher of a module, the counterpart of a forward hook, just after.
"""

import contextlib
import weakref
from collections.abc import Callable, Iterator

from torch import Tensor, nn

Probe = Callable[[str, Tensor, Tensor], None]
"""A function ``probe(parameter, x, expert_ids)``, which must not change the tensors.

Its arguments are the name of the weight that is about to be used, the input x (rows, in) sorted by expert, and the expert of
each row, int64 (rows,).
"""

_probes: weakref.WeakKeyDictionary[nn.Module, Probe] = weakref.WeakKeyDictionary()
Watcher = Callable[[str, Tensor, Tensor, Tensor], None]
"""A function ``watcher(parameter, x, y, expert_ids)`` with the same arguments and the product y (rows, out)."""

_watchers: weakref.WeakKeyDictionary[nn.Module, Watcher] = weakref.WeakKeyDictionary()
_shown: weakref.WeakSet[nn.Module] = weakref.WeakSet()


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


def attach_watcher(module: nn.Module, watcher: Watcher) -> Callable[[], None]:
    """Let ``watcher`` see the products of an experts module, one at a time; return a function that detaches it."""
    _watchers[module] = watcher

    def detach() -> None:
        _watchers.pop(module, None)

    return detach


def watcher_of(module: nn.Module) -> Watcher | None:
    """Return the watcher of an experts module, or None."""
    return _watchers.get(module)


@contextlib.contextmanager
def all_experts_shown(model: nn.Module, shown: bool = True) -> Iterator[None]:
    """Let probes see every token at every expert of ``model`` meanwhile, whatever the router chooses; outputs stay the same.

    Args:
        model: holds the experts.
        shown: False changes nothing.
    """
    mine = list(model.modules()) if shown else []
    _shown.update(mine)
    try:
        yield
    finally:
        _shown.difference_update(mine)


def shows_all_experts(module: nn.Module) -> bool:
    """Return whether the probe of an experts module wants to see every token at every expert."""
    return module in _probes and module in _shown
