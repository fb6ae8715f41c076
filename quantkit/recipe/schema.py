"""Recipes: one YAML file says what is quantized, how, from which data, to where, and what is measured afterwards.

The keys are the arguments of :func:`quantkit.quantize`, and the sections are its settings: one definition checks both.
A recipe is checked twice, both times before any long work. :func:`load_recipe` checks the text: an unknown key, a wrong
type, a duplicate key or an unknown quantizer is an error with file, line, column and the nearest known name.
:meth:`Recipe.resolve` checks it against the model: it decides for every layer, and fails for a rule that matches nothing
and for a group size that does not divide. What rules mean: :mod:`quantkit.pipeline.rules`.

    model: demo
    scheme: w4a16-asym
    method: gptq
    steps: [awq, {name: distill, options: {steps: 64}}]
    rules:
      - {match: "*.down_proj", scheme: w8a16}
      - {match: head, scheme: w8a16}
    calibration: {samples: 128, length: 512}
    output: {path: runs/mixed}

Several outputs are a list, ``output: [{path: runs/gptq, format: gptq}, {path: runs/mlx, format: mlx}]``: the same codes, each
read back and compared. With a section ``train`` the result is trained afterwards, as by :func:`quantkit.train`:
``train: {steps: 200, windows: 4}``.
A scheme may also be searched: ``scheme: {budget: 4.25 bpw, choices: [w3a16-asym-g64, w4a16-asym-g64, w8a16]}``.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, get_args, get_type_hints

from pydantic import BeforeValidator, Field, ValidationError, ValidatorFunctionWrapHandler, WrapValidator, field_validator
from pydantic_core import ArgsKwargs, PydanticCustomError

from quantkit.calibrate.data import Calibration
from quantkit.errors import RecipeError, SpecError, nearest
from quantkit.mixed.recorded import Searched
from quantkit.nn.sites import Structure
from quantkit.pipeline.plan import Resolution, make_plan
from quantkit.pipeline.rules import Rule, SchemeChoice, SchemeLike
from quantkit.pipeline.settings import Output, Outputs, Run
from quantkit.pipeline.training.settings import Training
from quantkit.recipe.choices import MethodChoice, Section, StepChoice, by_name
from quantkit.recipe.yaml import MOST_DEPTH, Located, read_located
from quantkit.spec import Scheme
from quantkit.system.settings import AtLeastTwo, Positive

Dtype = Literal["auto", "float32", "bfloat16", "float16"]

SectionT = TypeVar("SectionT", bound=Section)


class Evaluation(Section):
    """Measurement after quantizing: ``windows`` of ``length`` tokens; ``against: base`` adds KL to the original model."""

    data: str | list[str] | list[dict[str, Any]] | None = None
    column: str | None = None
    template: str | None = None
    windows: Positive = 16
    length: AtLeastTwo = 512
    against: Literal["base", "none"] = "base"
    latency: bool = True


def _or_searched(value: object, check: ValidatorFunctionWrapHandler) -> object:
    """Return what a mapping with a budget means; anything else is what a scheme may be."""
    if isinstance(value, Searched):
        return value
    if not isinstance(value, dict) or "budget" not in value:
        return check(value)
    try:
        return Searched(**{str(key): one for key, one in value.items()})
    except SpecError as error:
        raise ValueError(str(error)) from None


if TYPE_CHECKING:
    AnyScheme = str | Scheme | SchemeChoice | Searched
else:
    AnyScheme = Annotated[SchemeLike, WrapValidator(_or_searched)]
"""What a scheme may be, or a budget within which one is searched for every layer."""


class Recipe(Section):
    """A whole recipe."""

    model: str
    dtype: Dtype = "auto"
    scheme: AnyScheme = SchemeChoice(name="w4a16")
    method: Annotated[MethodChoice, BeforeValidator(by_name)] = MethodChoice()
    steps: list[Annotated[StepChoice, BeforeValidator(by_name)]] = Field(default_factory=list)
    rules: list[Rule] = Field(default_factory=list)
    calibration: Calibration = Calibration()
    output: Outputs
    run: Run = Run()
    train: Training | None = None
    evaluate: Evaluation | None = None

    @field_validator("output")
    @classmethod
    def _has_a_place(cls, output: Output) -> Output:
        if output.path is None:
            raise PydanticCustomError("output", "path is missing", {})
        return output

    def resolve(self, structure: Structure, scale_dtype: str = "float16") -> Resolution:
        """Decide for every layer of a model what happens to it; see :func:`quantkit.pipeline.plan.make_plan`.

        Raises:
            RecipeError: the scheme is searched, which takes the weights.
        """
        if isinstance(self.scheme, Searched):
            raise RecipeError(f"scheme: searched within {self.scheme.budget}, which takes the model's weights; use run_recipe")
        return make_plan(structure, self.scheme, self.rules, scale_dtype=scale_dtype)


MOVED = {
    "quantizer": "method",
    "transforms": "steps",
    "distill": "steps: [{name: distill, options: {...}}]",
    "embedding": "rules: [{match: embedding, scheme: ...}]",
    "head": "rules: [{match: head, scheme: ...}]",
    "strict": "run: {strict: true}",
    "resume": "run: {resume: false}",
    "group_size": "scheme: {name: ..., group_size: ...}",
}
"""Keys that other tools and older recipes use at the top, and how to say it."""


MOST_MISTAKES = 12
"""So many mistakes are listed at once."""


def load_recipe(path: str | Path, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Read and check a recipe file.

    Args:
        path: a YAML file.
        overrides: dotted key to value, applied over the file: ``{"calibration.samples": 8}``.

    Raises:
        RecipeError: with file, line and column, for anything that is not a valid recipe.
    """
    return load_as(Recipe, path, overrides, moved=MOVED)


