"""Recipes: one YAML file says what is quantized, how, from which data, to where, and what is measured afterwards.

A recipe is checked twice, both times before any long work. :func:`load_recipe` checks the text: an unknown key, a wrong
type, a duplicate key or an unknown quantizer is an error with file, line, column and the nearest known name.
:meth:`Recipe.resolve` checks it against the model: it decides for every site, and fails for a rule that matches nothing
and for a group size that does not divide.

Rules are read from top to bottom, and **the last rule that matches a site decides**; a site that no rule matches gets the
recipe's own ``scheme``. ``match`` is a glob over whole site names (``*.mlp.down_proj``), or a regular expression over whole
names after ``re:``. Sites outside the decoder layers, such as an output head, are quantized only if a rule names them in
full, without a wildcard.

The input embedding and the output head stay in float unless ``embedding`` or ``head`` give them a scheme; where the two are
tied, one speaks for both.

    scheme: w4a16
    rules:
      - match: "*.down_proj"
        scheme: w8a16
      - match: "model.layers.0.*"
        skip: true

A preset without a group size takes the largest of 128, 64 and 32 that divides every site it ends up applying to.
"""

import difflib
import fnmatch
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic_core import PydanticCustomError

from quantkit.errors import RecipeError, SpecError, nearest
from quantkit.nn.sites import Site, Structure
from quantkit.pipeline.distill import Distill
from quantkit.pipeline.plan import plan_ends
from quantkit.recipe.choices import QuantizerChoice, SchemeChoice, Section, TransformChoice
from quantkit.recipe.yaml import Located, read_located
from quantkit.spec import Plan, Scheme

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Positive = Annotated[int, Field(gt=0)]
AtLeastTwo = Annotated[int, Field(gt=1)]


class Rule(Section):
    """What happens to the sites whose name ``match`` fits: another ``scheme``, another ``group_size``, or ``skip``."""

    match: str
    scheme: SchemeChoice | None = None
    group_size: int | None = None
    skip: bool = False

    _name = field_validator("scheme", mode="before")(lambda value: {"name": value} if isinstance(value, str) else value)

    @model_validator(mode="after")
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
        """Return whether the rule applies to a site name."""
        if self.match.startswith("re:"):
            return re.fullmatch(self.match[3:], name) is not None
        return fnmatch.fnmatchcase(name, self.match)


class Calibration(Section):
    """Token batches: ``samples`` windows of ``length`` tokens from ``data`` (None: text that every Python carries).

    ``mode`` is ``packed`` (one stream cut in windows) or ``ragged`` (one text per row).
    """

    data: str | list[str] | None = None
    samples: Positive = 128
    length: AtLeastTwo = 512
    batch_size: Positive = 8
    mode: Literal["packed", "ragged"] = "packed"


class Distillation(Section):
    """Scales learned end to end after quantizing; see :mod:`quantkit.pipeline.distill`."""

    steps: Positive = Distill.steps
    windows: Positive = Distill.windows
    rate: Annotated[float, Field(gt=0, lt=1)] = Distill.rate
    code_rate: Annotated[float, Field(ge=0, lt=1)] = Distill.code_rate
    dtype: Literal["auto", "float32", "bfloat16"] = Distill.dtype
    seed: int = Distill.seed

    def build(self) -> Distill:
        """Return the settings that :func:`quantkit.quantize` takes."""
        return Distill(**self.model_dump())


class Output(Section):
    """Where the checkpoint goes, and in which format."""

    path: str
    format: str = "compressed-tensors"
    overwrite: bool = False


class Evaluation(Section):
    """Measurement after quantizing: ``windows`` of ``length`` tokens; ``against: base`` adds KL to the original model."""

    data: str | list[str] | None = None
    windows: Positive = 16
    length: AtLeastTwo = 512
    against: Literal["base", "none"] = "base"
    latency: bool = True


@dataclass(frozen=True, slots=True)
class Resolution:
    """A recipe applied to a model.

    Attributes:
        plan: site name to scheme, in model order.
        skipped: names of sites that stay as they are, with the reason.
        notes: choices made for the user, to be told to the user.
    """

    plan: Plan
    skipped: dict[str, str]
    notes: tuple[str, ...]


