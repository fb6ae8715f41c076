"""Progress of long operations, reported through a callback; the library itself prints nothing."""

import logging
from collections.abc import Callable
from dataclasses import dataclass

told = logging.getLogger("quantkit.told")
"""Of what users want to know without asking, such as that a run goes on after its tenth block; the command shows it."""


@dataclass(frozen=True, slots=True)
class Progress:
    """A progress event.

    Attributes:
        stage: name of the operation, for instance ``"calibrate"`` or ``"verify"``.
        done: number of finished steps.
        total: number of all steps.
        detail: what was just finished, for instance the name of a layer.
        loss: relative output error of that layer, if it was quantized with calibration data.
    """

    stage: str
    done: int
    total: int
    detail: str = ""
    loss: float | None = None


ProgressCallback = Callable[[Progress], None]
"""A function that receives every :class:`Progress` event in order, on the thread of the operation."""


def ignore(event: Progress) -> None:
    """Discard an event; the default callback."""
