"""Rules: which scheme a layer gets, and which layers are left alone. The same values in Python and in a recipe.

Rules are read from top to bottom, and **the last rule that matches a layer decides**; a layer that no rule matches gets the
scheme of the run. ``match`` is a glob over whole layer names (``*.mlp.down_proj``); the end of a name without a wildcard
(``down_proj``, ``mlp.down_proj``); or, after ``re:``, a regular expression over whole names.

Layers outside the decoder blocks stay in float unless a rule names one in full (``lm_head``). Two words stand for them in any
model: ``embedding``, the input embedding, and ``head``, the output head. Where the two are tied, one speaks for both.

    rules:
      - {match: "*.down_proj", scheme: w8a16}
      - {match: "model.layers.0.*", skip: true}
      - {match: head, scheme: w8a16}
"""

import dataclasses
import fnmatch
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BeforeValidator, Field, Strict
from pydantic import model_validator as whole
from pydantic_core import PydanticCustomError

from quantkit.errors import SpecError
from quantkit.presets import preset
from quantkit.spec import QuantSpec, Scheme
from quantkit.system.settings import Flag, settings

EMBEDDING, HEAD = "embedding", "head"
"""What a rule calls the two ends of any model."""

Text = Annotated[str, Strict()]
GroupSize = Annotated[int, Strict(), Field(le=10**9)]


@settings(SpecError)
class SchemeChoice:
    """A scheme that is completed by the layers it applies to: a preset, or a weight grid spelled out.

    Exactly one of ``name``, ``dtype``, ``bits`` and ``full`` is given.

    Args:
        name: preset such as ``"w4a16-asym"``, see :func:`quantkit.presets.preset`.
        dtype: dtype of the weight grid, e.g. ``"int4"``.
        bits: the same for integers, 2 to 8.
        group_size: input channels that share a scale; -1 is one scale per channel; None chooses by the layers' sizes.
        symmetric: overrides the preset's.
        scale_dtype: dtype of stored scales; None takes the model's.
        full: a whole :class:`~quantkit.spec.Scheme`, taken as it is.

    Raises:
        SpecError: none or several of the four; an unknown name; group sizes that disagree.
    """

    name: Text | None = None
    dtype: Text | None = None
    bits: Annotated[int, Strict(), Field(ge=2, le=8)] | None = None
    group_size: GroupSize | None = None
    symmetric: Flag | None = None
    scale_dtype: Text | None = None
    full: Any = Field(default=None, repr=False)

    @whole(mode="after")
    def _names_one(self) -> "SchemeChoice":
        given = [key for key in ("name", "dtype", "bits", "full") if getattr(self, key) is not None]
        if len(given) != 1:
            message = "a scheme wants exactly one of name, dtype, bits; got {got}"
            raise PydanticCustomError("scheme", message, {"got": ", ".join(given) or "none"})
        try:
            self.resolve((), None, "float16")
        except SpecError as error:
            raise PydanticCustomError("scheme", "{why}", {"why": str(error)}) from None
        return self

    def __repr__(self) -> str:
        given = {f.name: value for f in dataclasses.fields(self) if (value := getattr(self, f.name)) is not None}
        return f"SchemeChoice({', '.join(f'{name}={value!r}' for name, value in given.items())})"

    def resolve(self, in_features: Iterable[int], group_size: int | None, scale_dtype: str) -> Scheme:
        """Return the scheme for layers of these input sizes; the other two apply where the choice does not say its own.

        Raises:
            SpecError: an unknown preset or dtype, or two group sizes that disagree.
        """
        if self.full is not None:
            return self._as_it_is(group_size)
        group = self.group_size if self.group_size is not None else group_size
        dtype = self.scale_dtype or scale_dtype
        name = self.name or f"w{self.bits or QuantSpec(str(self.dtype)).bits}a16"
        found = preset(name, in_features, group_size=group, symmetric=self.symmetric, scale_dtype=dtype)
        return Scheme(dataclasses.replace(found.weight, dtype=self.dtype)) if self.dtype else found

    @property
    def chooses_group(self) -> bool:
        """Whether the group size is left to be chosen by the layers' input sizes."""
        if self.full is not None or self.group_size is not None:
            return False
        first, second = (self.resolve([size], None, "float16").weight.group_size for size in (128, 64))
        return first != second

    def _as_it_is(self, group_size: int | None) -> Scheme:
        if not isinstance(self.full, Scheme):
            raise SpecError(f"scheme is a {type(self.full).__name__}; want a preset name or a quantkit.Scheme")
        given = {self.group_size, group_size} - {None, self.full.weight.group_size}
        if given or self.symmetric is not None:
            raise SpecError("group_size and symmetric go with a preset name; a full Scheme already says both")
        return self.full


def as_choice(value: object) -> object:
    """Return what pydantic makes a :class:`SchemeChoice` of: a mapping for a preset name or a full scheme."""
    if isinstance(value, str):
        return {"name": value}
    if isinstance(value, Scheme):
        return {"full": value}
    if value is not None and not isinstance(value, dict | SchemeChoice):
        raise ValueError("want a preset name such as 'w4a16', or a quantkit.Scheme")
    return value


if TYPE_CHECKING:
    SchemeLike = str | Scheme | SchemeChoice
else:
    SchemeLike = Annotated[SchemeChoice, BeforeValidator(as_choice)]
"""A preset name, a full scheme, or a :class:`SchemeChoice`; a checked value is always the last."""


def choice_of(scheme: str | Scheme | SchemeChoice) -> SchemeChoice:
    """Return the :class:`SchemeChoice` that a user's scheme stands for.

    Raises:
        SpecError: an unknown preset name, or something that is no scheme.
    """
    if isinstance(scheme, SchemeChoice):
        return scheme
    return SchemeChoice(name=scheme) if isinstance(scheme, str) else SchemeChoice(full=scheme)


@settings(SpecError)
class Rule:
    """What happens to the layers whose name ``match`` fits: another ``scheme``, another ``group_size``, or ``skip``.

    >>> Rule("*.mlp.down_proj", "w8a16")  # doctest: +SKIP
    >>> Rule("model.layers.0.*", skip=True)  # doctest: +SKIP

    Args:
        match: which layers; see :mod:`quantkit.pipeline.rules`.
        scheme: preset name or scheme; None keeps the run's.
        group_size: input channels that share a scale; -1 is one scale per channel.
        skip: leave the layers in float.

    Raises:
        SpecError: nothing or a contradiction is said, or ``match`` is not a regular expression.
    """

    match: Text
    scheme: SchemeLike | None = None
    group_size: GroupSize | None = None
    skip: Flag = False

    @whole(mode="after")
    def _says_something(self) -> "Rule":
        if self.skip == (self.scheme is not None or self.group_size is not None):
            raise PydanticCustomError("rule", "a rule wants either skip: true, or a scheme or group_size", {})
        if self.match.startswith("re:"):
            try:
                re.compile(self.match[3:])
            except re.error as error:
                raise PydanticCustomError("rule", "match: not a regular expression: {why}", {"why": str(error)}) from None
        return self

    def fits(self, name: str) -> bool:
        """Return whether the rule applies to a layer name."""
        if self.match.startswith("re:"):
            return re.fullmatch(self.match[3:], name) is not None
        return fnmatch.fnmatchcase(name, self.match) or name.endswith(f".{self.match}")
