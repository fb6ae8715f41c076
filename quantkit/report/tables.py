"""Tables of evaluations for the terminal."""

from collections.abc import Iterable, Sequence

from rich import box
from rich.table import Table
from rich.text import Text

from quantkit.errors import CalibrationError
from quantkit.evaluation.continuations import Continuation
from quantkit.evaluation.coverage import CoverageRow, shortfall, summarise
from quantkit.evaluation.instructions import Followed
from quantkit.evaluation.long_context import Stretch
from quantkit.evaluation.record import EvalReport
from quantkit.report.cells import DASH, bases, columns, megabytes, protocol_lines, token_range


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
    for base in bases(reports):
        table.add_row(*(Text(base.get(column.title, DASH)) for column in shown), style="dim")
    for report in reports:
        table.add_row(*(Text((column.short or column.cell)(report) or DASH) for column in shown))
    return table


def continuation_rows(found: Iterable[Continuation]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Return the columns and rows of a table of what a model and its base write."""
    rows = list[tuple[str, ...]]()
    for one in found:
        same = DASH if one.equal_tokens is None else f"{one.equal_tokens} of {one.tokens}"
        rates = [DASH if rate is None else f"{100 * rate:.0f} %" for rate in (one.base_repetition, one.repetition)]
        rows.append(
            (
                one.prompt if len(one.prompt) < 80 else f"... {one.prompt[-76:]}",
                DASH if one.base_text is None else one.base_text,
                one.text,
                same,
                " / ".join(rates),
            )
        )
    return ("prompt", "base", "model", "same tokens", "repetition, base / model"), rows


def instruction_rows(found: Sequence[Followed]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Return the columns and rows of a table of prompts whose answers have a form that can be checked."""
    said = {True: "yes", False: "no", None: DASH}
    rows: list[tuple[str, ...]] = [
        (one.prompt, one.base_answer or DASH, one.answer, said[one.base_followed], said[one.followed]) for one in found
    ]
    return ("prompt", "base", "model", "base does it", "model does it"), rows


def distance_rows(found: Sequence[Stretch]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Return the columns and rows of a table of one long window, in parts."""
    rows: list[tuple[str, ...]] = [
        (
            f"{one.first:,} to {one.last - 1:,}",
            f"{one.perplexity:.4g}",
            DASH if one.base_perplexity is None else f"{one.base_perplexity:.4g}",
            DASH if one.kl is None else f"{one.kl:.3g}",
        )
        for one in found
    ]
    return ("tokens", "perplexity", "base", "KL"), rows


def coverage_table(rows: Iterable[CoverageRow], title: str | None = "Coverage") -> Table:
    """Return a table of what was quantized, what fell back and what was skipped, with totals.

    "tokens" is the smallest and largest number of calibration tokens that one layer, or one expert, has seen. Where most of the
    weights that could be quantized are not, the title says so.
    """
    rows = list(rows)
    groups = summarise(rows)
    if warning := shortfall(rows):
        title = f"{title or 'Coverage'}: {warning}"
    table = Table(title=title and Text(title), box=box.SIMPLE_HEAD, show_footer=True, collapse_padding=True, pad_edge=False)
    totals = [sum(getattr(group, name) for group in groups) for name in ("count", "parameters", "bytes_before", "bytes_after")]
    feet = ["total", "", "", f"{totals[0]:,}", f"{totals[1]:,}", megabytes(totals[2]), megabytes(totals[3]), "", ""]
    heads = ["", "module", "scheme", "tensors", "weights", "MB before", "MB after", "tokens", "reason"]
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
            megabytes(g.bytes_before),
            megabytes(g.bytes_after),
            token_range(g),
        ]
        table.add_row(*(Text(cell) for cell in (*cells, g.reason or "")), style=styles[g.kind])
    return table
