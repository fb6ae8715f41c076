"""quantkit: quantize a language model, prove the checkpoint, measure it, ship it.

>>> import quantkit
>>> result = quantkit.quantize("HuggingFaceTB/SmolLM2-135M-Instruct", "w4a16", out="smollm2-w4")  # doctest: +SKIP
>>> model = quantkit.load("smollm2-w4")  # doctest: +SKIP

Names are resolved on first use, so that importing quantkit is quick and loads no model library. Only the environment of the
OpenMP runtime is completed at once (:mod:`quantkit.system.cores`), since the runtime reads it when torch is imported.
"""

import importlib
import os
import sys
from typing import TYPE_CHECKING, Any

from quantkit.version import __version__

if TYPE_CHECKING:
    from quantkit.calibrate.data import Calibration
    from quantkit.calibrate.statistics import load_statistics, save_statistics
    from quantkit.checkpoint import inspect, load, save
    from quantkit.checkpoint.open import open_model
    from quantkit.engine.request import Limits
    from quantkit.engine.sampling import Sampling
    from quantkit.errors import (
        BusyError,
        CalibrationError,
        DiskError,
        FormatError,
        KernelError,
        QuantkitError,
        RecipeError,
        SpecError,
        WorkerError,
    )
    from quantkit.evaluation import BaseLogits, EvalReport, compare_latency, evaluate
    from quantkit.exports import export
    from quantkit.exports.hub import push_to_hub
    from quantkit.exports.serving import package
    from quantkit.generation.engine import Engine
    from quantkit.generation.generate import Generation, generate
    from quantkit.mixed.budget import Budget
    from quantkit.mixed.measured import Decoding
    from quantkit.mixed.recorded import load_plan
    from quantkit.mixed.result import SearchResult
    from quantkit.mixed.search import Scoring, search
    from quantkit.pipeline.plan import Resolution
    from quantkit.pipeline.prepare import convert, prepare
    from quantkit.pipeline.quantize import collect, plan, quantize
    from quantkit.pipeline.reformat import reformat
    from quantkit.pipeline.result import QuantizeResult
    from quantkit.pipeline.rules import Rule, SchemeChoice
    from quantkit.pipeline.settings import Output, Run
    from quantkit.pipeline.train import train
    from quantkit.pipeline.training.settings import Training
    from quantkit.presets import preset
    from quantkit.qtensor import GridTensor, QTensor
    from quantkit.quantizers.autoround import AutoRound
    from quantkit.quantizers.gptaq import GPTAQ
    from quantkit.quantizers.gptq import GPTQ
    from quantkit.quantizers.hqq import HQQ
    from quantkit.quantizers.rtn import RTN, ImportanceRTN
    from quantkit.recipe.run import plan_recipe, run_recipe
    from quantkit.recipe.schema import Recipe, load_recipe
    from quantkit.report import comparison_table, write_html
    from quantkit.spec import ActivationSpec, KVScheme, Plan, QuantSpec, Scheme
    from quantkit.sweeps.result import SweepResult
    from quantkit.sweeps.rows import SweepRow
    from quantkit.sweeps.run import run_sweep, sweep
    from quantkit.sweeps.schema import SweepRecipe, load_sweep
    from quantkit.system.compute import Compute
    from quantkit.system.progress import Progress
    from quantkit.transforms.awq import AWQ
    from quantkit.transforms.bias import BiasCorrection
    from quantkit.transforms.distill import Distill
    from quantkit.transforms.rotate import Rotate
    from quantkit.transforms.smoothquant import SmoothQuant

