"""Pictures of a searched plan: how sensitive every layer is and what it got, and where the plan lies among those of all sizes.

They are drawn from what :mod:`quantkit.mixed.recorded` keeps, so that a plan on the disk can be shown without its model.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantkit.errors import QuantkitError
from quantkit.mixed.result import Point, SearchResult, kind_of
from quantkit.system.figures import log_axis, self_showing

HERE = "#d55e00"
"""Colour of the plan itself; the rest is from viridis, light for few bits."""


def draw(found: SearchResult) -> Any:
    """Return a figure with all three; in a notebook it shows itself.

    Raises:
        QuantkitError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise QuantkitError("a picture needs matplotlib; pip install matplotlib") from error
    rows = found.rows()
    height = 1.1 + 0.34 * len({kind_of(row["layers"]) for row in rows})
    figure = Figure(figsize=(12, max(2 * height, 4.4)), layout="constrained")
    panels = figure.subplot_mosaic([["why", "size"], ["what", "size"]], width_ratios=(8, 5))
    draw_sensitivity(panels["why"], rows)
    draw_choices(panels["what"], rows, found.choice_names())
    draw_frontier(panels["size"], found.frontier, found.point, found.uniform())
    return self_showing(figure)


def draw_sensitivity(axes: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    """Draw kinds of layer by blocks, coloured by what the smallest choice would cost a million weights."""
    from matplotlib.colors import LogNorm

    grid = _grid(axes, [(row["layers"], row["sensitivity"]) for row in rows])
    seen = grid[grid > 0]
    low, high = (float(seen.min()), float(seen.max())) if seen.size else (1.0, 1.0)
    image = axes.pcolormesh(np.ma.masked_less_equal(grid, 0), cmap="magma", norm=LogNorm(low, max(high, 1.01 * low)))
    axes.set_title("sensitivity: expected KL of the smallest choice, nats per million weights", fontsize="medium", loc="left")
    bar = axes.figure.colorbar(image, ax=axes, pad=0.01, aspect=12)
    log_axis(bar.ax.yaxis, low, max(high, 1.01 * low), scale=False)


def draw_choices(axes: Any, rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> None:
    """Draw kinds of layer by blocks, coloured by choice.

    Args:
        axes: are drawn into.
        rows: of the plan.
        names: the choices, the smallest first; those that no layer got are left out.
    """
    import matplotlib as mpl
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    weights = {name: sum(row["weights"] for row in rows if row["choice"] == name) for name in names}
    used = [name for name in names if weights[name]] + sorted({row["choice"] for row in rows} - {*names})
    shades = mpl.colormaps["viridis_r"](np.linspace(0.08, 0.92, len(used)))
    grid = _grid(axes, [(row["layers"], used.index(row["choice"])) for row in rows])
    axes.pcolormesh(np.ma.masked_invalid(grid), cmap=ListedColormap(shades), vmin=-0.5, vmax=len(used) - 0.5)
    axes.set_title("what it got, and the share of all weights", fontsize="medium", loc="left")
    axes.set_xlabel("block")
    total = sum(row["weights"] for row in rows)
    share = {name: sum(row["weights"] for row in rows if row["choice"] == name) / total for name in used}
    patches = [Patch(color=shade, label=f"{name} ({share[name]:.0%})") for name, shade in zip(used, shades, strict=True)]
    axes.figure.legend(handles=patches, frameon=False, loc="outside lower left", ncols=min(4, len(used)), fontsize="small")


def draw_frontier(axes: Any, frontier: Sequence[Point], here: Point, uniform: Mapping[str, Point]) -> None:
    """Draw expected KL against bits: the best plans of all sizes, this one, and every layer alike for comparison."""
    points = [point for point in frontier if point.kl > 0]
    axes.plot([p.bits_per_weight for p in points], [p.kl for p in points], marker=".", linewidth=1, label="best plans")
    alike = {name: point for name, point in uniform.items() if point.kl > 0}
    if alike:
        x, y = [p.bits_per_weight for p in alike.values()], [p.kl for p in alike.values()]
        axes.plot(x, y, "x", color="gray", label="one scheme for all")
    middle = (frontier[0].bits_per_weight + frontier[-1].bits_per_weight) / 2
    for name, point in alike.items():
        left = point.bits_per_weight > middle
        place: Any = {"xytext": (-5 if left else 5, 4), "ha": "right" if left else "left", "textcoords": "offset points"}
        axes.annotate(name, (point.bits_per_weight, point.kl), fontsize="x-small", **place)
    axes.plot([here.bits_per_weight], [here.kl], "o", color=HERE, label="this plan")
    losses = [point.kl for point in (*points, *alike.values())] or [1.0]
    log_axis(axes.yaxis, min(losses), max(losses))
    axes.set(xlabel="bits per weight", ylabel="expected KL, nats per token")
    axes.margins(x=0.12)
    axes.legend(frameon=False)


def _grid(axes: Any, cells: Sequence[tuple[str, float]]) -> NDArray[np.float64]:
    """Return values as kinds by blocks, NaN where there is none, and label the axes; layers outside blocks are in column 0."""
    kinds = list(dict.fromkeys(kind_of(name) for name, _ in cells))
    numbers = [re.search(r"\.(\d+)\.", f".{name}") for name, _ in cells]
    blocks = [int(found[1]) if found else 0 for found in numbers]
    grid = np.full((len(kinds), max(blocks) + 1), np.nan)
    for (name, value), block in zip(cells, blocks, strict=True):
        place = kinds.index(kind_of(name)), block
        grid[place] = np.nanmax([grid[place], value])
    axes.set_yticks(np.arange(len(kinds)) + 0.5, [_short(kind) for kind in kinds], fontsize="small")
    step = -(-grid.shape[1] // 16)
    axes.set_xticks(np.arange(0, grid.shape[1], step) + 0.5, [str(block) for block in range(0, grid.shape[1], step)])
    axes.invert_yaxis()
    axes.grid(False)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return grid


def _short(kind: str) -> str:
    """Return what a kind is called beside a picture: ``self_attn.{q_proj,k_proj,v_proj}`` is ``q, k, v``."""
    name = re.sub(r"_proj\b", "", re.sub(r"^(self_attn|attn|mlp|feed_forward)\.", "", kind)).strip("{}").replace(",", ", ")
    return name if len(name) <= 28 else f"{name[:27]}…"
