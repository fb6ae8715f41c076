"""Searches as a recipe asks for them, and on the disk: a run that is given again goes on with the plan that it had."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Strict, TypeAdapter, ValidationError

from quantkit.errors import FormatError, SpecError
from quantkit.hf.load import PreTrainedModel
from quantkit.hf.structure import describe
from quantkit.mixed.budget import Budget
from quantkit.mixed.groups import make_menu
from quantkit.mixed.result import Point, Scores, SearchResult
from quantkit.mixed.search import CHOICES, Scoring, beside_tensors
from quantkit.pipeline.plan import Resolution
from quantkit.pipeline.rules import Rule
from quantkit.pipeline.settings import Output
from quantkit.quantizers.base import Quantizer
from quantkit.spec import Scheme
from quantkit.system.files import read_json, write_json
from quantkit.system.settings import settings

PLAN_FILE = "search.json"
"""Name of the file beside a checkpoint that says what was searched and found."""


def _known_budget(text: str) -> str:
    try:
        Budget.parse(text)
    except SpecError as error:
        raise ValueError(str(error)) from None
    return text


def _enough(choices: tuple[str, ...]) -> tuple[str, ...]:
    if len(choices) < 2:
        raise ValueError("want at least two choices, such as [w3a16-asym-g64, w4a16-asym-g64, float]")
    return choices


@settings(SpecError)
class Searched:
    """A scheme that is searched: ``{budget: 4.25 bpw, choices: [w3a16-asym-g64, w4a16-asym-g64, w8a16, float]}``.

    Args:
        budget: see :mod:`quantkit.mixed.budget`.
        choices: what is chosen from.
        include: ``embedding``, ``head``: searched too.
        scoring: how it is found out what choices cost.
    """

    budget: Annotated[str, Strict(), AfterValidator(_known_budget)]
    choices: Annotated[tuple[Annotated[str, Strict()], ...], AfterValidator(_enough)] = CHOICES
    include: tuple[Annotated[str, Strict()], ...] = ()
    scoring: Scoring = Scoring()


def guess(model: PreTrainedModel, asked: Searched, rules: Sequence[Rule], method: Quantizer, output: Output) -> Resolution:
    """Return a plan of the size that is asked for, as if every weight counted the same; no weight is read.

    A budget that is no size is met halfway between the smallest and the largest plan.

    Raises:
        SpecError: a size that cannot be met; choices that no layer can have.
    """
    budget, structure = Budget.parse(asked.budget), describe(model)
    files = beside_tensors(model, None)
    menu = make_menu(model, structure, asked.choices, rules, method, include=asked.include, output=output, files_bytes=files)
    losses = tuple(
        tuple(group.numel * 4.0 ** (-8 * one.nbytes / group.numel) for one in group.candidates) for group in menu.groups
    )
    scores = Scores(menu, losses)
    if budget.kind in ("bits", "bytes"):
        choices = scores.solve(budget)
    else:
        allocation = scores.allocation("bits")
        choices = allocation.at((allocation.least + allocation.most) // 2) or []
    found = SearchResult.make(scores, budget, choices)
    note = f"scheme: which layer gets what is searched within {budget}; this is a plan of about that size"
    return Resolution(found.plan, found.skipped, (note,))


@dataclass(frozen=True, slots=True)
class SearchRecord:
    """What is shown of a search, without its model.

    Attributes:
        facts: label to value.
        rows: of :meth:`quantkit.SearchResult.rows`.
        names: the choices, the smallest first.
        point: what the plan amounts to.
        frontier: the best plans of all sizes.
        nearby: the best plans of sizes near this one's, by what they are called.
        uniform: what every choice would amount to if all layers had it.
    """

    facts: Mapping[str, str]
    rows: Sequence[Mapping[str, Any]]
    names: Sequence[str]
    point: Point
    frontier: Sequence[Point]
    nearby: Mapping[str, Point]
    uniform: Mapping[str, Point]

    @classmethod
    def of(cls, found: SearchResult) -> "SearchRecord":
        """Return what is shown of a search that was just made."""
        near, alike = found.nearby(0.9, 0.95, 0.98, 1.02, 1.05, 1.1), found.uniform()
        return cls(found.facts(), found.rows(), found.choice_names(), found.point, found.frontier, near, alike)

    @classmethod
    def load(cls, path: str | Path) -> "SearchRecord":
        """Return what :func:`save_plan` wrote.

        Raises:
            FormatError: there is no such file, or it is damaged.
        """
        data = read_json(Path(path))
        try:
            return _RECORD.validate_python(data["shown"])
        except (KeyError, ValidationError) as error:
            raise FormatError(f"{path}: no record of a search: {error}; search again") from error


_RECORD = TypeAdapter(SearchRecord)


def save_plan(path: Path, found: SearchResult, key: Mapping[str, str] | None = None) -> None:
    """Write a searched plan, why it was chosen, and the frontier, as JSON.

    Args:
        path: the file; a folder that is missing is made.
        found: the plan.
        key: what decides it, by topic, as digests or in words.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    plan = {name: scheme.to_dict() for name, scheme in found.plan.items()}
    decided = {"key": dict(key or {}), "plan": plan, "skipped": found.skipped, "origin": found.origin}
    write_json(path, {**decided, "shown": asdict(SearchRecord.of(found))})


def read_key(path: Path) -> Mapping[str, str]:
    """Return what :func:`save_plan` was told of what decides a plan; nothing for a file that says nothing.

    Raises:
        FormatError: the file cannot be read.
    """
    key = read_json(path).get("key")
    return {str(topic): str(value) for topic, value in key.items()} if isinstance(key, dict) else {}


def load_plan(path: str | Path) -> Resolution:
    """Return the plan that :func:`save_plan` wrote, for :func:`quantkit.quantize`.

    Raises:
        FormatError: the file is missing or damaged.
    """
    data = read_json(path)
    try:
        plan = {str(name): Scheme.from_dict(one) for name, one in dict(data["plan"]).items()}
        skipped = TypeAdapter(dict[str, str]).validate_python(data["skipped"])
        origin = TypeAdapter(dict[str, Any]).validate_python(data["origin"])
    except (KeyError, TypeError, ValueError, ValidationError, SpecError) as error:
        raise FormatError(f"{path}: no plan of a search: {error}; search again") from error
    return Resolution(plan, skipped, (), {}, origin)
