"""Settings: frozen dataclasses that check themselves, from Python and from a recipe alike.

A class decorated with :func:`settings` is a pydantic dataclass: types are not guessed, bounds stand beside the field
(``Annotated[int, Field(gt=0)]``), an unknown name is an error. Called from Python, a mistake is the project's own error in one
line; inside a recipe the same checks report the line and column.
"""

import functools
from collections.abc import Callable
from typing import Annotated, Any, TypeVar, cast, dataclass_transform

from pydantic import ConfigDict, Field, Strict, ValidationError
from pydantic.dataclasses import dataclass as checked_dataclass

from quantkit.errors import QuantkitError, nearest

T = TypeVar("T")

NotNegative = Annotated[int, Strict(), Field(ge=0, le=10**9)]
Positive = Annotated[int, Strict(), Field(gt=0, le=10**9)]
AtLeastTwo = Annotated[int, Strict(), Field(gt=1, le=10**9)]
Flag = Annotated[bool, Strict()]

_CONFIG = ConfigDict(extra="forbid", strict=False, arbitrary_types_allowed=True)  # strict would refuse a recipe's mapping


@dataclass_transform(frozen_default=True)
def settings(error: type[QuantkitError] = QuantkitError) -> Callable[[type[T]], type[T]]:
    """Return a decorator that makes a frozen dataclass whose values are checked when it is made.

    Args:
        error: class of the exception that a caller from Python gets.
    """

    def decorate(cls: type[T]) -> type[T]:
        made = cast(type[T], checked_dataclass(frozen=True, config=_CONFIG)(cls))
        checked: Callable[..., None] = made.__init__

        @functools.wraps(checked)
        def init(self: Any, *args: Any, **values: Any) -> None:
            try:
                checked(self, *args, **values)
            except ValidationError as mistakes:
                raise error(explain(made, mistakes)) from None

        made.__init__ = init  # type: ignore[method-assign]
        return made

    return decorate


def explain(cls: type, mistakes: ValidationError) -> str:
    """Return what is wrong with the arguments of a settings class, one line per mistake."""
    lines = []
    for one in mistakes.errors(include_url=False):
        first, *rest = one["loc"] or ("",)
        first = list(cls.__dataclass_fields__)[first] if isinstance(first, int) else first  # type: ignore[attr-defined]
        name = ".".join(map(str, (first, *rest)))
        if one["type"] == "unexpected_keyword_argument":
            lines.append(f"{cls.__name__} has no setting {name!r}; {nearest(name, cls.__dataclass_fields__)}")  # type: ignore[attr-defined]
        else:
            place = f"{cls.__name__}({name}={one['input']!r})" if name else cls.__name__
            lines.append(f"{place}: {one['msg'].removeprefix('Value error, ')}")
    return "\n".join(lines)
