"""From the axes of a sweep to its rows: every product of scheme, quantizer and steps, checked before any long work.

A mistake in an axis (an unknown name, nothing at all, one row twice) is an error that lists all of them. A product that cannot
be, because a quantizer does not choose such numbers or a group size does not divide a layer, is a row that says why not.
"""

import dataclasses
import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

from quantkit.calibrate.collectors import COLLECTORS
from quantkit.errors import QuantkitError, SpecError
from quantkit.mixed import Budget
from quantkit.nn.sites import Structure
from quantkit.pipeline.blocks import needs_of
from quantkit.pipeline.checks import refuse_run
from quantkit.pipeline.plan import Resolution, resolve
from quantkit.pipeline.rules import Rule, SchemeChoice, choice_of
from quantkit.pipeline.settings import Output
from quantkit.pipeline.steps import make_steps
from quantkit.quantizers.base import QUANTIZERS, Quantizer, quantizer_name
from quantkit.spec import Plan, Scheme
from quantkit.sweeps.rows import FLOAT, SweepRow
from quantkit.transforms.base import Step, step_name

SchemeLike = str | Scheme | SchemeChoice | Plan | Resolution
Calibrate = Literal["once", "each"]


@dataclass(frozen=True)
class Entry:
    """A row that is to be made.

    Attributes:
        row: as far as it is known: its names, or why it is skipped.
        method, steps: what makes it; None and empty for the float model.
        resolution: what every layer gets.
        needs: statistics of the float model's inputs that it is quantized with.
    """

    row: SweepRow
    method: Quantizer | None = None
    steps: tuple[Step, ...] = ()
    resolution: Resolution | None = None
    needs: frozenset[str] = frozenset()

    @property
    def id(self) -> str:
        """Name of its files: readable, and different for other settings."""
        said = repr((self.row.scheme, self.row.budget, self.method, self.steps))
        readable = re.sub(r"[^a-z0-9.-]+", "-", self.row.name.lower()).strip("-.")[:60]
        return f"{readable}-{hashlib.sha256(said.encode()).hexdigest()[:8]}"


@dataclass(frozen=True)
class Axes:
    """What is multiplied, checked as far as names go.

    Attributes:
        schemes: name to what :func:`quantkit.quantize` takes as scheme.
        budgets: what plans are searched for.
        choices: the schemes that a plan may give its layers.
        methods: name to quantizer.
        steps: name to steps, in order.
    """

    schemes: dict[str, SchemeLike]
    budgets: tuple[str, ...]
    choices: tuple[str | Scheme | SchemeChoice, ...]
    methods: dict[str, Quantizer]
    steps: dict[str, tuple[Step, ...]]

    @classmethod
    def check(
        cls,
        schemes: Sequence[SchemeLike],
        quantizers: Sequence[str | Quantizer],
        steps: Sequence[Sequence[str | Step]],
        budgets: Sequence[str] = (),
        choices: Sequence[str | Scheme | SchemeChoice] = (),
    ) -> "Axes":
        """Return the axes by name.

        Raises:
            SpecError: everything that is wrong with them, one line each.
        """
        wrong: list[str] = []
        given = {"schemes": schemes, "quantizers": quantizers, "steps": steps, "budgets": budgets, "choices": choices}
        for axis, values in given.items():
            if isinstance(values, str) or not isinstance(values, Sequence):
                wrong.append(f"{axis}: {values!r} is a {type(values).__name__}; want a list, such as [{values!r}]")
        if not wrong:
            wrong += [] if [*schemes, *budgets] else ["schemes and budgets are empty; give at least one, such as 'w4a16'"]
            wrong += [] if [*quantizers] else ["quantizers is empty; give at least one, such as 'gptq'"]
            wrong += [] if [*steps] else ["steps is empty; leave it out, or give variants, such as [[], ['awq']]"]
        if wrong:
            raise SpecError("\n".join(wrong))
        named = [_by_name(f"{axis}", values, name, wrong) for axis, values, name in (
            ("schemes", schemes, _scheme), ("choices", choices, _choice), ("quantizers", quantizers, _quantizer),
            ("steps", steps, _steps),
        )]  # fmt: skip
        _by_name("budgets", budgets, lambda one: (one, Budget.parse(one)), wrong)
        if wrong:
            raise SpecError("\n".join(wrong))
        return cls(named[0], tuple(budgets), tuple(named[1].values()), named[2], named[3])


def _by_name(axis: str, values: Sequence[Any], name: Callable[[Any], tuple[str, Any]], wrong: list[str]) -> dict[str, Any]:
    """Return the values of an axis by name, and add to ``wrong`` what is wrong with them."""
    found: dict[str, Any] = {}
    for value in values:
        try:
            key, made = name(value)
        except QuantkitError as error:
            wrong.append(f"{axis}: {str(error).removeprefix('SchemeChoice: ')}")
            continue
        if key in found:
            wrong.append(f"{axis}: {key or 'no step'!r} is given twice; give it once")
        found[key] = made
    return found


def _scheme(value: SchemeLike) -> tuple[str, SchemeLike]:
    if isinstance(value, Resolution | Mapping):
        plan = value.plan if isinstance(value, Resolution) else value
        digest = hashlib.sha256(repr(sorted((name, scheme.to_dict()) for name, scheme in plan.items())).encode())
        searched = value.origin.get("budget") if isinstance(value, Resolution) else None
        return f"plan{f'-{searched}' if searched else ''}-{digest.hexdigest()[:6]}".replace(" ", ""), value
    choice = choice_of(value)
    if choice.full is not None:
        return choice.full.describe().replace(" ", "-"), choice
    given = {one.name: getattr(choice, one.name) for one in fields(choice)}  # type: ignore[arg-type]
    first, *others = [f"{key}={one}" for key, one in given.items() if one is not None]
    return ",".join([first.removeprefix("name="), *others]), choice


