"""From a budget to a plan: what a search has found, once; it is kept with the sweep."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from quantkit.errors import FormatError
from quantkit.nn.sites import sharing_copy
from quantkit.pipeline.plan import Resolution
from quantkit.pipeline.resume import settings_key
from quantkit.spec import Scheme
from quantkit.sweeps.axes import Axes
from quantkit.sweeps.bench import Bench
from quantkit.sweeps.store import PLANS
from quantkit.system.files import read_json, write_json

Search = Callable[..., Resolution]
"""Returns a plan for a model; keywords ``budget``, ``choices``, ``calibration``, ``tokenizer``, ``run``."""


def plan_for(bench: Bench, budget: str, axes: Axes, search: Search | None = None) -> Resolution:
    """Return the plan for a budget: the one that an earlier run of the sweep has found, or a new one.

    Args:
        bench: holds the model.
        budget: for instance ``"4.25 bpw"``.
        axes: hold the choices.
        search: what finds it; None is :func:`quantkit.search`.

    Raises:
        QuantkitError: what the search says of a budget that cannot be met or understood.
    """
    methods = (budget, axes.choices, bench.compute, search and f"{search.__module__}.{search.__qualname__}")
    key = {**bench.about, **settings_key({}, methods, bench.batches)}
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    file = bench.setup.directory / PLANS / f"{digest[:12]}.json"
    if file.exists():
        return _resolution(file, read_json(file))
    find = search or _search()
    found = find(
        sharing_copy(bench.model),
        budget=budget,
        choices=list(axes.choices),
        calibration=replace(bench.setup.calibration, data=bench.batches),
        tokenizer=bench.tokenizer,
        run=bench.setup.run,
    )
    plan = {name: scheme.to_dict() for name, scheme in found.plan.items()}
    facts = {"skipped": found.skipped, "notes": list(found.notes), "remarks": found.remarks}
    write_json(file, {"budget": budget, "plan": plan, **facts})
    return found


def _search() -> Search:
    from quantkit.search import search

    found: Search = search
    return found


def _resolution(file: Any, data: dict[str, Any]) -> Resolution:
    try:
        plan = {name: Scheme.from_dict(scheme) for name, scheme in data["plan"].items()}
        return Resolution(plan, dict(data["skipped"]), tuple(data["notes"]), dict(data["remarks"]))
    except (KeyError, TypeError, AttributeError) as error:
        raise FormatError(f"{file}: not a plan ({error!r}); delete it, and it is searched again") from error