class Recipe(Section):
    """A whole recipe; see the module's text for the meaning of rules."""

    model: str
    dtype: Dtype = "auto"
    scheme: SchemeChoice = SchemeChoice(name="w4a16")
    group_size: int | None = None
    embedding: SchemeChoice | None = None
    head: SchemeChoice | None = None
    transforms: list[TransformChoice] = Field(default_factory=list)
    quantizer: QuantizerChoice = Field(default_factory=QuantizerChoice)
    distill: Distillation | None = None
    rules: list[Rule] = Field(default_factory=list)
    calibration: Calibration = Calibration()
    output: Output
    evaluate: Evaluation | None = None
    strict: bool = False
    resume: bool = True

    _name = field_validator("scheme", "embedding", "head", "quantizer", mode="before")(
        lambda value: {"name": value} if isinstance(value, str) else value
    )

    _names = field_validator("transforms", mode="before")(
        lambda value: [{"name": one} if isinstance(one, str) else one for one in value] if isinstance(value, list) else value
    )

    def resolve_plan(self, structure: Structure, scale_dtype: str = "float16") -> Plan:
        """Return site name to scheme for a model; see :meth:`resolve`."""
        return self.resolve(structure, scale_dtype).plan

    def resolve(self, structure: Structure, scale_dtype: str = "float16") -> Resolution:
        """Decide for every site of a model what happens to it.

        Args:
            structure: what :func:`quantkit.hf.structure.describe` found.
            scale_dtype: dtype of stored scales, for schemes that do not say their own.

        Raises:
            RecipeError: a rule matches no site, or every site is skipped.
            SpecError: a group size does not divide a site's input.
        """
        owner = self._owners(structure)
        outside = {site.name for site in structure.outside}
        schemes: dict[str, Scheme] = {}
        skipped: dict[str, str] = {}
        notes: list[str] = []
        sites = [*structure.sites, *structure.outside]
        for index in (-1, *range(len(self.rules))):
            mine = [site for site in sites if owner[site.name] == index and (index >= 0 or site.name not in outside)]
            rule = self.rules[index] if index >= 0 else None
            label = f"rule {index + 1} ({rule.match!r})" if rule else "scheme"
            if rule and rule.skip:
                skipped |= {site.name: f"skipped by {label}" for site in mine}
            elif mine:
                scheme, note = self._scheme_for(rule, mine, label, scale_dtype)
                schemes |= {site.name: scheme for site in mine}
                notes += [note] if note else []
            elif rule:
                notes.append(f"{label} has no effect: later rules decide every site it matches")
        schemes |= self._ends(structure, scale_dtype)
        unnamed = [name for name in outside if owner[name] < 0 and name not in schemes]
        skipped |= dict.fromkeys(unnamed, "outside the decoder layers, not named by a rule")
        plan = {site.name: schemes[site.name] for site in (*structure.sites, *structure.after) if site.name in schemes}
        if not plan:
            raise RecipeError(
                f"nothing to quantize: the model has {len(sites)} sites and none is left after rules; remove a skip rule"
            )
        return Resolution(plan, skipped, tuple(notes))

    def _ends(self, structure: Structure, scale_dtype: str) -> dict[str, Scheme]:
        """Return the schemes of embedding and head."""
        table = [structure.embedding.in_features] if structure.embedding else []
        features = [*table, *(site.in_features for site in structure.outside if site.name == structure.head)]
        ends = (self.embedding, self.head)
        embedding, head = (None if one is None else one.resolve(features, None, scale_dtype) for one in ends)
        return plan_ends(structure, embedding, head)

    def _owners(self, structure: Structure) -> dict[str, int]:
        """Return site name to the index of the rule that decides it, -1 for the recipe's own scheme."""
        inside, outside = [s.name for s in structure.sites], [s.name for s in structure.outside]
        owner = dict.fromkeys([*inside, *outside], -1)
        for index, rule in enumerate(self.rules):
            hits = [name for name in inside if rule.fits(name)] + [name for name in outside if name == rule.match]
            if not hits:
                raise RecipeError(
                    f"rules[{index}]: match {rule.match!r} matches no site; closest: {_closest(rule.match, list(owner))}"
                )
            owner.update(dict.fromkeys(hits, index))
        return owner

    def _scheme_for(self, rule: Rule | None, sites: Sequence[Site], label: str, scale_dtype: str) -> tuple[Scheme, str | None]:
        """Return the scheme of the sites a rule decides, and what to tell the user about an automatic group size."""
        choice = rule.scheme if rule and rule.scheme else self.scheme
        group = rule.group_size if rule and rule.group_size is not None else None if rule and rule.scheme else self.group_size
        scheme = choice.resolve([site.in_features for site in sites], group, scale_dtype)
        bad = [(site, reason) for site in sites if (reason := scheme.weight.rejects(site.shape))]
        if bad:
            more = f" (and {len(bad) - 1} more sites)" if len(bad) > 1 else ""
            raise SpecError(f"{bad[0][0].name}: {bad[0][1]}{more}; set by {label}; or leave group_size out to have one chosen")
        if group is not None or choice.fixes_group:
            return scheme, None
        sizes = sorted({site.in_features for site in sites})
        size = scheme.weight.group_size
        chosen = (
            f"group size {size}: the largest of 128, 64, 32 that divides"
            if size > 0
            else "one scale per channel: no group divides"
        )
        return scheme, f"{label}: {chosen} every input size of its {len(sites)} sites ({', '.join(map(str, sizes[:6]))})"


