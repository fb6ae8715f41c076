"""Let threads take turns: those that share an object, and those that share the interpreter."""

import contextlib
import gc
import sys
import threading
import weakref
from collections.abc import Iterator

TURN_S = 0.001
"""Longest turn of a thread in :func:`short_turns`; Python's own is five times as long."""

_guard = threading.Lock()
_locks: weakref.WeakKeyDictionary[object, threading.RLock] = weakref.WeakKeyDictionary()


def turn(shared: object) -> threading.RLock:
    """Return the lock of ``shared``, to be held while something about it is changed for a while (``with turn(model):``).

    A model is shared by threads that generate with it: what runs it through its modules swaps its attention function for a
    step, and what looks at how it works hooks its modules. Holding the lock twice in one thread is allowed.
    """
    with _guard:
        return _locks.setdefault(shared, threading.RLock())


@contextlib.contextmanager
def short_turns() -> Iterator[None]:
    """Let no thread of this process keep the others waiting for long, as a server must that answers at once.

    Two things do. The interpreter hands on its lock every 5 ms only, and an answer needs it several times. And the garbage
    collector goes through everything that imports have made (a million objects of torch and transformers, 140 ms) with the
    lock held, whenever enough has been made since; what is there by now will be needed to the end, so it is left out.
    """
    turn_s = sys.getswitchinterval()
    gc.collect()
    gc.freeze()
    sys.setswitchinterval(TURN_S)
    try:
        yield
    finally:
        sys.setswitchinterval(turn_s)
        gc.unfreeze()
