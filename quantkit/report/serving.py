"""The results of a trace as a table and an HTML page, one row per kind of batching."""

from collections.abc import Mapping
from pathlib import Path

from quantkit.evaluation.latency import Spread
from quantkit.evaluation.trace import Served
from quantkit.report import plots
from quantkit.report.render import render
from quantkit.system.files import write_atomic


def trace_rows(found: Mapping[str, Served], price: float | None = None) -> tuple[list[str], list[list[str]]]:
    """Return column titles and rows of cells, one row per kind of batching.

    Args:
        found: kind of batching to its measurements of the same trace.
        price: price of the machine per hour, which adds the cost of a million new tokens; None for none.
    """
    spread = "p50 / p90 / p99"
    columns = ["batching", "seconds", "tokens/s", f"first token ms, {spread}", f"between tokens ms, {spread}", "steps"]
    rows = [
        [kind, f"{s.seconds:.1f}", f"{s.tokens_per_s:.1f}", _spread(s.first_token_ms, 0), _spread(s.token_ms, 1), str(s.steps)]
        for kind, s in found.items()
    ]
    if all(s.joules is not None for s in found.values()):
        columns.append("J per token")
        rows = [[*row, f"{(s.joules or 0) / s.new_tokens:.3f}"] for row, s in zip(rows, found.values(), strict=True)]
    if price is None:
        return columns, rows
    costs = [f"{s.cost_per_million_tokens(price):.2f}" for s in found.values()]
    return [*columns, "cost per million tokens"], [[*row, cost] for row, cost in zip(rows, costs, strict=True)]


def write_trace_html(
    path: str | Path, found: Mapping[str, Served], *, price: float | None = None, title: str = "Serving a trace"
) -> None:
    """Write a self-contained HTML page, atomically; arguments as in :func:`trace_rows`."""
    from markupsafe import Markup

    columns, rows = trace_rows(found, price)
    names = {"Time to the first token": "first_token_ms", "Time between tokens": "token_ms"}
    drawn = [(name, plots.percentiles({kind: getattr(s, field) for kind, s in found.items()})) for name, field in names.items()]
    text = "Line from the 10th to the 99th percentile, circle at the median, tick at the 90th."
    figures = [(Markup(svg), name, text) for name, svg in drawn if svg is not None]
    first = next(iter(found.values()))
    slowest, fastest = max(found, key=lambda kind: found[kind].seconds), min(found, key=lambda kind: found[kind].seconds)
    saving = f": {fastest} took {found[fastest].seconds / found[slowest].seconds:.0%} of the time of {slowest}"
    headline = f"{first.requests} requests, {first.new_tokens} new tokens{saving if fastest != slowest else ''}"
    page = render("trace.html", title=title, headline=headline, columns=columns, rows=rows, figures=figures)
    write_atomic(path, page)


def _spread(spread: Spread, digits: int) -> str:
    return " / ".join(f"{value:.{digits}f}" for value in (spread.median, spread.p90, spread.p99))
