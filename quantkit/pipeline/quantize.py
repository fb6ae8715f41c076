"""quantize(): the whole story in one function.

describe the model -> plan every site and ask grid and format whether they can -> walk the blocks in order, each seeing the
quantized outputs of those before it -> install quantized modules -> write, reload and compare the checkpoint. Every finished
block is on the disk, so a killed run continues where it stopped.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from quantkit import checkpoint
from quantkit.calibrate.chain import Chain, collect_statistics
from quantkit.calibrate.data import Batch, Calibration, unpadded
from quantkit.calibrate.data import fingerprint as data_fingerprint
from quantkit.calibrate.statistics import load_statistics
from quantkit.evaluation.coverage import CoverageRow, coverage_after, coverage_before
from quantkit.evaluation.sanity import SanityCheck
from quantkit.hf.load import PreTrainedModel, load_float
from quantkit.hf.source import locate
from quantkit.hf.structure import describe
from quantkit.nn.sites import SiteStatistics, Structure
from quantkit.pipeline.blocks import needs_of, quantize_blocks
from quantkit.pipeline.checks import biases_to_correct, check_model, refuse_combinations, refuse_gaps, report_fallen
from quantkit.pipeline.distill import Distill, learn_scales, record_teacher
from quantkit.pipeline.plan import check_plan, make_plan, plan_ends
from quantkit.pipeline.resume import ResumeStore, fingerprint, settings_of, versions
from quantkit.quantizers.autoround import AutoRound
from quantkit.quantizers.base import QUANTIZERS, Quantized, Quantizer
from quantkit.spec import Plan, Scheme
from quantkit.system.compute import Compute
from quantkit.system.progress import ProgressCallback
from quantkit.system.progress import ignore as ignore_progress
from quantkit.transforms.base import TRANSFORMS, Transform
from quantkit.transforms.bias import BiasCorrection
from quantkit.transforms.rotate import Rotate, rotate
from quantkit.transforms.scaling_groups import apply_transform

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class QuantizeResult:
    """What :func:`quantize` returns.

    Attributes:
        model: the quantized model, ready to run.
        tokenizer: its tokenizer, if one is known.
        plan: site name to scheme, as carried out.
        coverage: one row per weight of the model: quantized, skipped or fell back, and why.
        losses: site name to relative squared output error over the calibration inputs.
        path: the checkpoint directory, or None if none was asked for.
        metadata: what was recorded in the checkpoint: scheme, quantizer, calibration, versions, measured quality.
    """

    model: nn.Module
    tokenizer: Any
    plan: dict[str, Scheme]
    coverage: list[CoverageRow]
    losses: dict[str, float]
    path: Path | None = None
    metadata: dict[str, Any] = field(default_factory=dict)


def quantize(
    model: nn.Module | str | Path,
    scheme: str | Scheme = "w4a16",
    *,
    quantizer: str | Quantizer = "gptq",
    transforms: Sequence[str | Transform] = (),
    distill: Distill | None = None,
    plan: Plan | None = None,
    group_size: int | None = None,
    symmetric: bool | None = None,
    ignore: Sequence[str] = (),
    embedding: str | Scheme | None = None,
    head: str | Scheme | None = None,
    data: Any = None,
    tokenizer: Any = None,
    samples: int = 128,
    length: int = 512,
    batch_size: int = 8,
    mode: Literal["packed", "ragged"] = "packed",
    statistics: str | Path | Mapping[str, SiteStatistics] | None = None,
    out: str | Path | None = None,
    format: str = "compressed-tensors",
    overwrite: bool = False,
    resume: bool = True,
    strict: bool = False,
    compute: Compute | None = None,
    progress: ProgressCallback = ignore_progress,
) -> QuantizeResult:
    """Quantize a causal language model and, if ``out`` is given, write a checkpoint that has been read back and compared.

    Args:
        model: a transformers model (changed in place), or a hub id, directory or GGUF file to load
            (``"demo"`` is the embedded default).
        scheme: preset name such as ``"w4a16"`` or ``"w4a16-asym-g64"``, or a full :class:`Scheme`.
        quantizer: name from the registry (``"gptq"``, ``"rtn"``, ...) or an instance with options.
        transforms: names or instances (``"rotate"``, ``"smoothquant"``, ``"awq"``) that rewrite the float model first, in
            order; the last two cost a pass over the calibration text each. ``"bias-correction"`` is done after rounding.
        distill: learn the scales end to end after quantizing; see :mod:`quantkit.pipeline.distill`.
        plan: site name to scheme; replaces ``scheme``, ``group_size``, ``symmetric`` and ``ignore``.
        group_size: input channels per scale; None takes the largest of 128, 64, 32 that divides every site.
        symmetric: overrides the preset.
        ignore: names or globs of sites to leave in float; one that matches nothing is an error.
        embedding, head: schemes of the input embedding and the output head, which otherwise stay in float. They are rounded to
            nearest; where the two are tied, one speaks for both.
        data, samples, length, batch_size, mode: see :class:`Calibration`.
        tokenizer: needed for text; found by itself when ``model`` is a path.
        statistics: from :func:`collect` or its file, used instead of a sequential calibration.
        out: directory of the checkpoint.
        format: checkpoint format, ``"compressed-tensors"`` or ``"native"``.
        overwrite: replace an existing checkpoint at ``out``.
        resume: continue an interrupted run of the same settings (state lives in ``<out>.resume`` until the run is done).
        strict: fail if any linear layer would be left in float without being named in ``ignore``, or falls back.
        compute: device and dtype of the block at work; default GPU, else CPU in float32.
        progress: receives :class:`quantkit.system.progress.Progress` events.

    Returns:
        A :class:`QuantizeResult`.

    Raises:
        SpecError, CalibrationError, FormatError: before long work starts where that is possible.
    """
    method = QUANTIZERS.get(quantizer)() if isinstance(quantizer, str) else quantizer
    changes = [TRANSFORMS.get(one)() if isinstance(one, str) else one for one in transforms]
    model, tokenizer = _resolve_model(model, tokenizer)
    structure = describe(model)
    if plan is None:
        dtype = _scale_dtype(model)
        plan = make_plan(structure, scheme, group_size=group_size, symmetric=symmetric, ignore=ignore, scale_dtype=dtype)
    plan = {**plan, **plan_ends(structure, embedding, head, _scale_dtype(model))}
    check_plan(plan, structure, format if out is not None else None)
    if strict:
        refuse_gaps(structure, plan, ignore)
    compute = compute or Compute.default(model)
    known = load_statistics(statistics)[0] if isinstance(statistics, str | Path) else statistics
    refuse_combinations(plan, structure, method, changes, distill, known)
    corrects = any(isinstance(change, BiasCorrection) for change in changes)
    corrected = biases_to_correct(model, structure, plan, method, distill) if corrects else []
    walk = (bool(corrected) or any(needs_of(method, one) for one in plan.values())) and known is None
    reads = walk or distill or any(change.needs for change in changes)
    batches = Calibration(data, samples, length, batch_size, mode).batches(tokenizer) if reads else []
    calibration = data_fingerprint(batches) if batches else "none"
    check_model(model, structure)
    if out is not None:
        checkpoint.check_output(out, model, plan, format=format, overwrite=overwrite)
    store = _open_store(model, (*changes, method, distill, compute), plan, batches, known, out, resume)
    sanity = SanityCheck.start(model, tokenizer)
    for change in changes:
        if isinstance(change, Rotate):
            rotate(model, structure, change)
            structure = describe(model)  # a tied head stands alone now
        elif not isinstance(change, BiasCorrection):
            found = collect_statistics(model, structure, unpadded(batches), change.needs, compute=compute, progress=progress)
            apply_transform(model, structure, plan, change, found)
    chain = _chain(model, structure, unpadded(batches), method, compute) if walk else None
    rows = coverage_before(model, structure, plan)
    teacher_outputs = record_teacher(model, structure, unpadded(batches), distill, compute, progress) if distill else []
    own_head = model.get_submodule(structure.head) if distill and structure.head else None
    results = quantize_blocks(
        model, structure, plan, method, chain, compute=compute, store=store, known=known, progress=progress, corrected=corrected
    )
    curve: tuple[float, ...] = ()
    if distill:
        results, curve = learn_scales(model, structure, results, teacher_outputs, distill, compute, progress, own_head)
    coverage = coverage_after(rows, results)
    report_fallen([row.name for row in coverage if row.kind == "fell back"], strict)
    metadata = _metadata(method, plan, calibration, batches, results, sanity.measure(model))
    metadata |= {"transforms": [repr(change) for change in changes]} if changes else {}
    metadata |= {"distill": {"settings": repr(distill), "kl": curve}} if distill else {}
    path = None
    if out is not None:
        path = checkpoint.save(
            model, out, plan=plan, format=format, tokenizer=tokenizer, metadata=metadata, overwrite=overwrite,
            prove=lambda stage: {"reload_kl": sanity.check_reloaded(model, checkpoint.load(stage, cache=False))},
        )  # fmt: skip
        if store is not None:
            store.clear()
    return QuantizeResult(model, tokenizer, plan, coverage, {k: v.loss for k, v in results.items()}, path, metadata)


def collect(
    model: nn.Module | str | Path,
    collectors: Sequence[str] = ("hessian",),
    *,
    data: Any = None,
    tokenizer: Any = None,
    samples: int = 128,
    length: int = 512,
    batch_size: int = 8,
    mode: Literal["packed", "ragged"] = "packed",
    compute: Compute | None = None,
    progress: ProgressCallback = ignore_progress,
) -> tuple[dict[str, SiteStatistics], str]:
    """Run the float model over calibration text once and collect statistics of every site's input.

    The statistics serve any number of :func:`quantize` calls (``statistics=``) and can be kept with
    :func:`quantkit.calibrate.statistics.save_statistics`. The model is not changed. Arguments as in :func:`quantize`.

    Returns:
        Site name to statistics, and the fingerprint of the calibration tokens.
    """
    model, tokenizer = _resolve_model(model, tokenizer)
    structure = describe(model)
    batches = Calibration(data, samples, length, batch_size, mode).batches(tokenizer)
    check_model(model, structure)
    compute = compute or Compute.default(model)
    found = collect_statistics(model, structure, unpadded(batches), collectors, compute=compute, progress=progress)
    return found, data_fingerprint(batches)


def _chain(model: nn.Module, structure: Structure, batches: list[Tensor], method: Quantizer, compute: Compute) -> Chain:
    if isinstance(method, AutoRound):  # what learns runs as many windows at a time as it learns from
        batches = [part for ids in batches for part in ids.split(method.batch_size)]
    return Chain(model, structure, batches, compute, with_float="drift" in method.needs)


def _resolve_model(model: nn.Module | str | Path, tokenizer: Any) -> tuple[PreTrainedModel, Any]:
    if isinstance(model, nn.Module):
        return cast(PreTrainedModel, model.eval()), tokenizer
    loaded, found = load_float(locate(model))
    return loaded, tokenizer if tokenizer is not None else found


def _scale_dtype(model: nn.Module) -> str:
    """Scales are stored in the checkpoint's dtype, because its readers hold them in it; float16 for a float32 model."""
    dtype = next(model.parameters()).dtype
    return "bfloat16" if dtype == torch.bfloat16 else "float16"


