"""The course of a training run on a page: the loss of every update, and what the held-out windows said now and then."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quantkit.errors import CalibrationError
from quantkit.pipeline.training.picture import draw_course, shown_loss
from quantkit.pipeline.training.state import course_so_far
from quantkit.report import plots
from quantkit.report.cells import significant
from quantkit.system.files import read_json

Course = Mapping[str, Any]
"""What ``metadata["training"]`` of :func:`quantkit.train`'s result holds."""


def course_of(trained: Course | str | Path) -> Course | None:
    """Return the course of a run: of a result's metadata, a finished checkpoint, or a directory that is still trained into.

    Returns:
        None for a directory in which nothing has been trained.

    Raises:
        CalibrationError: a mapping without the losses.
    """
    if isinstance(trained, Mapping):
        if missing := [name for name in ("kl", "nll", "evaluations", "best_after") if name not in trained]:
            raise CalibrationError(f'training=: {missing[0]!r} is missing; give metadata["training"] of the result of train()')
        return trained
    if (at_work := course_so_far(Path(trained))) is not None:
        return at_work
    config = Path(trained) / "config.json"
    found: Course | None = read_json(config).get("quantkit", {}).get("training") if config.is_file() else None
    return found


def headline(course: Course) -> str:
    """Return what training has reached, in a sentence."""
    name, first, best = _reached(course)
    if best is None or first is None:
        return f"{len(course['kl'])} updates, not evaluated yet."
    return (
        f"Trained for {len(course['kl']):,} updates: {name} on held-out text goes from {significant(first)} to "
        f"{significant(best)} nats per token, best after {course['best_after']:,}."
    )


def section(course: Course) -> dict[str, Any]:
    """Return the data of the page's section."""
    from markupsafe import Markup

    rows = [
        (f"{one['steps']:,}", *(significant(one[name]) if one[name] is not None else "" for name in ("kl", "nll")))
        for one in course["evaluations"]
    ]
    best = f"{course['best_after']:,}"
    return {"headline": headline(course), "figure": Markup(_drawn(course)), "rows": rows, "best": best}


def _reached(course: Course) -> tuple[str, float | None, float | None]:
    """Return the name of the loss, and its value on the held-out windows at the start and at its best."""
    key, name = shown_loss(course)
    evaluations = course["evaluations"]
    first = next((one[key] for one in evaluations if one["steps"] == 0), None)
    found = [one[key] for one in evaluations if one["steps"] == course["best_after"] and one[key] is not None]
    return name, first, min(found, default=None)


@plots.styled
def _drawn(course: Course) -> str:
    figure, axes = plots.new_figure(9.9, 3.2)
    draw_course(axes, course, plots.PAPER)
    return plots.to_svg(figure, "training")


RELOAD_S = 20
"""Seconds after which a browser loads the page of a run at work again."""


class LivePage:
    """Write the page of a run anew whenever its state on the disk has changed; give it every progress event.

    Args:
        out: where the run's checkpoint goes.
        page: the file to write; browsers that show it load it again by themselves until the run is over.
        title: heading of the page.
    """

    def __init__(self, out: Path, page: Path, title: str) -> None:
        self.out, self.page, self.title = out, page, title
        self._seen: Course | None = None

    def __call__(self, *, over: bool = False) -> None:
        """Look at the disk; ``over`` writes the page a last time."""
        from quantkit.report.page import write_html

        course = course_of(self.out)
        if course is not None and (over or course != self._seen):
            self._seen = course
            write_html(self.page, [], training=course, title=self.title, reload_s=0 if over else RELOAD_S)