def _choice(value: str | Scheme | SchemeChoice) -> tuple[str, str | SchemeChoice]:
    if value == FLOAT:
        return FLOAT, FLOAT
    name, choice = _scheme(value)
    assert isinstance(choice, SchemeChoice)
    return name, choice


def _quantizer(value: str | Quantizer) -> tuple[str, Quantizer]:
    made = QUANTIZERS.get(value)() if isinstance(value, str) else value
    return _member(made, quantizer_name(made)), made


def _steps(value: Sequence[str | Step]) -> tuple[str, tuple[Step, ...]]:
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise SpecError(f"{value!r} is one step; want variants, each a list of steps: [[], [{value!r}]]")
    made = make_steps(value).all
    return "+".join(_member(one, step_name(one)) for one in made), made


def _member(one: Any, name: str) -> str:
    """Return the name of a quantizer or step with those of its options that are not the default."""
    if not dataclasses.is_dataclass(one):
        return name
    usual = {
        f.name: f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default
        for f in dataclasses.fields(one)
    }
    given = [f"{key}={getattr(one, key)!r}" for key, default in usual.items() if getattr(one, key) != default]
    return f"{name}({', '.join(given)})" if given else name


def entries(
    axes: Axes,
    structure: Structure,
    plans: Mapping[str, Resolution],
    *,
    scale_dtype: str,
    rules: Sequence[Rule] = (),
    calibrate: Calibrate = "once",
    output: Output,
    **checks: bool,
) -> list[Entry]:
    """Return the rows of a sweep, the float model's first.

    Args:
        axes: what is multiplied.
        structure: of the model.
        plans: budget to what was found for it.
        scale_dtype: dtype of stored scales.
        rules: of every scheme, not of plans.
        calibrate: whether statistics of the float model are shared where they can be.
        output: without a path, no format is asked.
        **checks: ``strict`` and ``answers_only``, as for :func:`quantkit.pipeline.checks.refuse_run`.

    Raises:
        SpecError: one row twice, or no row that can be.
    """
    found = [Entry(SweepRow(FLOAT))]
    resolved = {
        name: _attempt(resolve, structure, one, () if _is_plan(one) else rules, scale_dtype)
        for name, one in axes.schemes.items()
    }
    for name, budget, resolution in (
        *((name, "", one) for name, one in resolved.items()),
        *((f"budget {budget}", budget, plans[budget]) for budget in axes.budgets),
    ):
        for method_name, method in axes.methods.items():
            for steps_name, steps in axes.steps.items():
                label = " ".join(part for part in (name, method_name, steps_name and f"+ {steps_name}") if part)
                row = SweepRow(label, name, method_name, steps_name, budget)
                error = resolution
                if isinstance(resolution, Resolution):
                    error = _attempt(refuse_run, structure, resolution, method, steps, output=output, **checks)
                if isinstance(error, QuantkitError):
                    found.append(Entry(dataclasses.replace(row, status="skipped", reason=str(error)), method, steps))
                    continue
                assert isinstance(resolution, Resolution)
                needs, statistics = _calibration(structure, resolution.plan, method, steps, calibrate)
                found.append(Entry(dataclasses.replace(row, statistics=statistics), method, steps, resolution, needs))
    _refuse_rows(found)
    return found


def _is_plan(scheme: SchemeLike) -> bool:
    return isinstance(scheme, Resolution | Mapping)


def _attempt(function: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
    """Return what a function returns, or the error that it raises on purpose."""
    try:
        return function(*arguments, **keywords)
    except QuantkitError as error:
        return error


def _refuse_rows(found: Sequence[Entry]) -> None:
    possible = [entry for entry in found if entry.resolution is not None]
    if not possible:
        reasons = "\n".join(f"{entry.row.name}: {entry.row.reason}" for entry in found if entry.row.reason)
        raise SpecError(f"no row of the sweep can be made:\n{reasons}")
    seen: dict[str, str] = {}
    for entry in possible:
        if entry.row.budget:
            continue  # two budgets may well be met by one plan
        assert entry.resolution is not None
        what = repr((sorted(entry.resolution.plan.items(), key=lambda pair: pair[0]), entry.method, entry.steps))
        if what in seen:
            raise SpecError(f"rows {seen[what]!r} and {entry.row.name!r} are the same on this model; leave one of them out")
        seen[what] = entry.row.name


def _calibration(
    structure: Structure, plan: Plan, method: Quantizer, steps: Sequence[Step], calibrate: Calibrate
) -> tuple[frozenset[str], str]:
    """Return the statistics of the float model that a row can be made with, and what is said of its calibration."""
    inside = [site for site in structure.sites if site.name in plan]
    needs = frozenset(need for site in inside for need in needs_of(method, plan[site.name]))
    behind = any(step.stage == "during" for step in steps) or method.refines_blocks
    if not needs and not behind:
        return frozenset(), "text" if steps else "none"
    alone = (
        calibrate == "each"
        or behind
        or any(step.stage == "before" for step in steps)
        or any(COLLECTORS.get(need).paired for need in needs)
        or any(plan[site.name].rotated or site.read for site in inside)
    )
    return (frozenset(), "walk") if alone else (needs, "float inputs")


def reads_text(found: Sequence[Entry]) -> Iterator[Entry]:
    """Yield the rows that calibration text is read for."""
    yield from (entry for entry in found if entry.resolution is not None and entry.row.statistics != "none")
