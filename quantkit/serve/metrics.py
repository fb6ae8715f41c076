"""Metrics in Prometheus' text format (prometheus.io/docs/instrumenting/exposition_formats)."""

from bisect import bisect_left
from collections.abc import Iterable


class Histogram:
    """A histogram: the number of values up to each bound, their sum and their total number.

    Args:
        bounds: ascending upper bounds, in the unit of the values.
    """

    def __init__(self, *bounds: float) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        """Add a value."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def lines(self, name: str, what: str) -> Iterable[str]:
        """Yield the lines of the metric."""
        yield from _head(name, what, "histogram")
        total = 0
        for bound, count in zip((*self._bounds, "+Inf"), self._counts, strict=True):
            total += count
            yield f'{name}_bucket{{le="{bound}"}} {total}'
        yield f"{name}_sum {self._sum:.6f}"
        yield f"{name}_count {total}"


def counter(name: str, what: str, values: dict[str, float] | float, label: str = "") -> Iterable[str]:
    """Yield the lines of a counter; with a mapping, one line per value of ``label``."""
    yield from _metric(name, what, "counter", values, label)


def gauge(name: str, what: str, value: float) -> Iterable[str]:
    """Yield the lines of a gauge."""
    yield from _metric(name, what, "gauge", value, "")


def _metric(name: str, what: str, kind: str, values: dict[str, float] | float, label: str) -> Iterable[str]:
    yield from _head(name, what, kind)
    if isinstance(values, dict):
        yield from (f'{name}{{{label}="{key}"}} {value}' for key, value in sorted(values.items()))
    else:
        yield f"{name} {values}"


def _head(name: str, what: str, kind: str) -> Iterable[str]:
    yield f"# HELP {name} {what}"
    yield f"# TYPE {name} {kind}"
