"""A picture of a searched plan: which layer got how many bits, and where the plan lies among the best of all sizes."""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from quantkit.errors import QuantkitError

if TYPE_CHECKING:
    from quantkit.mixed.result import SearchResult


def draw(found: "SearchResult") -> Any:
    """Return a figure with two panels; in a notebook it shows itself.

    Raises:
        QuantkitError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise QuantkitError("a picture needs matplotlib; pip install matplotlib") from error
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    _layers(figure, left, found)
    _frontier(right, found)
    return figure


def _layers(figure: Any, axes: Any, found: "SearchResult") -> None:
    """Draw a table of kinds by blocks, coloured by bits."""
    cells: dict[str, dict[int, float]] = {}
    for row in found.rows():
        block = re.search(r"\.(\d+)\.", f".{row['layers']}.")
        kind = re.split(r"\.\d+\.", row["layers"])[-1]
        cells.setdefault(kind, {})[int(block[1]) if block else 0] = row["bits"]
    width = max(max(blocks) for blocks in cells.values()) + 1
    grid: Sequence[Sequence[float]] = [[blocks.get(i, float("nan")) for i in range(width)] for blocks in cells.values()]
    image = axes.imshow(grid, aspect="auto", cmap="viridis", interpolation="nearest")
    axes.set_yticks(range(len(cells)), labels=list(cells))
    axes.set_xlabel("block")
    figure.colorbar(image, ax=axes, label="bits per weight")


def _frontier(axes: Any, found: "SearchResult") -> None:
    points = [point for point in found.frontier if point.kl > 0]
    axes.plot([p.bits_per_weight for p in points], [p.kl for p in points], marker=".", linewidth=1)
    axes.plot([found.point.bits_per_weight], [found.point.kl], "o", color="tab:red", label="this plan")
    axes.set(yscale="log", xlabel="bits per weight", ylabel="expected KL, nats per token")
    axes.legend(frameon=False)
