"""Keyword options that are typed by a ``TypedDict`` and passed on to the functions that use them."""

from collections.abc import Mapping, Set
from typing import Any

from quantkit.errors import nearest


def take(options: Mapping[str, Any], names: Set[str]) -> dict[str, Any]:
    """Return the options whose names are in ``names``."""
    return {name: value for name, value in options.items() if name in names}


def check_names(function: str, options: Mapping[str, Any], names: Set[str]) -> None:
    """Refuse options that do not exist.

    Args:
        function: name of the function, for the message.
        options: the options that were given.
        names: the options that exist.

    Raises:
        TypeError: an unknown option; the message names the nearest existing one.
    """
    for name in options:
        if name not in names:
            raise TypeError(f"{function}() got an unexpected keyword argument {name!r}; {nearest(name, names)}")
