"""Signs of life: a bar per stage on a terminal, lines elsewhere, and a line now and then while nothing is heard of the work."""

import contextlib
import threading
import time
from collections.abc import Iterator
from typing import Any, Final

from quantkit.cli.console import console
from quantkit.system.progress import Progress, ProgressCallback

QUIET_S = 10.0
"""Longest time without a line, where there is no terminal to show a bar on."""
LOOK_S = 0.5
"""Time between two looks at whether it has been quiet for so long."""


class Pulse:
    """Says that a command is still at work when nothing else has been said for a while, from a thread of its own."""

    def __init__(self) -> None:
        self._doing: str | None = None
        self._since_s = self._said_s = 0.0
        self._thread: threading.Thread | None = None

    def begin(self, doing: str) -> None:
        """Say from now on that this is being done."""
        self._since_s = self._said_s = time.monotonic()
        self._doing = doing
        if self._thread is None:
            self._thread = threading.Thread(target=self._watch, name="quantkit-pulse", daemon=True)
            self._thread.start()

    def heard(self) -> None:
        """Note that something has been said just now."""
        self._said_s = time.monotonic()

    def end(self) -> None:
        """Say nothing any more."""
        self._doing = None

    def _watch(self) -> None:
        while True:
            time.sleep(LOOK_S)
            doing, now_s = self._doing, time.monotonic()
            if doing is not None and now_s - self._said_s > QUIET_S:
                self._said_s = now_s
                say_quietly(f"{doing}: still at work after {now_s - self._since_s:.0f} s")


PULSE: Final = Pulse()
"""The command's."""


def say_quietly(line: str) -> None:
    """Print a line to standard error as it is, unless the command was told to be quiet."""
    console(stderr=True).print(line, markup=False, highlight=False, soft_wrap=True, style="bright_black")


class _Lines:
    """What is said of progress where there is no terminal: a line per finished stage, and one now and then."""

    def __init__(self) -> None:
        self._began: dict[str, float] = {}
        self._last_event_s = self._last_line_s = time.monotonic()  # a stage begins where the one before it ended
        self._seen = (self._last_event_s, 0)  # when the last line was written, and how far the stage was

    def show(self, event: Progress, *, begins: bool) -> None:
        """Take note of an event, which is the first of its stage if it ``begins``."""
        if begins:
            self._began[event.stage] = self._last_event_s
            self._seen = (self._last_event_s, 0)
        self._last_event_s = now_s = time.monotonic()
        if event.stage not in self._began:
            return
        seconds = now_s - self._began[event.stage]
        if event.done == event.total:
            del self._began[event.stage]
            self._say(f"{event.stage}: {event.total} steps in {seconds:.1f} s")
        elif now_s - self._last_line_s > QUIET_S:
            loss = "" if event.loss is None else f"; {event.detail}: loss {event.loss:.2e}"
            left = self._left(event, now_s)
            self._say(f"{event.stage}: {event.done} of {event.total} steps in {seconds:.1f} s{left}{loss}")
        PULSE.begin(event.stage)

    def _left(self, event: Progress, now_s: float) -> str:
        """Return how long the rest takes at the pace since the last line: blocks of an interrupted run passed in no time."""
        (seen_s, seen), self._seen = self._seen, (now_s, event.done)
        each_s = (now_s - seen_s) / max(event.done - seen, 1)
        return f", about {_duration(each_s * (event.total - event.done))} left" if event.done > seen else ""

    def _say(self, line: str) -> None:
        console(stderr=True).print(line, markup=False, highlight=False)
        self._last_line_s = self._last_event_s


def _duration(seconds: float) -> str:
    """Return a time that is not known exactly, as people say it."""
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


@contextlib.contextmanager
def progress_bars(*, again: bool = False) -> Iterator[ProgressCallback]:
    """Yield a callback that shows one bar per stage; where there is no terminal, lines: per finished stage, and now and then.

    Args:
        again: a stage that begins again uses its bar again, for many runs in a row.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    terminal = console(stderr=True)
    columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    bars = Bars(*columns, TextColumn("{task.fields[detail]}", markup=False), console=terminal, disable=not terminal.is_terminal)
    tasks: dict[str, Any] = {}
    lines = _Lines()

    def show(event: Progress) -> None:
        begins = event.stage not in tasks or event.done < bars.tasks[tasks[event.stage]].completed
        if begins and again and event.stage in tasks:
            bars.reset(tasks[event.stage], total=event.total)
        elif begins:
            tasks[event.stage] = bars.add_task(event.stage, total=event.total, detail="")
        detail = event.detail if event.loss is None else f"{event.detail}  loss {event.loss:.2e}"
        bars.update(tasks[event.stage], completed=event.done, total=event.total, detail=detail)
        if terminal.is_terminal:
            PULSE.end()  # a bar has a clock
        else:
            lines.show(event, begins=begins)

    with bars:
        yield show
