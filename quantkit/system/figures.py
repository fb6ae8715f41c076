"""What matplotlib's figures need: they show themselves in a notebook, and logarithmic axes have plain numbers."""

import io
from typing import Any


def self_showing(figure: Any) -> Any:
    """Return a matplotlib figure that a notebook shows as a picture; one that ``pyplot`` does not know is only named there."""

    def png() -> bytes:
        out = io.BytesIO()
        figure.savefig(out, format="png", dpi=80)
        return out.getvalue()

    figure._repr_png_ = png
    return figure


def log_axis(axis: Any, low: float, high: float, *, scale: bool = True) -> None:
    """Make an axis logarithmic, with plain numbers at decades, and also at 2 and 5 if the range is short."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

    if scale:
        getattr(axis.axes, f"set_{axis.axis_name}scale")("log")
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high < 40 * low else (1.0,)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())