def _open_store(
    model: nn.Module,
    methods: Sequence[object],
    plan: Plan,
    batches: Sequence[Batch],
    known: Mapping[str, SiteStatistics] | None,
    out: str | Path | None,
    resume: bool,
) -> ResumeStore | None:
    if out is None:
        return None
    path = Path(f"{out}.resume")
    run = fingerprint(model, settings_of(methods, plan, batches), known)
    if not resume:
        ResumeStore.remove(path)
    return ResumeStore(path, run)


def _metadata(
    method: Quantizer,
    plan: Plan,
    calibration: str,
    batches: Sequence[Batch],
    results: Mapping[str, Quantized],
    quality: dict[str, Any],
) -> dict[str, Any]:
    schemes: dict[str, int] = {}
    for scheme in plan.values():
        schemes[scheme.weight.describe()] = schemes.get(scheme.weight.describe(), 0) + 1
    losses = [one.loss for one in results.values()]
    return {
        "schemes": schemes,
        "quantizer": repr(method),
        "calibration": {"fingerprint": calibration, "tokens": sum(batch.tokens for batch in batches)},
        "bits_per_weight": bits_per_weight(results),
        "output_error": {"mean": sum(losses) / len(losses), "max": max(losses)},
        "fell_back": [name for name, one in results.items() if one.fell_back],
        "quality": quality,
        "versions": versions(),
    }


def bits_per_weight(results: Mapping[str, Quantized]) -> float:
    """Return stored bits per quantized weight: codes, scales, zero points and padding."""
    return sum(r.qtensor.nbytes for r in results.values()) * 8 / sum(r.qtensor.numel for r in results.values())
