"""quantkit: quantize a language model, prove the checkpoint, measure it, ship it.

>>> import quantkit
>>> result = quantkit.quantize("HuggingFaceTB/SmolLM2-135M-Instruct", "w4a16", out="smollm2-w4")  # doctest: +SKIP
>>> model = quantkit.load("smollm2-w4")  # doctest: +SKIP

Names are resolved on first use, so that importing quantkit is quick and loads no model library.
"""

import importlib
from typing import TYPE_CHECKING, Any

from quantkit.version import __version__

if TYPE_CHECKING:
    from quantkit.calibrate.statistics import load_statistics, save_statistics
    from quantkit.checkpoint import inspect, load, save
    from quantkit.engine.request import Limits
    from quantkit.engine.sampling import Sampling
    from quantkit.errors import (
        CalibrationError,
        FormatError,
        KernelError,
        QuantkitError,
        RecipeError,
        SpecError,
    )
    from quantkit.evaluation import EvalReport, evaluate
    from quantkit.generation.engine import Engine
    from quantkit.generation.generate import Generation, generate
    from quantkit.pipeline.distill import Distill
    from quantkit.pipeline.quantize import QuantizeResult, collect, quantize
    from quantkit.qtensor import QTensor
    from quantkit.report import comparison_table, write_html
    from quantkit.spec import KVScheme, Plan, QuantSpec, Scheme, preset
    from quantkit.system.progress import Progress

_HOME = {
    "CalibrationError": "errors",
    "Distill": "pipeline.distill",
    "Engine": "generation.engine",
    "EvalReport": "evaluation",
    "FormatError": "errors",
    "Generation": "generation.generate",
    "KVScheme": "spec",
    "KernelError": "errors",
    "Limits": "engine.request",
    "Plan": "spec",
    "Progress": "system.progress",
    "QTensor": "qtensor",
    "QuantSpec": "spec",
    "QuantizeResult": "pipeline.quantize",
    "QuantkitError": "errors",
    "RecipeError": "errors",
    "Sampling": "engine.sampling",
    "Scheme": "spec",
    "SpecError": "errors",
    "collect": "pipeline.quantize",
    "comparison_table": "report",
    "evaluate": "evaluation",
    "generate": "generation.generate",
    "inspect": "checkpoint",
    "load": "checkpoint",
    "load_statistics": "calibrate.statistics",
    "preset": "spec",
    "quantize": "pipeline.quantize",
    "save": "checkpoint",
    "save_statistics": "calibrate.statistics",
    "write_html": "report",
}

__all__ = [
    "CalibrationError",
    "Distill",
    "Engine",
    "EvalReport",
    "FormatError",
    "Generation",
    "KVScheme",
    "KernelError",
    "Limits",
    "Plan",
    "Progress",
    "QTensor",
    "QuantSpec",
    "QuantizeResult",
    "QuantkitError",
    "RecipeError",
    "Sampling",
    "Scheme",
    "SpecError",
    "__version__",
    "collect",
    "comparison_table",
    "evaluate",
    "generate",
    "inspect",
    "load",
    "load_statistics",
    "preset",
    "quantize",
    "save",
    "save_statistics",
    "write_html",
]


def __getattr__(name: str) -> Any:
    """Import the module that a public name lives in, and remember the name."""
    if name not in _HOME:
        raise AttributeError(f"module 'quantkit' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"quantkit.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
