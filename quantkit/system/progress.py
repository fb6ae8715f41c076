"""Progress of long operations, reported through a callback; by default a bar for each stage, on a terminal or in a notebook."""

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from quantkit.errors import QuantkitError

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


ProgressChoice = ProgressCallback | Literal["auto"] | None
"""What users say: ``"auto"`` for bars, None for silence, or a callback."""


def ignore(event: Progress) -> None:
    """Discard an event."""


class Bars:
    """Shows a bar (tqdm) for each stage, on a terminal and in a notebook; nothing where there is neither.

    ``TQDM_DISABLE=1`` in the environment turns it off.
    """

    def __init__(self) -> None:
        self._stage = ""
        self._bar: Any = None

    def __call__(self, event: Progress) -> None:
        """Show an event."""
        if self._bar is None or event.stage != self._stage or event.done < self._bar.n:
            self.close()
            self._stage, self._bar = event.stage, _new_bar(event)
        self._bar.total = event.total
        self._bar.set_postfix_str(
            event.detail if event.loss is None else f"{event.detail}, loss {event.loss:.1e}", refresh=False
        )
        self._bar.update(event.done - self._bar.n)
        if event.done >= event.total:
            self.close()

    def close(self) -> None:
        """Leave the bar as it is."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def _new_bar(event: Progress) -> Any:
    from tqdm.auto import tqdm

    notebook = tqdm.__mro__[1].__module__ == "tqdm.notebook"
    off = os.environ.get("TQDM_DISABLE", "").lower() in ("1", "true", "yes")
    return tqdm(desc=event.stage, total=event.total, disable=off or (False if notebook else None))


def callback(choice: ProgressChoice) -> ProgressCallback:
    """Return the callback that a user's choice means.

    Raises:
        QuantkitError: it means none.
    """
    if choice is None:
        return ignore
    if choice == "auto":
        return Bars()
    if not callable(choice):
        raise QuantkitError(f"progress={choice!r}: want 'auto' for bars, None for silence, or a function of one Progress")
    return choice
