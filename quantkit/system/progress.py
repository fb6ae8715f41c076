"""Progress of long work, reported through one callback: the library never prints."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Progress:
    """One step of long work.

    Attributes:
        stage: what is going on, e.g. ``"calibrate"``, ``"verify"``.
        done: finished steps.
        total: steps in all.
        detail: what was just finished, e.g. a site name.
        loss: relative output error of that site, if it was quantized against calibration data.
    """

    stage: str
    done: int
    total: int
    detail: str = ""
    loss: float | None = None


ProgressCallback = Callable[[Progress], None]
"""Receives every :class:`Progress` event, in order, from the thread that does the work."""


def ignore(event: Progress) -> None:
    """Discard an event: the default callback."""
