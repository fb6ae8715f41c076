"""Sweeps as YAML: the axes, and the sections of a recipe for everything that rows share.

    model: demo
    schemes: [w4a16-asym-g64, w3a16-asym-g64, w8a16]
    quantizers: [rtn, gptq, {name: gptq, options: {damping: 0.02}}]
    steps: [[], [awq]]
    calibration: {samples: 32, length: 256}
    evaluate: {windows: 8, length: 256}
    output: {path: runs/sweep}

One definition checks a recipe's sections and these (:mod:`quantkit.recipe.schema`), with file, line and the nearest key.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator
from pydantic_core import PydanticCustomError

from quantkit.calibrate.data import Calibration
from quantkit.errors import SpecError
from quantkit.pipeline.rules import Rule, SchemeChoice, SchemeLike, choice_of
from quantkit.pipeline.settings import Output, Run
from quantkit.recipe.choices import MethodChoice, Section, StepChoice, by_name
from quantkit.recipe.schema import MOVED, Dtype, Evaluation, load_as
from quantkit.sweeps.rows import FLOAT

Keep = Literal["none", "frontier", "all"]


def _float_or_scheme(value: object) -> object:
    """Return what a layer may be: a scheme, or the word for staying as it is."""
    if value == FLOAT:
        return value
    try:
        return SchemeChoice(**value) if isinstance(value, dict) else choice_of(value)  # type: ignore[arg-type]
    except SpecError as error:
        raise PydanticCustomError("scheme", "{why}", {"why": str(error).removeprefix("SchemeChoice: ")}) from None


class Scoring(Evaluation):
    """How rows are scored: ``windows`` of ``length`` tokens, always against the float model; ``latency`` times them, too."""

    against: Literal["base"] = "base"
    latency: bool = False


class SweepRecipe(Section):
    """A whole sweep: the axes of :func:`quantkit.sweep`, and the sections of a recipe.

    Args:
        model: hub id, directory, ``.gguf`` file, or ``demo``.
        dtype: dtype in which the model is read.
        schemes: names, or mappings as for ``scheme`` in a recipe.
        quantizers: names, or names with options.
        budgets: sizes or times such as ``4.25 bpw``, for each of which the best plan is searched.
        choices: the schemes that such a plan may give to layers, ``float`` among them.
        steps: variants of what else is done, each a list.
        rules: of every scheme and budget.
        calibration: the text.
        calibrate: ``once`` shares statistics of the float model's inputs, ``each`` runs the text for every row.
        evaluate: how rows are scored.
        keep: which checkpoints stay: ``none``, of the ``frontier``, or ``all``.
        output: ``path`` is the directory of the sweep; ``format`` of checkpoints; ``overwrite`` replaces another sweep.
        run: how rows behave.
    """

    model: str
    dtype: Dtype = "auto"
    schemes: list[SchemeLike] = Field(default_factory=list)
    quantizers: list[Annotated[MethodChoice, BeforeValidator(by_name)]] = Field(default_factory=lambda: [MethodChoice()])
    budgets: list[str] = Field(default_factory=list)
    choices: list[Annotated[Any, BeforeValidator(_float_or_scheme)]] = Field(default_factory=list)
    steps: list[list[Annotated[StepChoice, BeforeValidator(by_name)]]] = Field(default_factory=lambda: [list[StepChoice]()])
    rules: list[Rule] = Field(default_factory=list)
    calibration: Calibration = Calibration()
    calibrate: Literal["once", "each"] = "once"
    evaluate: Scoring = Scoring()
    keep: Keep = "none"
    output: Output
    run: Run = Run()

    @field_validator("output")
    @classmethod
    def _has_a_place(cls, output: Output) -> Output:
        if output.path is None:
            raise PydanticCustomError("output", "path is missing", {})
        if output.also:
            raise PydanticCustomError("output", "a sweep keeps checkpoints in one format; leave also out", {})
        return output


_MOVED = {
    **{key: text for key, text in MOVED.items() if key in ("embedding", "head", "strict", "resume")},
    "scheme": "schemes: [...]",
    "method": "quantizers: [...]",
    "quantizer": "quantizers: [...]",
    "windows": "evaluate: {windows: ...}",
    "samples": "calibration: {samples: ...}",
    "path": "output: {path: ...}",
}


def load_sweep(path: str | Path, overrides: Mapping[str, Any] | None = None) -> SweepRecipe:
    """Read and check the YAML file of a sweep.

    Args:
        path: a YAML file.
        overrides: dotted key to value, applied over the file: ``{"evaluate.windows": 4}``.

    Raises:
        RecipeError: with file, line and column, for anything that is not a valid sweep.
    """
    return load_as(SweepRecipe, path, overrides, moved=_MOVED)
