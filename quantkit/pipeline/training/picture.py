"""A picture of a training run: the loss of every update, and that of the held-out windows."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from quantkit.errors import QuantkitError
from quantkit.system.figures import log_axis, self_showing

TRAINED, HELD_OUT = "#0072b2", "#d55e00"
"""Colours, distinct to colour-blind readers (after Okabe and Ito, 2008)."""

_SMOOTH = 20
"""A line through the losses of single updates averages over so many of them, or over a tenth of all if those are fewer."""


def draw(course: Mapping[str, Any]) -> Any:
    """Return a figure of what :meth:`quantkit.pipeline.training.loop.History.facts` holds; in a notebook it shows itself.

    Raises:
        QuantkitError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise QuantkitError("a picture needs matplotlib; pip install matplotlib") from error
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    draw_course(figure.subplots(), course)
    return self_showing(figure)


def draw_course(axes: Any, course: Mapping[str, Any], paper: str = "white") -> None:
    """Draw both losses over the number of updates; ``paper`` is the colour behind them."""
    key, name = shown_loss(course)
    losses = [(step, value) for step, value in enumerate(course[key]) if value is not None and value > 0]
    held = [(one["steps"], one[key]) for one in course["evaluations"] if one[key] is not None and one[key] > 0]
    if losses:
        steps, values = zip(*losses, strict=True)
        axes.plot(steps, values, ".", color=TRAINED, markersize=3, alpha=0.45)
        axes.plot(steps, smoothed(values), color=TRAINED, linewidth=1.6, label="text that is trained on")
    if held:
        axes.plot(*zip(*held, strict=True), "o-", color=HELD_OUT, markeredgecolor=paper, linewidth=1.6, label="held out")
        axes.axvline(course["best_after"], color=HELD_OUT, linewidth=0.8, linestyle=":")
    if shown := [value for _, value in (*losses, *held)]:
        log_axis(axes.yaxis, min(shown), max(shown))
        axes.legend(frameon=False, loc="upper right")
    axes.set_xlabel("updates")
    axes.set_ylabel(f"{name}, nats per token")


def shown_loss(course: Mapping[str, Any]) -> tuple[str, str]:
    """Return the key of the loss that is shown, and its name: the KL where there is a teacher."""
    return ("kl", "KL") if any(one["kl"] is not None for one in course["evaluations"]) else ("nll", "NLL")


def smoothed(values: Sequence[float]) -> list[float]:
    """Return the mean of every value and those around it, fewer of them towards both ends, so that no end is pulled."""
    reach = min(_SMOOTH, max(1, len(values) // 10)) // 2
    sums = np.concatenate(([0.0], np.cumsum(values)))
    found = []
    for i in range(len(values)):
        near = min(reach, i, len(values) - 1 - i)
        found.append(float(sums[i + near + 1] - sums[i - near]) / (2 * near + 1))
    return found