_HOME = {
    "AWQ": "transforms.awq",
    "ActivationSpec": "spec",
    "AutoRound": "quantizers.autoround",
    "BaseLogits": "evaluation",
    "BiasCorrection": "transforms.bias",
    "Budget": "mixed.budget",
    "BusyError": "errors",
    "Calibration": "calibrate.data",
    "CalibrationError": "errors",
    "Compute": "system.compute",
    "Decoding": "mixed.measured",
    "DiskError": "errors",
    "Distill": "transforms.distill",
    "Engine": "generation.engine",
    "EvalReport": "evaluation",
    "FormatError": "errors",
    "GPTAQ": "quantizers.gptaq",
    "GPTQ": "quantizers.gptq",
    "Generation": "generation.generate",
    "GridTensor": "qtensor",
    "HQQ": "quantizers.hqq",
    "ImportanceRTN": "quantizers.rtn",
    "KVScheme": "spec",
    "KernelError": "errors",
    "Limits": "engine.request",
    "Output": "pipeline.settings",
    "Plan": "spec",
    "Progress": "system.progress",
    "QTensor": "qtensor",
    "QuantSpec": "spec",
    "QuantizeResult": "pipeline.result",
    "QuantkitError": "errors",
    "RTN": "quantizers.rtn",
    "Recipe": "recipe.schema",
    "RecipeError": "errors",
    "Resolution": "pipeline.plan",
    "Rotate": "transforms.rotate",
    "Rule": "pipeline.rules",
    "Run": "pipeline.settings",
    "Sampling": "engine.sampling",
    "Scheme": "spec",
    "SchemeChoice": "pipeline.rules",
    "Scoring": "mixed.search",
    "SearchResult": "mixed.result",
    "SmoothQuant": "transforms.smoothquant",
    "SpecError": "errors",
    "SweepRecipe": "sweeps.schema",
    "SweepResult": "sweeps.result",
    "SweepRow": "sweeps.rows",
    "Training": "pipeline.training.settings",
    "WorkerError": "errors",
    "collect": "pipeline.quantize",
    "compare_latency": "evaluation",
    "comparison_table": "report",
    "convert": "pipeline.prepare",
    "evaluate": "evaluation",
    "export": "exports.base",
    "generate": "generation.generate",
    "inspect": "checkpoint",
    "load": "checkpoint",
    "load_plan": "mixed.recorded",
    "load_recipe": "recipe.schema",
    "load_statistics": "calibrate.statistics",
    "load_sweep": "sweeps.schema",
    "open_model": "checkpoint.open",
    "package": "exports.serving",
    "plan": "pipeline.quantize",
    "plan_recipe": "recipe.run",
    "prepare": "pipeline.prepare",
    "preset": "presets",
    "push_to_hub": "exports.hub",
    "quantize": "pipeline.quantize",
    "reformat": "pipeline.reformat",
    "run_recipe": "recipe.run",
    "run_sweep": "sweeps.run",
    "save": "checkpoint",
    "save_statistics": "calibrate.statistics",
    "search": "mixed.search",
    "sweep": "sweeps.run",
    "train": "pipeline.train",
    "write_html": "report",
}

__all__ = [
    "AWQ",
    "GPTAQ",
    "GPTQ",
    "HQQ",
    "RTN",
    "ActivationSpec",
    "AutoRound",
    "BaseLogits",
    "BiasCorrection",
    "Budget",
    "BusyError",
    "Calibration",
    "CalibrationError",
    "Compute",
    "Decoding",
    "DiskError",
    "Distill",
    "Engine",
    "EvalReport",
    "FormatError",
    "Generation",
    "GridTensor",
    "ImportanceRTN",
    "KVScheme",
    "KernelError",
    "Limits",
    "Output",
    "Plan",
    "Progress",
    "QTensor",
    "QuantSpec",
    "QuantizeResult",
    "QuantkitError",
    "Recipe",
    "RecipeError",
    "Resolution",
    "Rotate",
    "Rule",
    "Run",
    "Sampling",
    "Scheme",
    "SchemeChoice",
    "Scoring",
    "SearchResult",
    "SmoothQuant",
    "SpecError",
    "SweepRecipe",
    "SweepResult",
    "SweepRow",
    "Training",
    "WorkerError",
    "__version__",
    "collect",
    "compare_latency",
    "comparison_table",
    "convert",
    "evaluate",
    "export",
    "generate",
    "inspect",
    "load",
    "load_plan",
    "load_recipe",
    "load_statistics",
    "load_sweep",
    "open_model",
    "package",
    "plan",
    "plan_recipe",
    "prepare",
    "preset",
    "push_to_hub",
    "quantize",
    "reformat",
    "run_recipe",
    "run_sweep",
    "save",
    "save_statistics",
    "search",
    "sweep",
    "train",
    "write_html",
]

if "torch" not in sys.modules:
    importlib.import_module("quantkit.system.cores").prepare_openmp(os.environ)


def __getattr__(name: str) -> Any:
    """Import the module that a public name lives in, and remember the name."""
    if name not in _HOME:
        raise AttributeError(f"module 'quantkit' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"quantkit.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
