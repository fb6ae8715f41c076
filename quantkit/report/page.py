"""A self-contained HTML page with results, tables, plots, coverage and how the numbers were measured.

The page contains its style and its plots and loads nothing. It supports light and dark mode and printing. All text from outside
(titles, names, reasons) is escaped.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from quantkit.errors import CalibrationError
from quantkit.evaluation.coverage import KINDS, CoverageRow, CoverageSummary, shortfall, summarise
from quantkit.evaluation.instructions import summary
from quantkit.evaluation.record import EvalReport
from quantkit.mixed.recorded import SearchRecord
from quantkit.mixed.result import SearchResult
from quantkit.report import plots, searched, trained
from quantkit.report.cells import DASH, bases, columns, megabytes, protocol_lines, significant, token_range
from quantkit.report.findings import findings, headline
from quantkit.report.render import render
from quantkit.report.tables import continuation_rows, distance_rows, instruction_rows
from quantkit.system.files import write_atomic

Losses = Mapping[str, float] | Sequence[Mapping[str, Any]]
"""Layer name to loss, or rows ``{"site": name, "block": number, "loss": value}``."""


def write_html(
    path: str | Path,
    reports: Sequence[EvalReport],
    *,
    coverage: Iterable[CoverageRow] | None = None,
    losses: Losses | None = None,
    search: SearchResult | str | Path | None = None,
    training: trained.Course | str | Path | None = None,
    title: str = "Quantization report",
    reload_s: int = 0,
) -> None:
    """Write the page, atomically.

    Args:
        path: the file.
        reports: one row each, in this order; sizes are compared with the first unquantized model. May be empty with a search.
        coverage: what was done with every weight of one of the models.
        losses: relative squared output error of every layer of one of the models.
        search: what :func:`quantkit.search` found for one of the models, or the ``search.json`` beside its checkpoint.
        training: ``metadata["training"]`` of a result of :func:`quantkit.train`, or the directory that it writes to, also
            while it is at work. A directory in which nothing was trained adds nothing.
        title: heading of the page.
        reload_s: have browsers load the page again after so many seconds; 0 never does.

    Raises:
        CalibrationError: there is nothing to show.
        FormatError: the file of a search is damaged.
    """
    page = render_html(
        reports, coverage=coverage, losses=losses, search=search, training=training, title=title, reload_s=reload_s
    )
    write_atomic(path, page)


def render_html(
    reports: Sequence[EvalReport],
    *,
    coverage: Iterable[CoverageRow] | None = None,
    losses: Losses | None = None,
    search: SearchResult | str | Path | None = None,
    training: trained.Course | str | Path | None = None,
    title: str = "Quantization report",
    reload_s: int = 0,
) -> str:
    """Return the page as HTML; arguments as in :func:`write_html`."""
    from markupsafe import Markup

    course = trained.course_of(training) if training is not None else None
    if not reports and search is None and course is None:
        raise CalibrationError("no evaluation report to show; give at least one")
    record = searched.record_of(search) if search is not None else None
    rows, weights = site_losses(losses or {}), list(coverage or ())
    shown = columns(reports)
    loss_map = plots.losses_by_block([(kind, block, loss) for _, kind, block, loss in rows])
    return render(
        "report.html",
        title=title,
        reload_s=reload_s,
        dash=DASH,
        headline=_headline(reports, record, course),
        findings=findings(reports),
        protocol=protocol_lines(reports),
        search=record and searched.section(record),
        training=course and trained.section(course),
        columns=[(column.title, column.meaning) for column in shown],
        cells=[[base.get(column.title) for column in shown] for base in bases(reports)]
        + [[column.cell(report) for column in shown] for report in reports],
        figures=_figures(reports),
        losses=loss_map and Markup(loss_map),
        worst=[(site, significant(loss)) for site, _, _, loss in sorted(rows, key=lambda row: -row[3])[:8]],
        written=[(report.label, *continuation_rows(report.continuations)) for report in reports if report.continuations],
        told=[
            (f"{report.label}: {summary(report.instructions)}", *instruction_rows(report.instructions))
            for report in reports
            if report.instructions
        ],
        far=[(report.label, *distance_rows(report.long_context)) for report in reports if report.long_context],
        coverage=_coverage(summarise(weights), shortfall(weights)) if coverage is not None else None,
    )


def _headline(reports: Sequence[EvalReport], record: SearchRecord | None, course: trained.Course | None) -> str:
    if reports:
        return headline(reports)
    return searched.headline(record) if record is not None else trained.headline(course or {})


def site_losses(losses: Losses) -> list[tuple[str, str, int, float]]:
    """Return (layer, kind, block, loss); the block is the first number in the layer's path, the kind is the path after it."""
    if isinstance(losses, Mapping):
        found = [(site, re.search(r"\.(\d+)(?=\.)", site), loss) for site, loss in losses.items()]
        rows = [(site, int(match[1]) if match else 0, loss) for site, match, loss in found]
    else:
        rows = [(str(row["site"]), int(row["block"]), row["loss"]) for row in losses]
    return [(site, site.partition(f".{block}.")[2] or site, block, float(loss)) for site, block, loss in rows]


def _figures(reports: Sequence[EvalReport]) -> list[tuple[str, str, str, bool]]:
    """Return (SVG, heading, explanation, full width) of every plot for which there is data."""
    from markupsafe import Markup

    drawn = [
        (
            plots.bits_against_kl(reports),
            "Size against loss",
            "Down and to the left is better. Bars: one standard error.",
            False,
        ),
        (
            plots.latency_against_kl(reports),
            "Speed against loss",
            "Down and to the left is better. Horizontal bars: 10th to 90th percentile of single tokens.",
            False,
        ),
        (
            plots.kl_distribution(reports),
            "Distribution of the loss",
            "KL of single tokens: line from the 5th to the 95th percentile, box from the 25th to the 75th, circle at the "
            "median, diamond at the mean, tick at the 99th percentile, cross at the largest value.",
            True,
        ),
    ]
    return [(Markup(svg), name, text, wide) for svg, name, text, wide in drawn if svg is not None]


def _coverage(groups: Sequence[CoverageSummary], warning: str | None) -> dict[str, Any]:
    """Return the data of the coverage section: a bar with the share of the original bytes by kind, a table and its totals."""
    before = sum(group.bytes_before for group in groups) or 1
    percent = {kind: 100 * sum(g.bytes_before for g in groups if g.kind == kind) / before for kind in KINDS}
    rows = [
        (
            *(g.kind, g.module_type, g.scheme or DASH, f"{g.count:,}", f"{g.parameters:,}"),
            *(megabytes(g.bytes_before), megabytes(g.bytes_after), token_range(g)),
        )
        for g in groups
    ]
    total = [sum(getattr(g, name) for g in groups) for name in ("count", "parameters", "bytes_before", "bytes_after")]
    return {
        "shares": [(kind, kind.replace(" ", "-"), f"{p:.3f}", f"{p:.1f}") for kind, p in percent.items() if p],
        "rows": [(*row, group.reason or "") for row, group in zip(rows, groups, strict=True)],
        "total": ("total", "", "", f"{total[0]:,}", f"{total[1]:,}", megabytes(total[2]), megabytes(total[3]), "", ""),
        "warning": warning,
    }
