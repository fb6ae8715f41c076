"""sweep(): every product of schemes and quantizers, from one calibration, scored on the same tokens, row by row on the disk."""

import contextlib
import dataclasses
import functools
import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict, Unpack

from pydantic import ValidationError
from torch import nn

from quantkit import checkpoint
from quantkit.calibrate.data import Calibration
from quantkit.checkpoint import Key
from quantkit.errors import CalibrationError, QuantkitError, SpecError, nearest
from quantkit.mixed import search
from quantkit.pipeline.checks import check_settings
from quantkit.pipeline.plan import Resolution, scale_dtype_for
from quantkit.pipeline.rules import Rule, SchemeChoice
from quantkit.pipeline.settings import Output, Run
from quantkit.quantizers.base import Quantizer
from quantkit.spec import Scheme
from quantkit.sweeps.axes import Axes, Calibrate, Entry, SchemeLike, entries
from quantkit.sweeps.bench import Bench, Setup
from quantkit.sweeps.budgets import Search, plans_for
from quantkit.sweeps.result import SweepResult
from quantkit.sweeps.rows import SweepRow
from quantkit.sweeps.schema import Keep, Scoring, SweepRecipe
from quantkit.sweeps.store import Store
from quantkit.system.keywords import check_names
from quantkit.system.progress import Progress, ProgressChoice
from quantkit.transforms.base import Step

log = logging.getLogger(__name__)

DEFAULT_CALIBRATION, DEFAULT_SCORING, DEFAULT_RUN, DEFAULT_OUTPUT = Calibration(), Scoring(), Run(), Output()


class SweepOptions(TypedDict, total=False):
    """The less common keyword options of :func:`sweep`, which documents them."""

    steps: Sequence[Sequence[str | Step]]
    rules: Sequence[Rule]
    calibrate: Calibrate
    keep: Keep
    output: Output
    run: Run
    tokenizer: Any
    dtype: str
    ray: bool | Mapping[str, Any]
    search: Search


def sweep(
    model: nn.Module | str | Path,
    schemes: Sequence[SchemeLike] = (),
    quantizers: Sequence[str | Quantizer] = ("gptq",),
    *,
    budgets: Sequence[str] = (),
    choices: Sequence[str | Scheme | SchemeChoice] = (),
    out: str | Path | None = None,
    calibration: Calibration = DEFAULT_CALIBRATION,
    evaluate: Scoring | Mapping[str, Any] = DEFAULT_SCORING,
    **options: Unpack[SweepOptions],
) -> SweepResult:
    """Quantize a model in many ways, and score all of them against it on the same tokens.

    Rows are the products of schemes (and of the plans found for budgets), quantizers and steps, and the float model. A row that
    fails does not lose the others. Every finished row is in ``out``: the same call continues where it was killed, and measures
    nothing twice; further schemes or quantizers cost only their own rows.

    Args:
        model: a transformers model (not changed), or a hub id, directory, GGUF file, or ``"demo"``.
        schemes: what :func:`quantkit.quantize` takes as scheme: presets, schemes, plans.
        quantizers: by name or as instances with options.
        budgets: sizes or times, such as ``"4.25 bpw"`` or ``"100 MB"``, for each of which the best plan is searched.
        choices: the schemes that such a plan may give to layers, ``"float"`` among them; empty for those of the search.
        out: directory of the sweep; None keeps nothing on the disk. The same as ``output.path``.
        calibration: the text.
        evaluate: how rows are scored, as ``evaluate`` in a recipe: a mapping with ``data``, ``column``, ``template``,
            ``windows`` (16), ``length`` (512) and ``latency`` (False), which times decoding, too.
        **options: any of the following keyword arguments.
            ``steps``: variants of what else is done, each a list: ``[[], ["awq"], ["distill"]]``.
            ``rules``: as for :func:`quantkit.quantize`, of every scheme and budget, not of plans that are given.
            ``calibrate`` (``"once"``): ``"once"`` collects statistics of the float model's inputs for all quantizers that can
            work with them; ``"each"`` runs the text for every row, through the layers quantized so far, which is slower and a
            little better. Every row says which it was.
            ``keep`` (``"none"``): whether checkpoints stay, of ``"all"`` rows or of those on the ``"frontier"``.
            ``output``: format of kept checkpoints; ``overwrite=True`` replaces another sweep in the directory.
            ``run``: strictness, resuming, device, progress.
            ``tokenizer``: of a model that is given as such.
            ``dtype`` (``"auto"``): in which a model is loaded.
            ``ray`` (False): make rows as tasks of a Ray cluster that shares ``out`` (extra ``ray``); a mapping has options of
            the tasks, such as ``{"num_cpus": 4}``.
            ``search`` (:func:`quantkit.search`): what finds the plan of a budget.

    Returns:
        The table: :class:`SweepResult`.

    Raises:
        SpecError: unknown names, empty axes, one row twice, no row that can be: before anything is calibrated.
        FormatError: ``out`` holds something else, or another sweep.
        BusyError: another process is sweeping there.
    """
    check_names("sweep", options, SweepOptions.__optional_keys__)
    check_settings(calibration, options.get("output"), options.get("run"))
    axes = Axes.check(schemes, quantizers, options.get("steps", [()]), budgets, choices)
    output, keep = options.get("output", DEFAULT_OUTPUT).to(out), options.get("keep", "none")
    calibrate, ray = options.get("calibrate", "once"), options.get("ray", False)
    _refuse(model, output, keep, calibrate, calibration, ray)
    with _directory(output) as directory, checkpoint.claim(directory, "sweeping"):
        setup = Setup(
            model=model,
            dtype=options.get("dtype", "auto"),
            tokenizer=options.get("tokenizer"),
            calibration=calibration,
            scoring=_scoring(evaluate),
            output=output,
            run=options.get("run", DEFAULT_RUN),
            keep=keep,
            directory=directory,
        )
        find = functools.partial(plans_for, find=options.get("search", search))
        _make_rows(setup, axes, list(options.get("rules", ())), calibrate, ray, find)
        result = SweepResult.load(directory)
        return result if output.path is not None else dataclasses.replace(result, directory=None)


