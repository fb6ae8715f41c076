"""What a recipe may say in one word or in several: a scheme, a quantizer, a transform. Sections that others are made of."""

import dataclasses
import re
from collections.abc import Iterable
from typing import Annotated, Any, Self, cast

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from quantkit.errors import SpecError, nearest
from quantkit.quantizers.base import QUANTIZERS, Quantizer
from quantkit.registry import Registry
from quantkit.spec import QuantSpec, Scheme, preset
from quantkit.transforms.base import TRANSFORMS, Transform


class Section(BaseModel):
    """A mapping of the recipe: unknown keys are errors that name the nearest known key, types are not guessed."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class SchemeChoice(Section):
    """A preset by ``name``, or a weight grid spelled out: ``{dtype: int4, group_size: 64, symmetric: false}``."""

    name: str | None = None
    dtype: str | None = None
    bits: Annotated[int, Field(ge=2, le=8)] | None = None
    group_size: int | None = None
    symmetric: bool | None = None
    scale_dtype: str | None = None

    @model_validator(mode="after")
    def _one_way(self) -> "SchemeChoice":
        given = [key for key in ("name", "dtype", "bits") if getattr(self, key) is not None]
        if len(given) != 1:
            raise PydanticCustomError(
                "scheme", "a scheme wants exactly one of name, dtype, bits; got {got}", {"got": ", ".join(given) or "none"}
            )
        try:
            self.resolve((), None, "float16")
        except SpecError as error:
            raise PydanticCustomError("scheme", "{why}", {"why": str(error)}) from None
        return self

    def resolve(self, in_features: Iterable[int], group_size: int | None, scale_dtype: str) -> Scheme:
        """Return the scheme for sites of these input sizes; the other two apply where the choice does not say its own.

        Raises:
            SpecError: for an unknown preset or dtype, or for two group sizes that disagree.
        """
        group = self.group_size if self.group_size is not None else group_size
        dtype = self.scale_dtype or scale_dtype
        name = self.name or f"w{self.bits or QuantSpec(str(self.dtype)).bits}a16"
        found = preset(name, in_features, group_size=group, symmetric=self.symmetric, scale_dtype=dtype)
        return Scheme(dataclasses.replace(found.weight, dtype=self.dtype)) if self.dtype else found

    @property
    def fixes_group(self) -> bool:
        """Whether the choice itself says its group size."""
        return self.group_size is not None or bool(self.name and re.search(r"-g\d+$|-channel$", self.name))


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


class QuantizerChoice(Choice):
    """A quantizer by ``name``, with ``options``."""

    name: str = "gptq"

    def build(self) -> Quantizer:
        """Return the quantizer."""
        return cast(Quantizer, self._build(QUANTIZERS))


class TransformChoice(Choice):
    """A transform by ``name``, with ``options``."""

    def build(self) -> Transform:
        """Return the transform."""
        return cast(Transform, self._build(TRANSFORMS))
