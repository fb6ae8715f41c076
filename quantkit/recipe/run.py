"""What ``quantkit plan`` and ``quantkit run`` do with a recipe."""

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from quantkit import checkpoint
from quantkit.checkpoint.contents import Contents, contents_of
from quantkit.checkpoint.open import open_model
from quantkit.errors import RecipeError
from quantkit.evaluation import EvalReport, evaluate
from quantkit.hf.source import load_config
from quantkit.nn.sites import sharing_copy
from quantkit.pipeline.checks import refuse_combinations
from quantkit.pipeline.estimate import Estimate, estimate
from quantkit.pipeline.fused import refuse_parted
from quantkit.pipeline.plan import Resolution, check_plan
from quantkit.pipeline.quantize import quantize
from quantkit.pipeline.result import QuantizeResult
from quantkit.pipeline.steps import make_steps
from quantkit.recipe.schema import Recipe
from quantkit.system.progress import ProgressCallback, ignore

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

    Raises:
        QuantkitError: the model's config cannot be read, a rule matches nothing, a grid or the format refuses a site.
    """
    config: Any = load_config(recipe.model)
    dtype = getattr(torch, recipe.dtype) if recipe.dtype != "auto" else getattr(config, "dtype", None) or torch.float32
    config.dtype = dtype
    contents = contents_of(config, weights=recipe.model)
    resolution = recipe.resolve(contents.structure, "bfloat16" if dtype == torch.bfloat16 else "float16")
    check_plan(resolution.plan, contents.structure, None)
    if recipe.output.keeps_together:
        refuse_parted(contents.structure, resolution.plan, resolution.skipped)
    steps, method = make_steps([one.build() for one in recipe.steps]).all, recipe.method.build()
    refuse_combinations(resolution.plan, contents.structure, method, steps, None)
    refused = checkpoint.rejections(contents.model, resolution.plan, recipe.output.format)
    if refused:
        name, reason = next(iter(refused.items()))
        raise RecipeError(f"output.format {recipe.output.format}: {name}: {reason} ({len(refused)} sites in all)")
    predicted = estimate(
        contents,
        resolution.plan,
        method,
        steps,
        calibration=recipe.calibration,
        format=recipe.output.format,
        reasons=resolution.skipped,
    )
    return Preview(recipe, contents, resolution, predicted, dtype)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a recipe left behind: the quantized model with its coverage and losses, and its evaluation if one was asked for."""

    preview: Preview
    result: QuantizeResult
    report: EvalReport | None


def run_recipe(recipe: Recipe, progress: ProgressCallback = ignore) -> Outcome:
    """Carry a recipe out; an interrupted run of the same recipe is continued.

    Args:
        recipe: the recipe.
        progress: receives the events of every stage.

    Raises:
        QuantkitError: before long work wherever that is possible; see :func:`plan_recipe`.
    """
    preview = plan_recipe(recipe)
    for note in preview.resolution.notes:
        log.info(note)
    model, tokenizer = open_model(recipe.model, preview.dtype)
    output, measure = recipe.output, recipe.evaluate
    base = sharing_copy(model) if measure and measure.against == "base" else None  # quantize changes the model itself
    result = quantize(
        model,
        preview.resolution,
        method=recipe.method.build(),
        steps=[one.build() for one in recipe.steps],
        calibration=recipe.calibration,
        output=output,
        run=replace(recipe.run, progress=progress),
        tokenizer=tokenizer,
    )
    if measure is None:
        return Outcome(preview, result, None)
    report = evaluate(
        result.model,
        base,
        data=measure.data,
        column=measure.column,
        template=measure.template,
        tokenizer=tokenizer,
        windows=measure.windows,
        length=measure.length,
        latency=measure.latency,
        label=Path(str(output.path)).name,
        base_label=recipe.model,
        progress=progress,
    )
    report.save(Path(str(output.path)) / "evaluation.json")
    return Outcome(preview, result, report)