def load_as(
    kind: type[SectionT], path: str | Path, overrides: Mapping[str, Any] | None = None, *, moved: Mapping[str, str]
) -> SectionT:
    """Read and check a YAML file that holds one mapping of a ``kind``; the rest as for :func:`load_recipe`.

    Args:
        moved: keys that are none at the top, and how to say what they mean.
    """
    source = read_located(path)
    for key, value in (overrides or {}).items():
        _override(source.data, key, value)
    try:
        return kind.model_validate(source.data)
    except ValidationError as error:
        raise RecipeError(_explain(error, source, overrides or {}, kind, moved)) from None


def recipe_of(data: Mapping[str, Any], kind: type[SectionT] = Recipe) -> SectionT:  # type: ignore[assignment]  # mypy: 3812
    """Return the recipe, or another ``kind`` of one, that a mapping says, as a file would.

    Raises:
        RecipeError: with the key, for anything that is not a valid recipe.
    """
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        dotted = ".".join(map(str, first["loc"])) or "recipe"
        raise RecipeError(f"{dotted}: {first['msg'].removeprefix('Value error, ')}") from None


def _override(data: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    if len(parents) > MOST_DEPTH:
        raise RecipeError(f"--set {key}: {len(parents)} levels; a recipe has at most {MOST_DEPTH}")
    for parent in parents:
        if isinstance(data.get(parent), str):
            data[parent] = {"name": data[parent]}
        data = data.setdefault(parent, {})
        if not isinstance(data, dict):
            raise RecipeError(f"--set {key}: {parent!r} is not a mapping")
    data[last] = value


def _explain(
    error: ValidationError, source: Located, overrides: Mapping[str, Any], kind: type[Section], moved: Mapping[str, str]
) -> str:
    """Return one line per mistake: place, dotted key, what is wrong, what was given."""
    lines = []
    found = error.errors(include_url=False)
    for item in found[:MOST_MISTAKES]:
        keys, message = item["loc"], item["msg"].removeprefix("Value error, ")
        dotted = ".".join(map(str, keys)) or "recipe"
        if item["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
            key = str(keys[-1])
            said = f"write {moved[key]}" if len(keys) == 1 and key in moved else ""
            message = f"unknown key; {said or nearest(key, _names_at(kind, keys[:-1]))}"
        elif item["type"] == "missing":
            message = "is missing"
        elif not isinstance(item["input"], dict | list | Section | Output | ArgsKwargs):
            message += f"; got {item['input']!r}"
        blamed = [key for key in overrides if f"{key}.".startswith(f"{dotted}.") or f"{dotted}.".startswith(f"{key}.")]
        place = f"--set {blamed[0]}" if blamed else source.place(_in_file(keys, source.data))
        lines.append(f"{place}: {dotted}: {message}")
    lines += [f"and {len(found) - MOST_MISTAKES} more mistakes"] if len(found) > MOST_MISTAKES else []
    return "\n".join(lines)


def _in_file(keys: Sequence[Any], data: Mapping[str, Any]) -> Sequence[Any]:
    """Return where a file has what a recipe has at ``keys``: a list of outputs is the first with the others in it."""
    outputs = data.get("output")
    if keys[:1] != ("output",) or not isinstance(outputs, list) or not outputs:
        return keys
    return ("output", keys[2] + 1, *keys[3:]) if keys[1:2] == ("also",) and len(keys) > 2 else ("output", 0, *keys[1:])


def _names_at(section: type, keys: Sequence[Any]) -> list[str]:
    """Return the keys that the section at the end of a path of keys through another may have."""
    for key in keys:
        if isinstance(key, str):
            sections = [kind for kind in _kinds(get_type_hints(section).get(key)) if _is_section(kind)]
            section = sections[0] if sections else section
    return list(get_type_hints(section))


def _is_section(kind: type) -> bool:
    return issubclass(kind, Section) or dataclasses.is_dataclass(kind)


def _kinds(annotation: Any) -> Iterator[type]:
    """Yield the classes that an annotation names, inside lists and unions too."""
    if isinstance(annotation, type) and not get_args(annotation):
        yield annotation
    for one in get_args(annotation):
        yield from _kinds(one)
