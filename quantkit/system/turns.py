"""Let threads that share an object take turns."""

import threading
import weakref

_guard = threading.Lock()
_locks: weakref.WeakKeyDictionary[object, threading.RLock] = weakref.WeakKeyDictionary()


def turn(shared: object) -> threading.RLock:
    """Return the lock of ``shared``, to be held while something about it is changed for a while (``with turn(model):``).

    A model is shared by threads that generate with it: what runs it through its modules swaps its attention function for a
    step, and what looks at how it works hooks its modules. Holding the lock twice in one thread is allowed.
    """
    with _guard:
        return _locks.setdefault(shared, threading.RLock())
