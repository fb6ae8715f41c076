"""What ``quantkit plan`` and ``quantkit run`` do with a recipe."""

import logging
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from quantkit.checkpoint.check import EVALUATION, dtype_name, rejections_in
from quantkit.checkpoint.contents import Contents, contents_of
from quantkit.checkpoint.open import open_model
from quantkit.checkpoint.shared import shared_plan
from quantkit.errors import FormatError, RecipeError, WorkerError
from quantkit.evaluation import EvalReport, evaluate, is_answer
from quantkit.hf.source import load_config, locate
from quantkit.mixed.recorded import Searched, guess
from quantkit.nn.sites import sharing_copy
from quantkit.pipeline.again import replaced_model
from quantkit.pipeline.checks import refuse_combinations
from quantkit.pipeline.estimate import Estimate, estimate
from quantkit.pipeline.fused import refuse_parted
from quantkit.pipeline.outputs import claimed
from quantkit.pipeline.plan import Resolution, check_plan, scale_dtype_for
from quantkit.pipeline.prepare import check_training
from quantkit.pipeline.quantize import quantize
from quantkit.pipeline.result import QuantizeResult
from quantkit.pipeline.settings import Output
from quantkit.pipeline.steps import make_steps
from quantkit.pipeline.train import train
from quantkit.recipe.schema import Evaluation, Recipe
from quantkit.recipe.searched import carried_out, searched
from quantkit.system.progress import ProgressCallback, ProgressChoice, callback
from quantkit.system.workers import ALONE, Workers

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Preview:
    """A recipe applied to a model of which only the config was read.

    Attributes:
        recipe: the recipe.
        contents: what a checkpoint of the model holds.
        resolution: what happens to every site.
        estimate: predicted sizes, memory and passes.
        dtype: dtype of the model as it will be loaded.
    """

    recipe: Recipe
    contents: Contents
    resolution: Resolution
    estimate: Estimate
    dtype: torch.dtype


