"""The demo: one model in bfloat16, 8 bits, and 4 bits rounded and GPTQ, written, reloaded, compared and timed.

The reference of every KL divergence is the unquantized model computed in float32, so that bfloat16 has a distance too and
"within the noise of bfloat16" means something. What is measured are the checkpoints read back from the disk. Speeds are
taken in turn, round by round, at the end, so that a busy minute hits all rows alike.
"""

import dataclasses
import gc
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from quantkit import checkpoint
from quantkit.calibrate.data import Calibration
from quantkit.checkpoint.contents import contents_of
from quantkit.checkpoint.open import open_model
from quantkit.evaluation import BaseLogits, EvalReport, compare_latency, evaluate
from quantkit.evaluation.coverage import CoverageRow
from quantkit.hf.demo_model import DEMO_MODEL
from quantkit.hf.source import load_config
from quantkit.nn.sites import sharing_copy
from quantkit.pipeline.estimate import Estimate, estimate
from quantkit.pipeline.plan import make_plan
from quantkit.pipeline.quantize import quantize
from quantkit.pipeline.settings import Output, Run
from quantkit.quantizers.base import QUANTIZERS
from quantkit.spec import Scheme
from quantkit.system.compute import known_device
from quantkit.system.files import write_json
from quantkit.system.progress import ProgressCallback, ignore

log = logging.getLogger(__name__)

DTYPE = torch.bfloat16


@dataclass(frozen=True, slots=True)
class DemoSettings:
    """What the demo does.

    Attributes:
        model: hub id, directory, GGUF file, or ``"demo"``, the embedded default.
        data: text to calibrate with (None: text that every Python carries); the evaluation always uses the held-out half of
            the default text.
        column, template: which column of it is read, and the chat template of conversations.
        out: directory for checkpoints and reports; checkpoints of an earlier demo there are replaced.
        samples, length: calibration windows, and tokens of one.
        windows, window_length: evaluation windows, and tokens of one.
        rounds: timed rounds of every model.
        device: where blocks are quantized, and where the models are compared and timed.
    """

    model: str = DEMO_MODEL
    data: str | None = None
    column: str | None = None
    template: str | None = None
    out: str | Path = "quantkit-demo"
    samples: int = 128
    length: int = 512
    windows: int = 16
    window_length: int = 512
    rounds: int = 5
    device: str = "auto"

    @property
    def calibration(self) -> Calibration:
        """The calibration of every row that needs one."""
        return Calibration(self.data, self.samples, self.length, column=self.column, template=self.template)

    def quick(self) -> "DemoSettings":
        """Return the same with little data: enough to see that everything works, not enough to judge a scheme."""
        return dataclasses.replace(self, samples=8, length=256, windows=4, window_length=256, rounds=2)


@dataclass(frozen=True, slots=True)
class Variant:
    """One row of the demo: a scheme and a quantizer, and what they are predicted to give."""

    label: str
    folder: str
    quantizer: str
    plan: dict[str, Scheme]
    estimate: Estimate


@dataclass(frozen=True, slots=True)
class DemoResult:
    """The evaluation of every row (bfloat16 first), the coverage of the last, and where the files are."""

    reports: list[EvalReport]
    coverage: list[CoverageRow]
    checkpoints: dict[str, Path]
    html: Path
    json: Path


def plan_demo(settings: DemoSettings) -> list[Variant]:
    """Decide what the demo's rows are, from the model's config alone: 8 bits, and 4 bits with rounding and with GPTQ."""
    config: Any = load_config(settings.model)
    config.dtype = DTYPE
    contents = contents_of(config)
    variants = []
    for bits, preset, quantizer in ((8, "w8a16", "rtn"), (4, "w4a16-asym", "rtn"), (4, "w4a16-asym", "gptq")):
        plan = make_plan(contents.structure, preset, scale_dtype="bfloat16").plan
        spec = next(iter(plan.values())).weight
        group = f"g{spec.group_size}" if spec.group_size > 0 else "channel"
        label = "W8" if bits == 8 else f"W4 {quantizer.upper()} {group}"
        predicted = estimate(contents, plan, QUANTIZERS.get(quantizer)(), calibration=settings.calibration)
        variants.append(Variant(label, label.lower().replace(" ", "-"), quantizer, plan, predicted))
    return variants


def run_demo(settings: DemoSettings, variants: list[Variant] | None = None, progress: ProgressCallback = ignore) -> DemoResult:
    """Quantize, write, reload, compare and time; write ``report.html`` and ``report.json``.

    Args:
        settings: what to do.
        variants: from :func:`plan_demo`, if it was called already.
        progress: receives the events of every stage.
    """
    from quantkit.report import write_html

    variants, out = variants or plan_demo(settings), Path(settings.out)
    device = known_device(settings.device)
    reference, tokenizer = open_model(settings.model, torch.float32, device=device)
    base = BaseLogits(reference)
    plain = _in_dtype(reference)
    models: dict[str, nn.Module] = {"bf16": plain}
    coverage: list[CoverageRow] = []
    losses: dict[str, float] = {}
    for variant in variants:
        done = quantize(
            sharing_copy(plain),
            variant.plan,
            method=variant.quantizer,
            calibration=settings.calibration,
            output=Output(out / variant.folder, overwrite=True),
            run=Run(progress=_labelled(progress, variant.label), device=settings.device),
            tokenizer=tokenizer,
        )
        coverage, losses = done.coverage, done.losses
        del done
        gc.collect()  # the quantized model in memory; what is measured is the one on the disk
        models[variant.label] = checkpoint.load(out / variant.folder, device=device)
    reports = [
        evaluate(
            model,
            base,
            tokenizer=tokenizer,
            windows=settings.windows,
            length=settings.window_length,
            latency=False,
            label=label,
            base_label="float32",
            progress=_labelled(progress, label),
        )
        for label, model in models.items()
    ]
    timings = compare_latency(models, rounds=settings.rounds, progress=progress)
    reports = [dataclasses.replace(report, latency=timings[report.label]) for report in reports]
    write_json(out / "report.json", [report.to_dict() for report in reports])
    write_html(out / "report.html", reports, coverage=coverage, losses=losses, title=f"{settings.model}: quantized by quantkit")
    paths = {variant.label: out / variant.folder for variant in variants}
    return DemoResult(reports, coverage, paths, out / "report.html", out / "report.json")


def _in_dtype(model: nn.Module) -> nn.Module:
    """Return a copy whose weights are in :data:`DTYPE`. Buffers stay: rotary frequencies lose the position in 16 bits."""
    other: Any = sharing_copy(model)
    for parameter in other.parameters():
        parameter.data = parameter.data.to(DTYPE)
    other.config.dtype = DTYPE
    return other  # type: ignore[no-any-return]


def _labelled(progress: ProgressCallback, label: str) -> ProgressCallback:
    """Return a callback that names the row in every stage."""
    return lambda event: progress(dataclasses.replace(event, stage=f"{label}: {event.stage}"))
