"""Formatting of numbers, and the columns of a comparison, for the terminal and the HTML page."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from quantkit.evaluation.coverage import CoverageSummary
from quantkit.evaluation.latency import Latency
from quantkit.evaluation.quality import Divergence
from quantkit.evaluation.record import EvalReport

T = TypeVar("T")
MB = 1e6
DASH = "\N{EN DASH}"  # for an empty cell


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a comparison.

    Attributes:
        title: title of the column.
        meaning: explanation of the title.
        cell: returns the text of the cell for a report, or None if it was not measured.
        short: returns a shorter text for the terminal; None for the same text.
        wide: whether the column is left out in the terminal.
    """

    title: str
    meaning: str
    cell: Callable[[EvalReport], str | None]
    short: Callable[[EvalReport], str | None] | None = None
    wide: bool = False


def significant(value: float, digits: int = 3) -> str:
    """Format a number with ``digits`` significant digits, for instance ``0.174``, ``22.6``, ``0.00210``, ``3.2e-06``."""
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else str(value)
    if abs(value) < 1e-4 or abs(value) >= 1e7:
        return f"{value:.{digits - 1}e}"
    return f"{value:.{max(0, digits - 1 - math.floor(math.log10(abs(value))))}f}"


def plus_minus(value: float, error: float | None, least: int = 0) -> str:
    """Format ``value ± error`` with one significant digit of the error (two for 1 or 2) and at least ``least`` decimals."""
    if error is None or not math.isfinite(error):
        return significant(value, 4)
    if error == 0:
        return "0" if value == 0 else f"{significant(value, 4)} ± 0"
    if max(abs(value), error) < 1e-4 or abs(value) >= 1e7:
        return f"{value:.2e} ± {error:.0e}"
    exponent = math.floor(math.log10(error))
    digits = 2 if error < 3 * 10**exponent else 1
    decimals = max(least, min(6, digits - 1 - exponent))
    return f"{value:.{decimals}f} ± {error:.{decimals}f}"


def megabytes(size: float) -> str:
    """Format bytes as MB (powers of ten, like disks), with one decimal below 1000 MB."""
    return f"{size / MB:,.1f}" if size < 1000 * MB else f"{size / MB:,.0f}"


def token_range(group: CoverageSummary) -> str:
    """Format the fewest and the most calibration tokens of a group's layers and experts."""
    if group.tokens is None:
        return DASH
    fewest, most = group.tokens
    return f"{fewest:,}" if fewest == most else f"{fewest:,} to {most:,}"


def ppl_increase(report: EvalReport) -> tuple[float, float | None] | None:
    """Return the increase of perplexity over the base in percent, and its paired standard error by the delta method."""
    divergence = report.quality.divergence
    if divergence is None:
        return None
    ratio = math.exp(min(divergence.nll_increase, 700))
    se = divergence.nll_increase_se
    return 100 * (ratio - 1), None if se is None else 100 * ratio * se


def _increase(report: EvalReport) -> str | None:
    found = ppl_increase(report)
    if found is None:
        return None
    sign = "+" if found[0] > 0 else ""
    return sign + plus_minus(*found, least=1) if max(abs(found[0]), found[1] or 0) < 1e4 else f"+{found[0]:.1e}"


def _divergence(show: Callable[[Divergence], str]) -> Callable[[EvalReport], str | None]:
    return lambda r: None if r.quality.divergence is None else show(r.quality.divergence)


def _latency(show: Callable[[Latency], str | None]) -> Callable[[EvalReport], str | None]:
    return lambda r: None if r.latency is None else show(r.latency)


def _speedup(latency: Latency) -> str | None:
    return f"{latency.speedup.decode.median:.2f}x" if latency.speedup else None


def _size(report: EvalReport, disk: bool) -> str:
    found = report.footprint
    return megabytes(found.disk_bytes if disk and found.disk_bytes is not None else found.stored_bytes)


QUALITY = (
    Column(
        "perplexity",
        "exp of the mean negative log-likelihood per token; ± one standard error over windows, due to the choice of text",
        lambda r: plus_minus(r.quality.perplexity, r.quality.perplexity_se, 2),
    ),
    Column(
        "vs base %",
        "increase of perplexity over the base on the same tokens; ± one paired standard error",
        _increase,
        wide=True,
    ),
    Column(
        "KL",
        "mean KL divergence from the base's next-token distribution, nats per token; ± one standard error over windows",
        _divergence(lambda d: plus_minus(d.mean, d.mean_se)),
        short=_divergence(lambda d: significant(d.mean)),
    ),
    Column("KL p99", "the 99th percentile of the divergence over tokens", _divergence(lambda d: significant(d.p99))),
    Column(
        "top-1 %",
        "tokens for which model and base have the same most likely prediction",
        _divergence(lambda d: f"{100 * d.same_top1:.1f}"),
    ),
    Column(
        "flips",
        "tokens that the base predicts correctly and the model does not / the model does and the base does not",
        _divergence(lambda d: f"{d.right_to_wrong:,} / {d.wrong_to_right:,}"),
        wide=True,
    ),
)