def run_sweep(recipe: SweepRecipe, progress: ProgressChoice = "auto", *, ray: bool | Mapping[str, Any] = False) -> SweepResult:
    """Carry out a sweep that was read by :func:`load_sweep`; an interrupted one is continued."""
    return sweep(
        recipe.model,
        recipe.schemes,
        [one.build() for one in recipe.quantizers],
        budgets=recipe.budgets,
        choices=recipe.choices,
        calibration=recipe.calibration,
        evaluate=recipe.evaluate,
        steps=[[step.build() for step in variant] for variant in recipe.steps],
        rules=recipe.rules,
        calibrate=recipe.calibrate,
        keep=recipe.keep,
        output=recipe.output,
        run=dataclasses.replace(recipe.run, progress=progress),
        dtype=recipe.dtype,
        ray=ray,
    )


def _refuse(
    model: Any, output: Output, keep: str, calibrate: str, calibration: Calibration, ray: bool | Mapping[str, Any]
) -> None:
    if keep not in ("none", "frontier", "all"):
        raise SpecError(f"keep={keep!r}: want none, frontier or all")
    if calibrate not in ("once", "each"):
        raise SpecError(f"calibrate={calibrate!r}: want once or each")
    if keep != "none" and output.path is None:
        raise SpecError(f"keep={keep!r} without a directory to keep checkpoints in; give out=")
    if output.also:
        raise SpecError("a sweep keeps checkpoints in one format; quantkit convert writes those that you choose in others")
    if calibration.statistics is not None:
        raise CalibrationError("statistics= in the calibration of a sweep, which collects its own, once; give the text")
    if ray is not False and output.path is None:
        raise SpecError("ray without a directory that the machines share; give out=")
    if ray is not False and isinstance(model, nn.Module):
        raise SpecError("ray with a loaded model, which is not sent to other machines; give its name or directory")


