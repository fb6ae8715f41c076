"""From budgets to plans: what a search has found, once; plans are kept with the sweep."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from quantkit.errors import FormatError
from quantkit.mixed import Budget, SearchResult, search
from quantkit.nn.sites import sharing_copy
from quantkit.pipeline.plan import Resolution
from quantkit.pipeline.resume import settings_key
from quantkit.pipeline.rules import Rule
from quantkit.spec import Scheme
from quantkit.sweeps.axes import Axes
from quantkit.sweeps.bench import Bench
from quantkit.sweeps.store import PLANS
from quantkit.system.files import read_json, write_json

Search = Callable[..., Resolution]
"""Takes a model and a budget, and the keywords of :func:`quantkit.search`; returns a plan."""

_SIZES = ("bits", "bytes")
"""Budgets that one search serves: what it has found out says the best plan for any other, too."""


def plans_for(bench: Bench, axes: Axes, rules: Sequence[Rule], find: Search = search) -> dict[str, Resolution]:
    """Return the plan for every budget: the one that an earlier run of the sweep has found, or a new one.

    Args:
        bench: holds the model.
        axes: hold budgets and choices; plans are searched for their first quantizer.
        rules: layers that are decided already.
        find: what finds plans.

    Raises:
        QuantkitError: what the search says of a budget that cannot be met or understood.
    """
    found: dict[str, Resolution] = {}
    scored: SearchResult | None = None
    for budget in axes.budgets:
        file = _file(bench, budget, axes, rules, find)
        if not file.exists() and scored is not None and Budget.parse(budget).kind in _SIZES:
            _write(file, budget, scored.at(budget))
        elif not file.exists():
            plan = find(
                sharing_copy(bench.model),
                budget,
                **({"choices": list(axes.choices)} if axes.choices else {}),
                method=next(iter(axes.methods.values())),
                rules=list(rules),
                calibration=replace(bench.setup.calibration, data=bench.batches),
                output=replace(bench.setup.output, path=None),
                run=bench.setup.run,
                tokenizer=bench.tokenizer,
            )
            _write(file, budget, plan)
            scored = plan if isinstance(plan, SearchResult) else scored
        found[budget] = _read(file)
    return found


def _file(bench: Bench, budget: str, axes: Axes, rules: Sequence[Rule], find: Search) -> Path:
    """Return where the plan for a budget is kept, under a name that covers everything that decides it."""
    by = f"{find.__module__}.{find.__qualname__}"
    methods = (
        budget,
        axes.choices,
        next(iter(axes.methods.values())),
        tuple(rules),
        bench.setup.output.format,
        bench.compute,
        by,
    )
    key = {**bench.about, **settings_key({}, methods, bench.batches)}
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    return bench.setup.directory / PLANS / f"{digest[:12]}.json"


def _write(file: Path, budget: str, found: Resolution) -> None:
    plan = {name: scheme.to_dict() for name, scheme in found.plan.items()}
    facts: dict[str, Any] = {"skipped": found.skipped, "notes": list(found.notes), "remarks": found.remarks}
    write_json(file, {"budget": budget, "plan": plan, **facts})


def _read(file: Path) -> Resolution:
    data = read_json(file)
    try:
        plan = {name: Scheme.from_dict(scheme) for name, scheme in data["plan"].items()}
        return Resolution(plan, dict(data["skipped"]), tuple(data["notes"]), dict(data["remarks"]))
    except (KeyError, TypeError, AttributeError) as error:
        raise FormatError(f"{file}: not a plan ({error!r}); delete it, and it is searched again") from error