SPEED = (
    Column("decode ms", "milliseconds per generated token, median", _latency(lambda t: f"{t.decode_ms.median:.2f}")),
    Column(
        "speed-up",
        "decode speed relative to the first model timed in the same run, median over rounds",
        _latency(_speedup),
        wide=True,
    ),
    Column(
        "prefill tok/s",
        "prompt tokens read per second, median",
        _latency(lambda t: f"{t.prefill_tokens_per_s.median:,.0f}"),
    ),
    Column(
        "peak MB",
        "peak memory of the process while this model was timed, including other loaded models",
        _latency(lambda t: f"{t.peak_bytes / MB:,.0f}"),
    ),
)


def columns(reports: Sequence[EvalReport]) -> list[Column]:
    """Return the columns that have a value for at least one report."""
    disk = all(report.footprint.disk_bytes is not None for report in reports)
    size = (
        ("MB on disk", "size of the directory")
        if disk
        else ("MB", "size of the weights in a checkpoint, tied ones counted once")
    )
    weights: tuple[Column, ...] = (
        Column("model", "name of the model", lambda r: r.label),
        Column(
            "bits per weight",
            "stored bits per quantized weight, including scales, zero points and padding; per weight if none is quantized",
            lambda r: f"{r.footprint.bits_per_weight:.2f}",
        ),
        Column(*size, lambda r: _size(r, disk)),
    )
    if len({report.compute for report in reports if report.compute}) > 1:  # rows of two kinds
        products = "how quantized layers multiplied while quality and speed were measured"
        weights += (Column("products", products, lambda r: r.compute or "float"),)
    return [column for column in (*weights, *QUALITY, *SPEED) if any(column.cell(report) is not None for report in reports)]


def bases(reports: Sequence[EvalReport]) -> list[dict[str, str]]:
    """Return a row, column to text, for each model that others are compared with and that has no row of its own.

    Its perplexity is known from the comparison, if all tokens were compared.
    """
    rows: dict[str, dict[str, str]] = {}
    for report in reports:
        divergence = report.quality.divergence
        if report.base is None or divergence is None or report.base in rows or report.base in {one.label for one in reports}:
            continue
        found = {"model": report.base, "KL": "0", "top-1 %": "100.0"}
        if divergence.tokens == report.quality.tokens:
            found["perplexity"] = significant(divergence.base_perplexity, 4)
        rows[report.base] = found
    return list(rows.values())


def protocol_lines(reports: Sequence[EvalReport]) -> list[str]:
    """Return sentences that say how the rows were measured; the first one is a warning if rows cannot be compared."""
    lines = []
    if len({(r.protocol.fingerprint, r.protocol.length, r.protocol.bos) for r in reports}) > 1:
        lines.append("Rows were scored on different text or windows, so their perplexities cannot be compared.")
    for p in _distinct(report.protocol for report in reports):
        overlap = "" if p.stride in (0, p.length - p.bos) else f", stride {p.stride}"
        compared = f"; compared with the base on {p.kl_tokens:,}" if 0 < p.kl_tokens != p.tokens else ""
        lines.append(
            f"Text: {p.source}; {p.windows} of {p.available_windows} windows of {p.length} tokens{overlap}, "
            f"{'each with a' if p.bos else 'no'} BOS token; {p.tokens:,} tokens scored{compared}."
        )
    for compute in _distinct(report.compute for report in reports if report.compute):
        rows = [report.label for report in reports if report.compute == compute]
        lines.append(f"Quality was measured with {compute}{' products' if compute == 'exact' else ''}: {', '.join(rows)}.")
    timed = [r.latency for r in reports if r.latency]
    for setting in _distinct((t.context_tokens, t.new_tokens, t.rounds, t.engine) for t in timed):
        lines.append("Speed: batch 1, prompt of {} tokens, {} decoded, {} rounds, engine: {}.".format(*setting))
    for e in _distinct(report.environment for report in reports):
        lines.append(
            f"Machine: {e.gpu or e.cpu}, {e.threads} threads, {e.system}; quantkit {e.quantkit}, torch {e.torch}, "
            f"transformers {e.transformers}, Python {e.python}; unquantized weights in {e.dtype}."
        )
    return lines


def _distinct(values: Iterable[T]) -> list[T]:
    return list(dict.fromkeys(values))