def _scoring(given: Scoring | Mapping[str, Any]) -> Scoring:
    if isinstance(given, Scoring):
        return given
    try:
        return Scoring.model_validate(dict(given))
    except ValidationError as error:
        lines = []
        for item in error.errors(include_url=False):
            name = ".".join(map(str, item["loc"]))
            unknown = item["type"] == "extra_forbidden"
            lines.append(f"evaluate: {name}: {nearest(name, Scoring.model_fields) if unknown else item['msg']}")
        raise CalibrationError("\n".join(lines)) from None


@contextlib.contextmanager
def _directory(output: Output) -> Iterator[Path]:
    """Yield where the sweep is; without a path, a place that goes afterwards."""
    if output.path is not None:
        yield Path(output.path)
        return
    with tempfile.TemporaryDirectory(prefix="quantkit-sweep-") as folder:
        yield Path(folder)


def _make_rows(
    setup: Setup,
    axes: Axes,
    rules: list[Rule],
    calibrate: Calibrate,
    ray: bool | Mapping[str, Any],
    find: Callable[[Bench, Axes, Sequence[Rule]], dict[str, Resolution]],
) -> None:
    """Make every row that is not finished."""
    store, report = Store(setup.directory), setup.run.report
    store.refuse_strangers()
    bench = Bench.open(setup)
    store.check(bench.about, overwrite=setup.output.overwrite)
    if not setup.run.resume:
        store.remove()
    written = setup.output if setup.keep != "none" else Output()
    found = entries(
        axes,
        bench.structure,
        find(bench, axes, rules),
        scale_dtype=scale_dtype_for(bench.model.dtype, *written.formats),
        rules=rules,
        calibrate=calibrate,
        output=written,
        strict=setup.run.strict,
        answers_only=setup.calibration.answers_only,
    )
    keys = [bench.key(entry) for entry in found]
    store.begin(bench.about, found, keys, overwrite=setup.output.overwrite)
    possible = [(entry, key) for entry, key in zip(found, keys, strict=True) if entry.row.status != "skipped"]
    todo = [(number, *pair) for number, pair in enumerate(possible, start=1) if not store.finished(*pair)]
    todo.sort(key=lambda one: max(store.begun(one[1]) - 1, 0))  # a row that killed the process twice comes after the others
    needs = sorted({need for entry, _ in possible for need in entry.needs})
    if any(entry.needs for _, entry, _ in todo):
        bench.collect(needs, report)
    statistics = bench.statistics_path(needs)

    def say(number: int, entry: Entry) -> None:
        text = f"row {number} of {len(possible)}: {entry.row.name}"
        report(Progress("sweep", min(number - 1, len(possible)), len(possible), text))

    if ray is False:
        for number, entry, key in todo:
            say(number, entry)
            make_row(bench, entry, key, statistics)
            _prune(setup)
    elif todo:
        from quantkit.sweeps.cluster import make_rows

        make_rows(setup, todo, statistics, dict(ray) if isinstance(ray, Mapping) else {}, say)
    _prune(setup)
    report(Progress("sweep", len(possible), len(possible), "done"))


def make_row(bench: Bench, entry: Entry, key: Key, statistics: Path) -> SweepRow:
    """Make one row and write it; one that fails says why."""
    store = Store(bench.setup.directory)
    store.mark_begun(entry)
    try:
        row = bench.measure(entry, statistics, bench.setup.run.report)
    except Exception as error:  # whatever it is, it is this row's alone
        kind = "" if isinstance(error, QuantkitError) else f"{type(error).__name__}: "
        log.warning("row %s failed: %s%s", entry.row.name, kind, error)
        log.debug("row %s", entry.row.name, exc_info=True)
        row = dataclasses.replace(entry.row, status="failed", reason=f"{kind}{error}")
    store.write(entry, row, key)
    return row


def _prune(setup: Setup) -> None:
    """Remove checkpoints of rows that another row has beaten in bytes and KL."""
    if setup.keep != "frontier":
        return
    store = Store(setup.directory)
    rows = store.rows()
    best = {row.name for row in SweepResult(tuple(row for _, row in rows)).frontier()}
    for id, row in rows:
        if row.status == "done" and row.name not in best:
            store.drop_checkpoint(id)
