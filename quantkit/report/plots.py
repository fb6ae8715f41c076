"""Plots as inline SVG with the colours and the font of the page, in light and dark mode.

matplotlib draws with placeholder colours; :func:`to_svg` replaces them by CSS variables and removes everything that a browser
would load from elsewhere. Names are drawn as plain text, not as TeX. The global state of matplotlib is not changed.
"""

import functools
import io
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

import numpy as np

from quantkit.evaluation.latency import Spread
from quantkit.evaluation.record import EvalReport
from quantkit.system.figures import log_axis

INK, SOFT, PAPER = "#010203", "#040506", "#070809"
"""Placeholders for the colours of text, of grid lines, and of the page."""

PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8172b2", "#7f7f7f")
"""Colours that colour-blind readers can distinguish, on white and on black (after Okabe and Ito, 2008)."""

MARKERS = "osD^vPX*"

STYLE: Any = {
    "svg.fonttype": "none", "text.parse_math": False, "font.size": 9.5, "axes.labelsize": 9.5, "text.color": INK,
    "axes.labelcolor": INK, "axes.edgecolor": SOFT, "xtick.color": INK, "ytick.color": INK, "xtick.labelcolor": INK,
    "ytick.labelcolor": INK, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": SOFT,
    "grid.linewidth": 0.6, "axes.axisbelow": True, "xtick.major.size": 0, "ytick.major.size": 0, "xtick.minor.size": 0,
    "ytick.minor.size": 0,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Point:
    """A labelled point with error bars, given as distances below and above."""

    label: str
    x: float
    y: float
    x_error: tuple[float, float] = (0.0, 0.0)
    y_error: tuple[float, float] = (0.0, 0.0)
    style: int = 0


P = ParamSpec("P")
R = TypeVar("R")


def styled(draw: Callable[P, R]) -> Callable[P, R]:
    """Return ``draw`` with the page's style in effect during the call."""

    @functools.wraps(draw)
    def in_style(*args: P.args, **kwargs: P.kwargs) -> R:
        import matplotlib as mpl

        with mpl.rc_context(STYLE):
            return draw(*args, **kwargs)

    return in_style


@styled
def bits_against_kl(reports: Sequence[EvalReport]) -> str | None:
    """Plot mean KL over stored bits per weight; None with fewer than two models that differ from the base."""
    points = []
    for i, report in enumerate(reports):
        d = report.quality.divergence
        if d is not None and d.mean > 0:
            points.append(
                Point(report.label, report.footprint.bits_per_weight, d.mean, y_error=_error(d.mean, d.mean_se), style=i)
            )
    return _scatter(points, "bits per weight", "mean KL from the base, nats", "bits")


@styled
def latency_against_kl(reports: Sequence[EvalReport]) -> str | None:
    """Plot mean KL over decode time (bars: 10th to 90th percentile); None with fewer than two models that differ."""
    points = []
    for i, report in enumerate(reports):
        d, latency = report.quality.divergence, report.latency
        if d is not None and d.mean > 0 and latency is not None:
            t = latency.decode_ms
            x_error = (max(t.median - t.p10, 0.0), max(t.p90 - t.median, 0.0))
            points.append(Point(report.label, t.median, d.mean, x_error, _error(d.mean, d.mean_se), style=i))
    return _scatter(points, "decode, ms per token", "mean KL from the base, nats", "latency")


@styled
def kl_distribution(reports: Sequence[EvalReport]) -> str | None:
    """Plot the distribution of KL over tokens, one line per model; None if no model differs from its base."""
    rows = [(i, r, d) for i, r in enumerate(reports) if (d := r.quality.divergence) is not None and d.median > 0]
    if not rows:
        return None
    figure, axes = new_figure(9.9, 0.75 + 0.34 * len(rows))
    floor = min(max(dict(d.quantiles)[0.05], 1e-7) for _, _, d in rows) / 2
    for place, (i, _, d) in enumerate(rows):
        q = {level: max(value, floor) for level, value in d.quantiles}
        color = PALETTE[i % len(PALETTE)]
        axes.plot([q[0.05], q[0.95]], [place, place], color=color, linewidth=1.2, solid_capstyle="butt")
        axes.plot([q[0.25], q[0.75]], [place, place], color=color, linewidth=7, solid_capstyle="butt", alpha=0.75)
        axes.plot([q[0.5]], [place], "o", color=PAPER, markeredgecolor=color, markersize=6)
        axes.plot([q[0.99]], [place], "|", color=color, markersize=11, markeredgewidth=1.6)
        axes.plot([d.max], [place], "x", color=color, markersize=5)
        axes.plot([d.mean], [place], "D", color=color, markeredgecolor=PAPER, markersize=6)
    log_axis(axes.xaxis, floor, max(d.max for _, _, d in rows))
    axes.set_yticks(range(len(rows)), [_short(r.label) for _, r, _ in rows])
    axes.set_ylim(len(rows) - 0.45, -0.55)
    axes.grid(False, axis="y")
    axes.set_xlabel("KL of one token, nats")
    return to_svg(figure, "distribution")


@styled
def percentiles(spreads: Mapping[str, Spread]) -> str | None:
    """Plot percentiles of times in milliseconds, one line per name; None if no time is above zero."""
    shown = {name: spread for name, spread in spreads.items() if spread.median > 0}
    if not shown:
        return None
    figure, axes = new_figure(4.6, 0.75 + 0.34 * len(shown))
    for place, spread in enumerate(shown.values()):
        color = PALETTE[place % len(PALETTE)]
        axes.plot([spread.p10, spread.p99], [place, place], color=color, linewidth=1.6, solid_capstyle="butt")
        axes.plot([spread.p90], [place], "|", color=color, markersize=11, markeredgewidth=1.6)
        axes.plot([spread.median], [place], "o", color=PAPER, markeredgecolor=color, markersize=6)
    low = max(min(spread.p10 for spread in shown.values()), 1e-3)
    log_axis(axes.xaxis, low, max(spread.p99 for spread in shown.values()))
    axes.set_yticks(range(len(shown)), [_short(name) for name in shown])
    axes.set_ylim(len(shown) - 0.45, -0.55)
    axes.grid(False, axis="y")
    axes.set_xlabel("ms")
    return to_svg(figure, "times")


@styled
def losses_by_block(losses: Sequence[tuple[str, int, float]]) -> str | None:
    """Plot (kind, block, loss) as a map with one row per kind of layer and one column per block; None without losses."""
    from matplotlib.colors import LogNorm

    kinds, blocks = list(dict.fromkeys(kind for kind, _, _ in losses)), sorted({block for _, block, _ in losses})
    grid = np.full((len(kinds), len(blocks)), np.nan)
    for kind, block, loss in losses:
        if loss > 0:
            row, column = kinds.index(kind), blocks.index(block)
            grid[row, column] = np.nanmax([grid[row, column], loss])  # several layers of one kind: the largest
    if np.isnan(grid).all():
        return None
    figure, axes = new_figure(9.9, 0.75 + 0.24 * len(kinds))
    low, high = float(np.nanmin(grid)), float(np.nanmax(grid))
    mesh = axes.pcolormesh(
        np.ma.masked_invalid(grid), cmap="viridis", norm=LogNorm(low, max(high, low * 1.01)), edgecolors=PAPER, linewidth=0.6
    )
    step = -(-len(blocks) // 32)
    axes.set_xticks(np.arange(0, len(blocks), step) + 0.5, [str(b) for b in blocks[::step]])
    axes.set_yticks(np.arange(len(kinds)) + 0.5, [_short(kind, 32) for kind in kinds])
    axes.invert_yaxis()
    axes.grid(False)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("block")
    bar = figure.colorbar(mesh, ax=axes, pad=0.015, aspect=12)
    bar.outline.set_visible(False)
    log_axis(bar.ax.yaxis, low, high, scale=False)
    return to_svg(figure, "losses")


def _error(mean: float, se: float | None) -> tuple[float, float]:
    """Return one standard error below and above, limited such that the lower end is positive on a logarithmic axis."""
    return (min(se or 0.0, 0.9 * mean), se or 0.0)


def _scatter(points: Sequence[Point], x_label: str, y_label: str, name: str) -> str | None:
    if len(points) < 2:
        return None
    figure, axes = new_figure(4.6, 3.3)
    for point in points:
        color = PALETTE[point.style % len(PALETTE)]
        axes.errorbar(
            [point.x], [point.y], xerr=[[e] for e in point.x_error], yerr=[[e] for e in point.y_error], color=color,
            fmt=MARKERS[point.style % len(MARKERS)], markersize=6.5, elinewidth=1.1, markeredgecolor=PAPER, markeredgewidth=0.6,
        )  # fmt: skip
    log_axis(axes.yaxis, min(p.y for p in points), max(p.y for p in points))
    axes.margins(x=0.12, y=0.15)
    axes.set_xlim(left=max(0.0, axes.get_xlim()[0]))
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    label_points(figure, axes, points)
    return to_svg(figure, name)


def label_points(figure: Any, axes: Any, points: Sequence[Point], color: str = INK) -> None:
    """Write each point's name above it, on the side with more space, and higher if it would cover another name."""
    figure.draw_without_rendering()
    box = axes.get_window_extent()
    placed: list[tuple[float, float, float]] = []  # left, right, height of a name
    for point in sorted(points, key=lambda p: p.y):
        x, y = axes.transData.transform((point.x, point.y))
        text, right = _short(point.label), x < box.x0 + 0.55 * box.width
        width = 5.6 * len(text)
        span = (x + 3, x + 3 + width) if right else (x - 3 - width, x - 3)
        height = y + 9
        for left_edge, right_edge, other in placed:
            if span[0] < right_edge and left_edge < span[1] and abs(height - other) < 12:
                height = other + 12
        placed.append((*span, height))
        offset = (3 if right else -3, height - y)
        axes.annotate(
            text,
            (point.x, point.y),
            offset,
            textcoords="offset points",
            va="center",
            ha="left" if right else "right",
            color=color,
        )


def _short(text: str, length: int = 28) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def new_figure(width: float, height: float) -> tuple[Any, Any]:
    """Return a figure of this size in inches and its axes, without registering it globally."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=72, layout="constrained")
    return figure, figure.subplots()


def to_svg(figure: Any, name: str) -> str:
    """Return the figure as SVG without prologue, metadata or fixed colours; ids start with ``name``."""
    import matplotlib as mpl

    out = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": name}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # the browser draws the text with its own fonts
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    svg = out.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    for color, variable in ((INK, "--ink"), (SOFT, "--line"), (PAPER, "--paper")):
        svg = svg.replace(color, f"var({variable})")
    svg = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    return re.sub(r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', rf'<svg viewBox="\1" role="img" data-plot="{name}">', svg, count=1)