def plan_recipe(recipe: Recipe) -> Preview:
    """Apply a recipe to its model's config: every decision and every refusal, before a weight is read.

    A model that a finished run of a recipe has replaced by its output is planned as the float model that it was made from.

    Raises:
        QuantkitError: the model's config cannot be read, a rule matches nothing, a grid or the format refuses a site.
    """
    replaced = replaced_model(locate(recipe.model), recipe.output)
    config: Any = replaced[0].config if replaced else load_config(recipe.model)
    dtype = getattr(torch, recipe.dtype) if recipe.dtype != "auto" else getattr(config, "dtype", None) or torch.float32
    config.dtype = dtype
    contents = contents_of(config, weights=None if replaced else recipe.model)
    if isinstance(recipe.scheme, Searched):
        resolution = guess(contents.model, recipe.scheme, recipe.rules, recipe.method.build(), recipe.output)
    else:
        resolution = recipe.resolve(contents.structure, scale_dtype_for(dtype, *recipe.output.formats))
    check_plan(resolution.plan, contents.structure, None)
    if recipe.output.keeps_together:
        refuse_parted(contents.structure, resolution.plan, resolution.skipped)
    steps, method = make_steps([one.build() for one in recipe.steps]).all, recipe.method.build()
    refuse_combinations(resolution.plan, contents.structure, method, steps, None)
    if recipe.train is not None:
        check_training(contents.structure, resolution.plan, True, recipe.train.adapters)
    refused = rejections_in(contents, resolution.plan, recipe.output.format, dtype_name(contents.model))
    if refused:
        name, reason = next(iter(refused.items()))
        raise RecipeError(f"output.format {recipe.output.format}: {name}: {reason} ({len(refused)} sites in all)")
    for one in recipe.output.also:
        shared_plan(contents, resolution.plan, one.format, dtype_name(contents.model))
    predicted = estimate(
        contents,
        resolution.plan,
        method,
        steps,
        calibration=recipe.calibration,
        format=recipe.output.format,
        reasons=resolution.skipped,
        training=recipe.train,
        max_memory=recipe.run.max_memory,
    )
    return Preview(recipe, contents, resolution, predicted, dtype)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a recipe left behind: the quantized model with its coverage and losses, and its evaluation if one was asked for."""

    preview: Preview
    result: QuantizeResult
    report: EvalReport | None


def run_recipe(recipe: Recipe, progress: ProgressChoice = "auto", workers: Workers = ALONE) -> Outcome:
    """Carry a recipe out; an interrupted run of the same recipe is continued.

    Args:
        recipe: the recipe.
        progress: ``"auto"`` for bars, None for silence, or a function that receives the events of every stage.
        workers: who carries it out together; the first of them also measures.

    Raises:
        QuantkitError: before long work wherever that is possible; see :func:`plan_recipe`.
    """
    progress = callback(progress)
    _refuse_workers(recipe, workers)
    with claimed(recipe.output if workers.writes else Output(), "carrying out a recipe"):
        preview = plan_recipe(recipe)
        for note in preview.resolution.notes:
            log.info(note)
        model: Any
        model, tokenizer = replaced_model(locate(recipe.model), recipe.output) or open_model(recipe.model, preview.dtype)
        measure = recipe.evaluate if workers.writes else None
        against = measure is not None and measure.against == "base" and model.device.type != "meta"
        base = sharing_copy(model) if against else None  # quantize changes the model itself
        scheme = preview.resolution
        if isinstance(recipe.scheme, Searched):
            scheme = searched(recipe, recipe.scheme, model, tokenizer, progress)
        carry_out = quantize if recipe.train is None else partial(train, training=recipe.train)
        result = carry_out(
            model,
            scheme,
            method=recipe.method.build(),
            steps=[one.build() for one in recipe.steps],
            calibration=recipe.calibration,
            output=recipe.output,
            run=replace(recipe.run, progress=progress, workers=workers),
            tokenizer=tokenizer,
        )
        if workers.writes:
            carried_out(Path(str(recipe.output.path)))
        report = None if measure is None else _measure(recipe, measure, result, base, progress)
        return Outcome(preview, result, report)


def _refuse_workers(recipe: Recipe, workers: Workers) -> None:
    """Refuse what only one process carries out."""
    alone = {"scheme.budget": isinstance(recipe.scheme, Searched), "train": recipe.train is not None}
    if workers.shares and (name := next((name for name, asked in alone.items() if asked), None)):
        raise WorkerError(f"{name}: workers calibrate and quantize together, and nothing else; run it as one process")


def _measure(
    recipe: Recipe, measure: Evaluation, result: QuantizeResult, base: nn.Module | None, progress: ProgressCallback
) -> EvalReport:
    """Evaluate a result and note the report beside its checkpoint, unless the same measurement is noted there."""
    path, base_label = Path(str(recipe.output.path)), recipe.model if measure.against == "base" else None
    known = _known_report(path / EVALUATION) if result.already_done else None
    asked: dict[str, Any] = measure.model_dump(include={"data", "column", "template", "windows", "length"})
    tokenizer, latency = result.tokenizer, measure.latency
    if known and is_answer(known, result.model, tokenizer=tokenizer, latency=latency, base=base_label, **asked):
        return known
    if measure.against == "base" and base is None:
        log.warning("%s: the float model was replaced by this checkpoint, so there is nothing to compare it with", path)
    report = evaluate(
        result.model,
        base,
        tokenizer=tokenizer,
        latency=latency,
        label=path.name,
        base_label=base_label if base is not None else None,
        progress=progress,
        **asked,
    )
    report.save(path / EVALUATION)
    return report


def _known_report(path: Path) -> EvalReport | None:
    """Return a report that lies beside a checkpoint; None if there is none that can be read."""
    try:
        return EvalReport.load(path)
    except FormatError as error:
        log.info("measuring: %s", error)
        return None
