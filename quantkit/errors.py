"""The exceptions quantkit raises on purpose.

Every message says what is wrong, where (site, file, key), what was found, what was wanted, and a way out.
"""

import difflib
import re
from collections.abc import Iterable

MOST_CHARACTERS = 1600
"""Longest message of an error."""

_LONG_WORD = re.compile(r"\S{241,}")


class QuantkitError(Exception):
    """Base of every error that quantkit raises about its input or environment.

    What a message quotes may be of any length (a path, a number of thousands of digits, another library's error), so a message
    is shortened in its middle to :data:`MOST_CHARACTERS`: what and where stand at its start, the way out at its end.
    """

    def __init__(self, *arguments: object) -> None:
        super().__init__(*(shorten(one) if isinstance(one, str) else one for one in arguments))


def shorten(text: str, limit: int = MOST_CHARACTERS) -> str:
    """Return ``text`` with long words, then a long whole, cut in the middle; says how many characters are left out."""
    text = _LONG_WORD.sub(lambda found: _cut(found[0], 160), text)
    return _cut(text, limit - 40) if len(text) > limit else text


def _cut(text: str, limit: int) -> str:
    tail = limit // 3
    return f"{text[: limit - tail]} ...({len(text) - limit} characters)... {text[-tail:]}"


class SpecError(QuantkitError):
    """A number format or scheme that does not exist, or that does not fit a tensor."""


class RecipeError(QuantkitError):
    """A recipe that cannot be read or that contradicts the model."""


class CalibrationError(QuantkitError):
    """Calibration or evaluation data that is empty, too short, or produced non-finite numbers."""


class FormatError(QuantkitError):
    """A checkpoint that is missing pieces, damaged, or that contradicts its own config."""


class KernelError(QuantkitError):
    """A kernel that cannot be built or does not support the problem it was asked to solve."""


class BusyError(QuantkitError):
    """Another process is at work where this one wants to write."""


class WorkerError(QuantkitError):
    """Another process of the same run is gone, or cannot do what this one does."""


class DiskError(FormatError, OSError):
    """A file or directory that the system refuses to read, write or make. Also an :class:`OSError`, for who expects one."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Phrase a suggestion for an unknown name: ``"did you mean 'gptq'? known: gptq, rtn"``."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}known: {', '.join(names) or 'none'}"
