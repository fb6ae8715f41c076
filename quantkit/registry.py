"""Plug-in families: one file adds one member, and nothing is imported until it is asked for.

A member registers itself with a decorator. The first look-up imports every module of the family's package, so the
recipe reader, the command line, the documentation and the contract tests all see the same list.

Other packages add members, too. Either user code calls :meth:`Registry.register` itself, or an installed package names them in
entry points, which are found without importing anything of it::

    [project.entry-points."quantkit.quantizers"]
    my-quantizer = "my_package.my_module:MyQuantizer"

The groups are ``quantkit.schemes``, ``.quantizers``, ``.steps``, ``.formats``, ``.kernels``, ``.drafters`` and
``.collectors``. An entry point that cannot be loaded is a warning, and an error only where it is asked for by name.
"""

import importlib
import logging
import pkgutil
from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, TypeVar

from quantkit.errors import QuantkitError, nearest

T = TypeVar("T")

log = logging.getLogger(__name__)


_PLACES = {"scheme": "scheme", "quantizer": "method", "step": "steps", "format": "format"}
"""Families whose names are taken for each other, the likeliest first, and where recipes, options and arguments have them."""
_FAMILIES: "list[Registry[Any]]" = []


class Registry(Generic[T]):
    """Named members of one plug-in family, discovered on first use in ``package`` and in entry points.

    Args:
        kind: what a member is called in messages, e.g. ``"quantizer"``; with an s, the last part of the entry points' group.
        package: dotted name of the package whose modules register members; None for a family whose members are registered
            where the registry is.
        error: exception class raised for an unknown name.
        hint: what else is said of an unknown name.
        meant: returns the member that an unknown name most likely stands for, and None where its letters say more.
    """

    def __init__(
        self,
        kind: str,
        *,
        package: str | None = None,
        error: type[QuantkitError] = QuantkitError,
        hint: str = "",
        meant: Callable[[str], str | None] = lambda name: None,
    ) -> None:
        self.kind, self.package, self.error, self.hint, self._meant = kind, package, error, hint, meant
        if kind in _PLACES:
            _FAMILIES.append(self)
        self._members: dict[str, T] = {}
        self._broken: dict[str, str] = {}
        self._discovered = False

    @property
    def group(self) -> str:
        """Name of the group of entry points that add members."""
        return f"quantkit.{self.kind}s"

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
            QuantkitError: (or the family's own class) naming the nearest known member, or why an installed package's member of
                that name cannot be used.
        """
        self._discover()
        if name in self._members:
            return self._members[name]
        raise self.error(self._broken.get(name) or f"unknown {self.kind} {name!r}; {self._advice(name)}{self.hint}")

    def names(self) -> list[str]:
        """Return all member names, sorted."""
        self._discover()
        return sorted(self._members)

    def broken(self) -> dict[str, str]:
        """Return the entry points that cannot be used, by name, and why."""
        self._discover()
        return dict(self._broken)

    def __iter__(self) -> Iterator[tuple[str, T]]:
        self._discover()
        return iter(sorted(self._members.items()))

    def __contains__(self, name: object) -> bool:
        self._discover()
        return name in self._members

    def _advice(self, name: str) -> str:
        """Return what is said of an unknown name: where it belongs, or the nearest of the names here."""
        known = f"known: {', '.join(sorted(self._members)) or 'none'}"
        places = [*_PLACES]
        others = sorted((one for one in _FAMILIES if one is not self and name in one), key=lambda one: places.index(one.kind))
        if (other := next(iter(others), None)) is not None:
            return f"it is the name of a {other.kind}, which goes under {_PLACES[other.kind]}; {known}"
        meant = self._meant(name)
        return f"did you mean {meant!r}? {known}" if meant in self._members else nearest(name, self._members)

    def _discover(self) -> None:
        if self._discovered:
            return
        if self.package is not None:
            package = importlib.import_module(self.package)
            for module in pkgutil.walk_packages(package.__path__, f"{self.package}."):
                importlib.import_module(module.name)
        self._discovered = True  # before entry points: what they import may look up members
        for entry in entry_points(group=self.group):
            self._add_entry(entry)

    def _add_entry(self, entry: EntryPoint) -> None:
        """Load an entry point of any origin; whatever goes wrong in it must not take the other members down."""
        owner = f"{entry.dist.name} {entry.dist.version}" if entry.dist else "an unknown distribution"
        try:
            if (member := entry.load()) is not self._members.get(entry.name):  # it may have registered itself
                self.register(entry.name)(member)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            self._broken[entry.name] = (
                f"{self.kind} {entry.name!r} of {owner} (entry point {entry.value}) cannot be used: {reason}; "
                "update or uninstall that package"
            )
            log.warning("%s", self._broken[entry.name])
