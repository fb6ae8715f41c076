"""A searched plan on a page: which layer got what and why, and what a little more or less would cost."""

from pathlib import Path
from typing import Any

from quantkit.mixed.picture import draw_choices, draw_frontier, draw_sensitivity
from quantkit.mixed.recorded import SearchRecord
from quantkit.mixed.result import Point, SearchResult, kind_of
from quantkit.report import plots
from quantkit.report.cells import significant

MOST_ROWS = 12
"""Layers that are listed by name."""


def record_of(searched: SearchResult | str | Path) -> SearchRecord:
    """Return what is shown of a search, or of the file that one has written.

    Raises:
        FormatError: the file is missing or damaged.
    """
    return SearchRecord.load(searched) if isinstance(searched, str | Path) else SearchRecord.of(searched)


def headline(record: SearchRecord) -> str:
    """Return what the search found, in a sentence."""
    point = record.point
    return (
        f"Within {record.facts['budget']}: {point.bits_per_weight:.2f} bits per weight, {point.nbytes / 1e6:.1f} MB, at an "
        f"expected KL of {significant(point.kl)} nats per token."
    )


def section(record: SearchRecord) -> dict[str, Any]:
    """Return the data of the page's section."""
    from markupsafe import Markup

    figures = [
        (Markup(_layers(record)), "Which layer got what, and why", _WHY, True),
        (Markup(_sizes(record)), "What other sizes would cost", _SIZES, False),
    ]
    sizes = sorted({"this plan": record.point, **record.nearby}.items(), key=lambda one: one[1].nbytes)
    return {
        "facts": [(name, value) for name, value in record.facts.items() if name not in record.nearby],
        "figures": figures,
        "nearby": [_near(name, point, record.point) for name, point in sizes],
        "kinds": _kinds(record),
        "names": list(record.names),
        "next": _steps(record, "larger"),
        "last": _steps(record, "smaller"),
    }


_WHY = (
    "A layer gets more bits where the smallest choice would cost more for every million of its weights (above, bright). Layers "
    "that serving engines run as one are one row."
)
_SIZES = (
    "Expected KL says which plan is better, and only roughly how far from the float model it is. Crosses: one scheme for all."
)


@plots.styled
def _layers(record: SearchRecord) -> str:
    kinds = len({kind_of(row["layers"]) for row in record.rows})
    figure, _ = plots.new_figure(9.9, 1.6 + 0.5 * kinds)
    figure.clear()
    why, what = figure.subplots(2, 1, sharex=True)
    draw_sensitivity(why, record.rows)
    draw_choices(what, record.rows, record.names)
    return plots.to_svg(figure, "choices")


@plots.styled
def _sizes(record: SearchRecord) -> str:
    figure, axes = plots.new_figure(6.4, 4.4)
    draw_frontier(axes, record.frontier, record.point, record.uniform)
    return plots.to_svg(figure, "sizes")


def _near(name: str, point: Point, here: Point) -> tuple[str, ...]:
    change = f"{point.kl / here.kl - 1:+.0%}" if here.kl > 0 and point != here else ""
    ms = f"{point.ms:.2f}" if point.ms is not None else ""
    return name, f"{point.bits_per_weight:.3f}", f"{point.nbytes / 1e6:.4g}", significant(point.kl), change, ms


def _kinds(record: SearchRecord) -> list[tuple[str, ...]]:
    """Return kind of layer, its weights, and the share of them that has each choice."""
    found: dict[str, dict[str, int]] = {}
    for row in record.rows:
        mine = found.setdefault(kind_of(row["layers"]), {})
        mine[row["choice"]] = mine.get(row["choice"], 0) + row["weights"]
    return [
        (kind, f"{sum(mine.values()):,}", *(f"{mine.get(name, 0) / sum(mine.values()):.0%}" for name in record.names))
        for kind, mine in found.items()
    ]


def _steps(record: SearchRecord, way: str) -> list[tuple[str, ...]]:
    """Return where a step up buys most for its bytes, or one down costs least: layers, from, to, KL then and after, per MB."""
    steps = []
    for row in record.rows:
        if (other := row.get(way)) is not None:
            size = abs(other["bits"] - row["bits"]) * row["weights"] / 8e6
            steps.append((abs(other["kl"] - row["kl"]) / max(size, 1e-12), row, other))
    steps.sort(key=lambda step: step[0] * (-1 if way == "larger" else 1))
    return [
        (row["layers"], row["choice"], other["choice"], significant(row["kl"]), significant(other["kl"]), significant(each))
        for each, row, other in steps[:MOST_ROWS]
    ]
