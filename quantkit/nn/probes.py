"""Look at the rows that experts multiply: they pass through no module of their own, so that no hook of torch sees them.

Whoever runs a module's experts asks :func:`probe_of` before each product; calibration registers with :func:`add_probe`.
"""

import weakref
from collections.abc import Callable

from torch import Tensor, nn

Probe = Callable[[str, Tensor, Tensor], None]
"""``probe(parameter, x, expert_ids)``: x (rows, in) sorted by expert, expert_ids int64 (rows,). Must not change them."""

_probes: weakref.WeakKeyDictionary[nn.Module, Probe] = weakref.WeakKeyDictionary()


def add_probe(module: nn.Module, probe: Probe) -> Callable[[], None]:
    """Let ``probe`` see the rows of an experts module just before each product; return what takes it away again."""
    _probes[module] = probe

    def remove() -> None:
        _probes.pop(module, None)

    return remove


def probe_of(module: nn.Module) -> Probe | None:
    """Return what looks at the rows of an experts module, if anything does."""
    return _probes.get(module)
