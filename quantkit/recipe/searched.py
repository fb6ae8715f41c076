"""The search of a recipe, and what it leaves on the disk: the plan is found once, however often the run is interrupted.

A plan that was found is written at once, to ``search.next.json`` in the output directory, with the key of everything that
decides it; when the checkpoint is whole it becomes ``search.json``. A run that is given again goes on with either, if the key
is its own, and does not search. A checkpoint that is there keeps its own ``search.json`` until another has taken its place.
"""

import logging
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from quantkit.checkpoint import Key
from quantkit.checkpoint.state import EXPECTED
from quantkit.errors import FormatError
from quantkit.mixed.recorded import PLAN_FILE, Searched, load_plan, read_key, save_plan
from quantkit.mixed.search import search
from quantkit.pipeline.again import OF_THE_INPUT, is_complete
from quantkit.pipeline.plan import Resolution
from quantkit.pipeline.resume import run_key
from quantkit.recipe.schema import Recipe
from quantkit.system.files import clear_errors
from quantkit.system.progress import ProgressCallback, told

log = logging.getLogger(__name__)

NEXT_FILE = "search.next.json"
"""Name of a plan that is being carried out."""


def searched(recipe: Recipe, asked: Searched, model: Any, tokenizer: Any, progress: ProgressCallback) -> Resolution:
    """Return the plan that is searched for, or the one that an earlier run of the same recipe has found for this output.

    Args:
        recipe: the recipe, whose output directory this thread has claimed.
        asked: its scheme.
        model: the float model; an empty one (on the meta device) has been replaced by the finished checkpoint.
        tokenizer: its tokenizer.
        progress: receives the events of the search.

    Raises:
        FormatError: the output holds a checkpoint of another recipe, which may not be replaced.
    """
    out = Path(str(recipe.output.path))
    method, batches = recipe.method.build(), recipe.calibration.batches(tokenizer)
    replaced = model.device.type == "meta"
    about = {
        "search": repr(
            (asked, tuple(recipe.rules), recipe.output.formats, recipe.output.fused, recipe.run.compute or recipe.run.device)
        ),
        **run_key(model, {}, (method,), batches, tokenizer=tokenizer),
    }
    ignored = OF_THE_INPUT if replaced else ()
    for file, ignore in ((out / NEXT_FILE, ()), (out / PLAN_FILE, ignored)):
        if file.is_file() and recipe.run.resume and not _differing(read_key(file), about, ignore):
            told.info("continuing with the plan that was found before (%s)", file)
            return load_plan(file)
    if out.is_dir() and is_complete(out) and (replaced or not recipe.output.overwrite):
        return _of_another_version(out, about, ignored)
    found = search(
        model,
        asked.budget,
        asked.choices,
        method=method,
        rules=recipe.rules,
        include=asked.include,
        calibration=replace(recipe.calibration, data=batches),
        scoring=asked.scoring,
        output=recipe.output,
        run=replace(recipe.run, progress=progress),
        tokenizer=tokenizer,
    )
    save_plan(out / NEXT_FILE, found, about)
    return found


def carried_out(out: Path) -> None:
    """Put the plan that was found beside the checkpoint that was made of it."""
    if (out / NEXT_FILE).is_file():
        with clear_errors(f"write {out / PLAN_FILE}"):
            os.replace(out / NEXT_FILE, out / PLAN_FILE)


def _of_another_version(out: Path, about: Key, ignored: tuple[str, ...]) -> Resolution:
    """Return the plan of the checkpoint that is there, if only the software has changed since.

    Raises:
        FormatError: it is of something else.
    """
    file = out / PLAN_FILE
    other = _differing(read_key(file), about, (*EXPECTED, *ignored)) if file.is_file() else [f"there is no {PLAN_FILE}"]
    if other:
        raise FormatError(
            f"{out} already holds a model, of another search: {', '.join(other)}; choose another directory, or pass "
            "overwrite=True"
        )
    return load_plan(file)


def _differing(there: Key, here: Key, ignored: tuple[str, ...]) -> list[str]:
    """Return the topics of two keys that differ."""
    return sorted(topic for topic in {*there, *here} - {*ignored} if there.get(topic) != here.get(topic))
