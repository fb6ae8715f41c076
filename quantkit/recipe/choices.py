"""What a recipe may say in one word or in several: a quantizer, a step."""

import dataclasses
from typing import Any, Self, cast

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError, model_validator

from quantkit.errors import SpecError, nearest
from quantkit.quantizers.base import QUANTIZERS, Quantizer
from quantkit.registry import Registry
from quantkit.transforms.base import TRANSFORMS, Transform


class Section(BaseModel):
    """A mapping of the recipe: unknown keys are errors that name the nearest known key, types are not guessed."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Choice(Section):
    """A member of a plug-in family by ``name``, with ``options`` for its constructor."""

    name: str
    options: dict[str, Any] = {}

    @model_validator(mode="after")
    def _exists(self) -> Self:
        self.build()
        return self

    def build(self) -> Any:
        """Return the member; a bad name, option or value is a ``ValueError`` that says what would be right."""
        raise NotImplementedError

    def _build(self, family: Registry[Any]) -> Any:
        try:
            member = family.get(self.name)
        except SpecError as error:
            raise ValueError(str(error)) from None
        known = {field.name for field in dataclasses.fields(member)}
        for option in self.options:
            if option not in known:
                raise ValueError(f"{family.kind} {self.name!r} has no option {option!r}; {nearest(option, known)}")
        try:
            return TypeAdapter(member).validate_python(self.options)
        except ValidationError as error:
            first = error.errors()[0]
            name = ".".join(map(str, first["loc"]))
            raise ValueError(f"{family.kind} {self.name!r}, option {name}: {first['msg']}; got {first['input']!r}") from None


class MethodChoice(Choice):
    """A quantizer by ``name``, with ``options``."""

    name: str = "gptq"

    def build(self) -> Quantizer:
        """Return the quantizer."""
        return cast(Quantizer, self._build(QUANTIZERS))


class StepChoice(Choice):
    """A step by ``name``, with ``options``."""

    def build(self) -> Transform:
        """Return the step."""
        return cast(Transform, self._build(TRANSFORMS))


def by_name(value: object) -> object:
    """Return the mapping that a name alone stands for."""
    return {"name": value} if isinstance(value, str) else value
