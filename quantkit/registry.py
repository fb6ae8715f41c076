"""Plug-in families: one file adds one member, and nothing is imported until it is asked for.

A member registers itself with a decorator. The first look-up imports every module of the family's package, so the
recipe reader, the command line, the documentation and the contract tests all see the same list.
"""

import importlib
import pkgutil
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from quantkit.errors import QuantkitError, nearest

T = TypeVar("T")


class Registry(Generic[T]):
    """Named members of one plug-in family, discovered in ``package`` on first use.

    Args:
        kind: what a member is called in messages, e.g. ``"quantizer"``.
        package: dotted name of the package whose modules register members.
        error: exception class raised for an unknown name.
    """

    def __init__(self, kind: str, *, package: str, error: type[QuantkitError] = QuantkitError) -> None:
        self.kind, self.package, self.error = kind, package, error
        self._members: dict[str, T] = {}
        self._discovered = False

    def register(self, name: str) -> Callable[[T], T]:
        """Return a decorator that adds its argument under ``name``; a second member of that name is an error."""

        def add(member: T) -> T:
            if name in self._members and self._members[name] is not member:
                raise QuantkitError(f"{self.kind} {name!r} is registered twice")
            self._members[name] = member
            return member

        return add

    def get(self, name: str) -> T:
        """Return the member called ``name``.

        Raises:
            QuantkitError: (or the family's own class) naming the nearest known member.
        """
        self._discover()
        if name not in self._members:
            raise self.error(f"unknown {self.kind} {name!r}; {nearest(name, self._members)}")
        return self._members[name]

    def names(self) -> list[str]:
        """Return all member names, sorted."""
        self._discover()
        return sorted(self._members)

    def __iter__(self) -> Iterator[tuple[str, T]]:
        self._discover()
        return iter(sorted(self._members.items()))

    def _discover(self) -> None:
        if self._discovered:
            return
        package = importlib.import_module(self.package)
        for module in pkgutil.walk_packages(package.__path__, f"{self.package}."):
            importlib.import_module(module.name)
        self._discovered = True
