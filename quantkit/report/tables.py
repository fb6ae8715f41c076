"""Tables of evaluations for the terminal."""

from collections.abc import Iterable, Sequence

from rich import box
from rich.table import Table
from rich.text import Text

from quantkit.errors import CalibrationError
from quantkit.evaluation.coverage import CoverageRow, summarise
from quantkit.evaluation.record import EvalReport
from quantkit.report.cells import DASH, columns, mib, protocol_lines


def comparison_table(reports: Sequence[EvalReport], title: str | None = None) -> Table:
    """Return a table with one row per report, with a caption that says how the numbers were measured.

    Raises:
        CalibrationError: there is no report.
    """
    if not reports:
        raise CalibrationError("no evaluation report to compare; give at least one")
    caption = Text("\n".join(protocol_lines(reports)))
    table = Table(title=title and Text(title), caption=caption, box=box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    table.caption_justify = "left"
    shown = [column for column in columns(reports) if not column.wide]
    for i, column in enumerate(shown):
        table.add_column(column.title.replace(" ", "\n"), justify="right" if i else "left", overflow="fold", vertical="bottom")
    for report in reports:
        table.add_row(*(Text((column.short or column.cell)(report) or DASH) for column in shown))
    return table


def coverage_table(rows: Iterable[CoverageRow], title: str | None = "Coverage") -> Table:
    """Return a table of what was quantized, what fell back and what was skipped, with totals."""
    groups = summarise(rows)
    table = Table(title=title and Text(title), box=box.SIMPLE_HEAD, show_footer=True, collapse_padding=True, pad_edge=False)
    totals = [sum(getattr(group, name) for group in groups) for name in ("count", "parameters", "bytes_before", "bytes_after")]
    feet = ["total", "", "", f"{totals[0]:,}", f"{totals[1]:,}", mib(totals[2]), mib(totals[3]), ""]
    heads = ["", "module", "scheme", "tensors", "weights", "MiB before", "MiB after", "reason"]
    for head, foot in zip(heads, feet, strict=True):
        left = head in ("", "module", "scheme", "reason")
        table.add_column(head, footer=foot, justify="left" if left else "right", no_wrap=head != "reason")
    styles = {"quantized": "", "fell back": "bold yellow", "skipped": "dim", "carried over": "dim"}
    for g in groups:
        cells = [
            g.kind,
            g.module_type,
            g.scheme or DASH,
            f"{g.count:,}",
            f"{g.parameters:,}",
            mib(g.bytes_before),
            mib(g.bytes_after),
        ]
        table.add_row(*(Text(cell) for cell in (*cells, g.reason or "")), style=styles[g.kind])
    return table
