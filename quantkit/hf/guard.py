"""What transformers raises about a bad config or file, as one error of ours that names the source.

A config is data from anywhere, and transformers uses it in hundreds of places: a wrong type, an unknown word or a size of zero
comes back as any exception there is, RecursionError and AssertionError among them, without a word about the file.
"""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

from transformers import PretrainedConfig

from quantkit.errors import QuantkitError

Result = TypeVar("Result")


def names_source(doing: str) -> Callable[[Callable[..., Result]], Callable[..., Result]]:
    """Return a decorator for a function whose first argument is a source, or the config of one.

    Args:
        doing: what fails, e.g. ``"cannot read the config of"``; the source is appended.
    """

    def decorate(function: Callable[..., Result]) -> Callable[..., Result]:
        @functools.wraps(function)
        def guarded(source: Any, /, *args: Any, **options: Any) -> Result:
            try:
                return function(source, *args, **options)
            except (QuantkitError, MemoryError):
                raise
            except Exception as error:  # see above: there is no list of what it may be
                text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
                raise QuantkitError(
                    f"{doing} {_name(source)}: {text}; look for a wrong value in its config.json, or give another source"
                ) from error

        return guarded

    return decorate


def _name(source: Any) -> str:
    if isinstance(source, PretrainedConfig):
        return source.name_or_path or f"a {source.model_type}"
    return type(source).__name__ if isinstance(source, dict) else str(source)