def _closest(pattern: str, names: list[str]) -> str:
    """Return the three site names most like a pattern, layer numbers aside."""
    literal = re.sub(r"^re:|[\\*?\[\]^$()+|]", "", pattern)
    ranked = sorted(names, key=lambda name: -difflib.SequenceMatcher(None, literal, name).ratio())
    kinds: dict[str, str] = {}
    for name in ranked:
        kinds.setdefault(re.sub(r"\d+", "N", name), name)
    return ", ".join(list(kinds.values())[:3]) or "none (the model has no sites)"


def load_recipe(path: str | Path, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Read and check a recipe file.

    Args:
        path: a YAML file.
        overrides: dotted key to value, applied over the file: ``{"calibration.samples": 8}``.

    Raises:
        RecipeError: with file, line and column, for anything that is not a valid recipe.
    """
    source = read_located(path)
    for key, value in (overrides or {}).items():
        _override(source.data, key, value)
    try:
        return Recipe.model_validate(source.data)
    except ValidationError as error:
        raise RecipeError(_explain(error, source, overrides or {})) from None


def _override(data: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        if isinstance(data.get(parent), str):
            data[parent] = {"name": data[parent]}
        data = data.setdefault(parent, {})
        if not isinstance(data, dict):
            raise RecipeError(f"--set {key}: {parent!r} is not a mapping")
    data[last] = value


def _explain(error: ValidationError, source: Located, overrides: Mapping[str, Any]) -> str:
    """Return one line per mistake: place, dotted key, what is wrong, what was given."""
    lines = []
    for item in error.errors(include_url=False):
        keys, message = item["loc"], item["msg"].removeprefix("Value error, ")
        dotted = ".".join(map(str, keys)) or "recipe"
        if item["type"] == "extra_forbidden":
            message = f"unknown key; {nearest(str(keys[-1]), _section_at(keys[:-1]).model_fields)}"
        elif item["type"] == "missing":
            message = "is missing"
        elif not isinstance(item["input"], dict | list | Section):
            message += f"; got {item['input']!r}"
        blamed = [key for key in overrides if f"{key}.".startswith(f"{dotted}.") or f"{dotted}.".startswith(f"{key}.")]
        place = f"--set {blamed[0]}" if blamed else source.place(keys)
        lines.append(f"{place}: {dotted}: {message}")
    return "\n".join(lines)


def _section_at(keys: Sequence[Any]) -> type[Section]:
    """Return the section that a path of keys leads to."""
    section: type[Section] = Recipe
    for key in keys:
        annotation = section.model_fields[key].annotation if isinstance(key, str) else None
        kinds = [kind for kind in (annotation, *get_args(annotation)) if isinstance(kind, type) and issubclass(kind, Section)]
        section = kinds[0] if kinds else section
    return section
