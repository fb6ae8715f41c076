"""What ``quantkit plan`` and ``quantkit run`` do with a recipe."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from quantkit import checkpoint
from quantkit.checkpoint.contents import Contents, contents_of
from quantkit.errors import RecipeError
from quantkit.forecast import Forecast, forecast
from quantkit.hf.load import load_float, load_tokenizer
from quantkit.hf.source import load_config, locate
from quantkit.recipe import Recipe, Resolution

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Preview:
    """A recipe applied to a model of which only the config was read.

    Attributes:
        recipe: the recipe.
        contents: what a checkpoint of the model holds.
        resolution: what happens to every site.
        forecast: predicted sizes, memory and passes.
        dtype: dtype of the model as it will be loaded.
    """

    recipe: Recipe
    contents: Contents
    resolution: Resolution
    forecast: Forecast
    dtype: torch.dtype


def plan_recipe(recipe: Recipe) -> Preview:
    """Apply a recipe to its model's config: every decision and every refusal, before a weight is read.

    Raises:
        QuantkitError: the model's config cannot be read, a rule matches nothing, a grid or the format refuses a site.
    """
    config: Any = load_config(recipe.model)
    dtype = getattr(torch, recipe.dtype) if recipe.dtype != "auto" else getattr(config, "dtype", None) or torch.float32
    config.dtype = dtype
    contents = contents_of(config)
    resolution = recipe.resolve(contents.structure, "bfloat16" if dtype == torch.bfloat16 else "float16")
    refused = checkpoint.rejections(contents.model, resolution.plan, recipe.output.format)
    if refused:
        name, reason = next(iter(refused.items()))
        raise RecipeError(f"output.format {recipe.output.format}: {name}: {reason} ({len(refused)} sites in all)")
    calibration = recipe.calibration
    predicted = forecast(
        contents,
        resolution.plan,
        format=recipe.output.format,
        calibration_tokens=calibration.samples * calibration.length if recipe.quantizer.build().needs else 0,
        batch_size=calibration.batch_size,
        reasons=resolution.skipped,
    )
    return Preview(recipe, contents, resolution, predicted, dtype)


def open_model(source: str | Path, dtype: torch.dtype | None = None) -> tuple[nn.Module, Any]:
    """Open any model that a user may name: a quantized checkpoint, a float directory, a hub id, a GGUF file, ``"demo"``.

    Returns:
        The model, ready to run, and its tokenizer (None where there is none).
    """
    place = locate(source)
    if _is_quantized(Path(place)):
        return checkpoint.load(place, dtype=dtype), load_tokenizer(place)
    return load_float(place, dtype)


def _is_quantized(path: Path) -> bool:
    """Whether a directory must go to :func:`quantkit.checkpoint.load`, an unfinished one included: it says what is wrong."""
    if (path / checkpoint.INCOMPLETE).exists():
        return True
    config = path / "config.json"
    return config.is_file() and '"quantization_config"' in config.read_text(encoding="utf-8")
