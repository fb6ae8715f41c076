"""A sweep as cells of a table, for the terminal, as points of a picture, and as a page."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from quantkit.report.cells import DASH, plus_minus, protocol_lines, significant
from quantkit.report.plots import Point
from quantkit.report.render import render
from quantkit.report.trade_off import TradeOff, svg_of
from quantkit.sweeps.result import COSTS, LOSSES, SweepResult, megabytes, place_of, placed
from quantkit.sweeps.rows import SweepRow
from quantkit.system.files import write_atomic

if TYPE_CHECKING:
    from rich.table import Table

MARK = "*"
"""Stands beside a row of the frontier."""

MEANINGS = {
    "row": "scheme, quantizer and steps; * no other row has both fewer bytes and a smaller KL",
    "bits": "stored bits per quantized weight: codes, scales, zero points and padding; of the float model, per parameter",
    "MB": "all tensors of the checkpoint, in millions of bytes",
    "perplexity": "exp of the mean negative log-likelihood per token; ± one standard error over windows",
    "KL": "mean KL divergence from the float model's next-token distribution, nats per token; ± one standard error",
    "top-1 %": "tokens for which row and float model have the same most likely prediction",
    "ms": "milliseconds per generated token, median",
    "seconds": "time to quantize, without scoring",
    "peak MB": "peak memory of the process meanwhile, the float model included",
    "calibration": "float inputs: statistics of the float model, collected once for the sweep; walk: inputs behind the layers "
    "quantized before, run for this row; text: only its steps read text",
}


def cells(result: SweepResult) -> tuple[list[str], list[tuple[bool, list[str]]]]:
    """Return column titles and, for every measured row, whether it is on the frontier and its cells."""
    rows = [row for row in result.rows if row.status == "done"]
    best = {row.name for row in result.frontier()}
    timed = any(row.ms is not None for row in rows)
    heads = [head for head in MEANINGS if head != "ms" or timed]
    return heads, [(row.name in best, [_cell(row, head, row.name in best) for head in heads]) for row in rows]


def _cell(row: SweepRow, head: str, best: bool) -> str:
    report = row.report
    divergence = report and report.quality.divergence
    found = {
        "row": f"{row.name} {MARK}" if best else row.name,
        "bits": row.bits and f"{row.bits:.2f}",
        "MB": row.bytes and megabytes(row.bytes),
        "perplexity": row.perplexity and plus_minus(row.perplexity, row.perplexity_se, 2),
        "KL": divergence and not row.is_float and plus_minus(divergence.mean, divergence.mean_se),
        "top-1 %": divergence and not row.is_float and f"{100 * divergence.same_top1:.1f}",
        "ms": row.ms and f"{row.ms:.2f}",
        "seconds": row.seconds and significant(row.seconds, 3),
        "peak MB": row.peak_bytes and f"{row.peak_bytes / 1e6:,.0f}",
        "calibration": "" if row.is_float else row.statistics,
    }[head]
    return str(found or DASH)


def unmade(result: SweepResult) -> list[tuple[str, str, str]]:
    """Return name, status and reason of every row without measurements."""
    return [(row.name, row.status, row.reason) for row in result.rows if row.status != "done"]


def sweep_table(result: SweepResult) -> "Table":
    """Return the table for the terminal, rows of the frontier in bold, those without measurements below."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    lines = protocol_lines([row.report for row in result.rows if row.report is not None])
    caption = Text("\n".join([f"{MARK} {MEANINGS['row'].partition(MARK)[2].strip()}", *lines]))
    table = Table(caption=caption, box=box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    table.caption_justify = "left"
    heads, rows = cells(result)
    for head in heads:
        table.add_column(
            head, justify="left" if head in ("row", "calibration") else "right", overflow="fold", vertical="bottom"
        )
    for marked, row in rows:
        table.add_row(*map(Text, row), style="bold" if marked else "")
    return table


def trade_off(result: SweepResult, x: str, y: str) -> TradeOff | None:
    """Return the picture of loss against cost; None with fewer than two rows that have both."""
    best = {row.name for row in result.frontier(x, y)}
    rows = [row for row in placed(result.done, x, y) if place_of(row, x, y)[1] > 0]
    if len(rows) < 2:
        return None
    unit = 1e6 if x == "bytes" else 1.0
    families = list(dict.fromkeys(map(_family, rows)))
    points = []
    for row in rows:
        cost, loss = place_of(row, x, y)
        error = (row.kl_se if y == "kl" else row.perplexity_se) or 0.0
        points.append(
            Point(
                row.name,
                cost / unit,
                loss,
                y_error=(min(error, 0.9 * loss), error),
                style=families.index(_family(row)),
            )
        )
    base = result.float_row
    cost_of_float = getattr(base, x) if base else None
    return TradeOff(
        points=tuple(points),
        frontier=frozenset(best),
        families=tuple(families),
        x_label=COSTS[x],
        y_label=LOSSES[y],
        float_x=cost_of_float / unit if cost_of_float is not None else None,
        float_y=base.perplexity if base and y == "perplexity" else None,
    )


def _family(row: SweepRow) -> str:
    """Return what rows of one colour have in common."""
    return " + ".join(filter(None, (row.quantizer, row.steps))) + (", searched" if row.budget else "")


def write_page(result: SweepResult, path: str | Path, title: str) -> None:
    """Write the page, atomically."""
    from markupsafe import Markup

    heads, rows = cells(result)
    pictures = [(x, trade_off(result, x, "kl")) for x in ("bytes", "bits", "ms")]
    names = {"bytes": "Size against loss", "bits": "Bits against loss", "ms": "Speed against loss"}
    figures = [(Markup(svg_of(picture, x)), names[x]) for x, picture in pictures if picture is not None]
    reports = [row.report for row in result.rows if row.report is not None]
    page = render(
        "sweep.html",
        title=title,
        headline=headline(result),
        columns=[(head, MEANINGS[head]) for head in heads],
        rows=rows,
        figures=figures,
        unmade=unmade(result),
        protocol=protocol_lines(reports),
    )
    write_atomic(path, page)


def headline(result: SweepResult) -> str:
    """Return what the sweep found, in a sentence."""
    best = result.frontier()
    if not best:
        return "No row is measured yet."
    base = result.float_row
    of = f" (the float model takes {megabytes(base.bytes)} MB)" if base and base.bytes else ""
    parts = [_said(row) for row in _ends(best)]
    return f"{len(best)} of {len(result.done)} rows are worth their bytes{of}: {'; '.join(parts)}."


def _ends(best: Sequence[SweepRow]) -> Sequence[SweepRow]:
    return best if len(best) < 4 else (best[0], best[len(best) // 2], best[-1])


def _said(row: SweepRow) -> str:
    return f"{row.name} takes {megabytes(row.bytes or 0)} MB at KL {significant(row.kl or 0.0)}"
