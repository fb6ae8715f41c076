"""Which modules a checkpoint's config names: by their full names, or by regular expressions after ``re:``.

A checkpoint comes from anywhere, and there are regular expressions whose search takes longer than the age of the universe, such
as ``(([a-z._0-9])+)+!``. So a search that takes long is ended, as is a config whose searches take long together. The
expressions are those of Python; names are compared without searching, since a config may list tens of thousands.
"""

import time
from collections.abc import Iterable

import regex

from quantkit.errors import FormatError

SEARCH_S = 0.25
"""Longest time for one name and one expression; usual ones take microseconds."""
ALL_SEARCHES_S, PER_SEARCH_S = 5.0, 20e-6
"""Longest time for all searches of one config: a fixed part, and one for every search."""
MAX_EXPRESSIONS = 1000
"""Most regular expressions of a list."""
MAX_CHARACTERS = 100_000
"""Longest regular expression."""


class SearchTime:
    """The time that is left for the searches of one config."""

    def __init__(self) -> None:
        self._left_s = ALL_SEARCHES_S

    def matches(self, expression: "regex.Pattern[str]", name: str) -> bool:
        """Return whether ``expression`` matches the beginning of ``name``.

        Raises:
            FormatError: the search takes too long.
        """
        started = time.perf_counter()
        try:
            found = expression.match(name, timeout=SEARCH_S) is not None
        except TimeoutError:
            found, self._left_s = False, 0.0
        self._left_s += PER_SEARCH_S - (time.perf_counter() - started)
        if self._left_s <= 0:
            raise FormatError(
                f"the regular expression {expression.pattern[:100]!r} takes too long for module {name}; "
                "write it without nested repetitions, or list the modules"
            )
        return found


class ModulePatterns:
    """Names of modules, and regular expressions for them.

    Args:
        patterns: ``re:`` and an expression that matches the beginning of a name, or a full name.
        clock: the time for searches, which configs share among their patterns.
        everything: names that stand for every module.

    Raises:
        FormatError: too many expressions, or one that is wrong or too long.
    """

    def __init__(self, patterns: Iterable[str], clock: SearchTime, everything: frozenset[str] = frozenset()) -> None:
        listed = list(patterns)
        self._names = frozenset(pattern for pattern in listed if not pattern.startswith("re:"))
        expressions = [pattern.removeprefix("re:") for pattern in listed if pattern.startswith("re:")]
        if len(expressions) > MAX_EXPRESSIONS:
            raise FormatError(
                f"{len(expressions)} regular expressions, want at most {MAX_EXPRESSIONS}; list the modules instead"
            )
        self._expressions = [_compile(expression) for expression in expressions]
        self._all, self._clock = bool(self._names & everything), clock

    def match(self, name: str) -> bool:
        """Return whether a module is one of these."""
        known = self._all or name in self._names
        return known or any(self._clock.matches(expression, name) for expression in self._expressions)


def _compile(expression: str) -> "regex.Pattern[str]":
    if len(expression) > MAX_CHARACTERS:
        raise FormatError(f"a regular expression has {len(expression)} characters, want at most {MAX_CHARACTERS}")
    try:
        return regex.compile(expression)
    except (regex.error, RecursionError, OverflowError) as error:
        reason = str(error) or type(error).__name__
        raise FormatError(
            f"quantization_config is malformed: {expression[:100]!r} is not a regular expression: {reason}"
        ) from error
