"""Loss against cost: every row a point, the rows that none beats joined by a line, the float model a dashed one."""

from dataclasses import dataclass
from typing import Any, NamedTuple

from quantkit.report.plots import INK, MARKERS, PALETTE, PAPER, SOFT, STYLE, Point, label_points, new_figure, to_svg
from quantkit.system.figures import log_axis


class Colors(NamedTuple):
    """Colours of text, of lines that step back, and of the ground."""

    ink: str
    soft: str
    paper: str


ON_PAGE, ON_PAPER = Colors(INK, SOFT, PAPER), Colors("#1b1f24", "#dfe3e8", "#ffffff")
"""Placeholders of a page's own colours, and plain ones for a figure that stands alone."""


@dataclass(frozen=True, slots=True)
class TradeOff:
    """What is drawn.

    Attributes:
        points: name, cost, loss, and as ``style`` the number of its family.
        frontier: names of the points that none beats.
        families: what the colours mean.
        x_label, y_label: what cost and loss are.
        float_x, float_y: of the float model, where there is a line to draw.
    """

    points: tuple[Point, ...]
    frontier: frozenset[str]
    families: tuple[str, ...]
    x_label: str
    y_label: str
    float_x: float | None = None
    float_y: float | None = None


def figure_of(picture: TradeOff) -> Any:
    """Return a matplotlib figure that stands alone."""
    import matplotlib as mpl

    with mpl.rc_context(_style(ON_PAPER)):
        figure = _draw(picture, ON_PAPER, (8.0, 5.2))
    figure.set_dpi(110)
    return figure


def svg_of(picture: TradeOff, name: str) -> str:
    """Return SVG with a page's colours; ids in it start with ``name``."""
    import matplotlib as mpl

    with mpl.rc_context(_style(ON_PAGE)):
        return to_svg(_draw(picture, ON_PAGE, (6.4, 4.4)), name)


def _style(colors: Colors) -> Any:
    of = {INK: colors.ink, SOFT: colors.soft}
    return {key: of.get(value, value) if isinstance(value, str) else value for key, value in STYLE.items()}


def _draw(picture: TradeOff, colors: Colors, size: tuple[float, float]) -> Any:
    from matplotlib.ticker import LogLocator

    figure, axes = new_figure(*size)
    figure.set_facecolor("none" if colors is ON_PAGE else colors.paper)
    axes.set_facecolor("none")
    best = sorted((one for one in picture.points if one.label in picture.frontier), key=lambda one: (one.x, -one.y))
    axes.plot([one.x for one in best], [one.y for one in best], color=colors.ink, linewidth=1.2, zorder=1, label="frontier")
    for number, family in enumerate(picture.families):
        mine = [one for one in picture.points if one.style == number]
        color, marker = PALETTE[number % len(PALETTE)], MARKERS[number % len(MARKERS)]
        for index, one in enumerate(mine):
            axes.errorbar(
                [one.x], [one.y], yerr=[[e] for e in one.y_error], color=color, fmt=marker,
                markersize=8 if one.label in picture.frontier else 5.5, elinewidth=1.1, markeredgewidth=0.8,
                markerfacecolor=color if one.label in picture.frontier else colors.paper,
                markeredgecolor=color, label=family if not index else None,
            )  # fmt: skip
    costs = [one.x for one in picture.points]
    if picture.float_x is not None:
        axes.axvline(picture.float_x, color=colors.ink, linestyle="--", linewidth=1, alpha=0.6, label="float model")
        costs.append(picture.float_x)
    if picture.float_y is not None:
        alone = "float model" if picture.float_x is None else None
        axes.axhline(picture.float_y, color=colors.ink, linestyle="--", linewidth=1, alpha=0.6, label=alone)
    losses = [one.y for one in picture.points]
    log_axis(axes.yaxis, min(losses), max(losses))
    if max(costs) > 3 * min(costs) > 0:
        log_axis(axes.xaxis, min(costs), max(costs))
        axes.xaxis.set_major_locator(LogLocator(base=2, subs=(1.0, 1.5)))  # 2, 3, 4, 6, 8, 12, 16: what bits are counted in
    axes.margins(x=0.1, y=0.12)
    axes.set_xlabel(picture.x_label)
    axes.set_ylabel(picture.y_label)
    axes.legend(frameon=False, fontsize=8.5, labelcolor=colors.ink)
    label_points(figure, axes, [one for one in picture.points if one.label in picture.frontier], colors.ink)
    return figure
