"""quantize(): the whole story in one function.

describe the model -> plan every site and ask grid and format whether they can -> walk the blocks in order, each seeing the
quantized outputs of those before it -> install quantized modules -> write, reload and compare the checkpoint. Every finished
block is on the disk, so a killed run continues where it stopped.
"""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from quantkit import checkpoint
from quantkit.calibrate.chain import Chain, collect_statistics
from quantkit.calibrate.data import Batch, Calibration, unpadded
from quantkit.calibrate.data import fingerprint as data_fingerprint
from quantkit.calibrate.statistics import load_statistics
from quantkit.checkpoint.contents import contents_of
from quantkit.evaluation.coverage import coverage_after, coverage_before, remark
from quantkit.evaluation.sanity import SanityCheck
from quantkit.hf.load import PreTrainedModel, load_float
from quantkit.hf.source import load_config, locate
from quantkit.hf.structure import describe
from quantkit.nn.sites import SiteStatistics, Structure
from quantkit.pipeline.blocks import needs_of, quantize_blocks
from quantkit.pipeline.checks import biases_to_correct, check_model, refuse_combinations, refuse_gaps, report_fallen
from quantkit.pipeline.distill import Distill, learn_scales, record_teacher
from quantkit.pipeline.plan import Resolution, check_plan, make_plan, resolve
from quantkit.pipeline.result import QuantizeResult
from quantkit.pipeline.resume import ResumeStore, fingerprint, settings_of, versions
from quantkit.pipeline.rules import Rule, SchemeChoice
from quantkit.pipeline.settings import Output, Run
from quantkit.quantizers.autoround import AutoRound
from quantkit.quantizers.base import QUANTIZERS, Quantized, Quantizer
from quantkit.spec import Plan, Scheme
from quantkit.system.compute import Compute
from quantkit.transforms.base import TRANSFORMS, Transform
from quantkit.transforms.bias import BiasCorrection
from quantkit.transforms.rotate import Rotate, rotate
from quantkit.transforms.scaling_groups import apply_transform

log = logging.getLogger(__name__)

DEFAULT_CALIBRATION, DEFAULT_OUTPUT, DEFAULT_RUN = Calibration(), Output(), Run()


def quantize(
    model: nn.Module | str | Path,
    scheme: str | Scheme | SchemeChoice | Plan | Resolution = "w4a16",
    *,
    out: str | Path | None = None,
    method: str | Quantizer = "gptq",
    steps: Sequence[str | Transform | Distill] = (),
    rules: Sequence[Rule] = (),
    calibration: Calibration = DEFAULT_CALIBRATION,
    output: Output = DEFAULT_OUTPUT,
    run: Run = DEFAULT_RUN,
    tokenizer: Any = None,
) -> QuantizeResult:
    """Quantize a causal language model and, if ``out`` is given, write a checkpoint that has been read back and compared.

    Args:
        model: a transformers model (changed in place), or a hub id, directory or GGUF file to load
            (``"demo"`` is the embedded default).
        scheme: preset name such as ``"w4a16"`` or ``"w4a16-asym-g64"``, a :class:`Scheme`, or a plan: what
            :func:`quantkit.plan` returned, or any mapping of layer names to schemes.
        out: directory of the checkpoint; the same as ``output.path``.
        method: quantizer, by name (``"gptq"``, ``"rtn"``, ...) or as an instance with options.
        steps: what else is done, in order, by name or as instances: ``"rotate"``, ``"smoothquant"``, ``"awq"`` rewrite the
            float model first; ``"bias-correction"`` corrects biases while layers are rounded; ``"distill"`` learns the
            scales end to end afterwards.
        rules: layers that get another scheme or stay in float; the last rule that matches decides. See
            :class:`quantkit.Rule`.
        calibration: the text, or statistics collected earlier.
        output: format of the checkpoint, and whether it may replace another.
        run: strictness, resuming, device, progress.
        tokenizer: needed for text; found by itself when ``model`` is a path.

    Returns:
        A :class:`QuantizeResult`.

    Raises:
        SpecError, CalibrationError, FormatError: before long work starts where that is possible.
    """
    quantizer = QUANTIZERS.get(method)() if isinstance(method, str) else method
    changes, distill = split_steps(steps)
    output = output.to(out)
    model, tokenizer = _resolve_model(model, tokenizer)
    structure = describe(model)
    resolution = resolve(structure, scheme, rules, _scale_dtype(model))
    plan = resolution.plan
    for note in resolution.notes:
        log.info(note)
    check_plan(plan, structure, output.format if output.path is not None else None)
    if run.strict:
        refuse_gaps(structure, resolution)
    compute, progress = run.compute or Compute.default(model), run.report
    given = calibration.statistics
    known = load_statistics(given)[0] if isinstance(given, str | Path) else given
    refuse_combinations(plan, structure, quantizer, changes, distill, known)
    corrects = any(isinstance(change, BiasCorrection) for change in changes)
    corrected = biases_to_correct(model, structure, plan, quantizer, distill) if corrects else []
    walk = (bool(corrected) or any(needs_of(quantizer, one) for one in plan.values())) and known is None
    reads = walk or distill or any(change.needs for change in changes)
    batches = calibration.batches(tokenizer) if reads else []
    fingerprint_of_data = data_fingerprint(batches) if batches else "none"
    check_model(model, structure)
    if output.path is not None:
        checkpoint.check_output(output.path, model, plan, format=output.format, overwrite=output.overwrite)
    store = _open_store(model, (*changes, quantizer, distill, compute), plan, batches, known, output.path, run.resume)
    sanity = SanityCheck.start(model, tokenizer)
    for change in changes:
        if isinstance(change, Rotate):
            rotate(model, structure, change)
            structure = describe(model)  # a tied head stands alone now
        elif not isinstance(change, BiasCorrection):
            found = collect_statistics(model, structure, unpadded(batches), change.needs, compute=compute, progress=progress)
            apply_transform(model, structure, plan, change, found)
    chain = _chain(model, structure, unpadded(batches), quantizer, compute) if walk else None
    rows = coverage_before(model, structure, plan, resolution.skipped)
    teacher = record_teacher(model, structure, unpadded(batches), distill, compute, progress) if distill else []
    own_head = model.get_submodule(structure.head) if distill and structure.head else None
    results = quantize_blocks(
        model,
        structure,
        plan,
        quantizer,
        chain,
        compute=compute,
        store=store,
        known=known,
        progress=progress,
        corrected=corrected,
    )
    curve: tuple[float, ...] = ()
    if distill:
        results, curve = learn_scales(model, structure, results, teacher, distill, compute, progress, own_head)
    coverage = remark(coverage_after(rows, results), resolution.remarks)
    report_fallen([row.name for row in coverage if row.kind == "fell back"], run.strict)
    metadata = _metadata(quantizer, plan, fingerprint_of_data, batches, results, sanity.measure(model))
    metadata |= {"transforms": [repr(change) for change in changes]} if changes else {}
    metadata |= {"distill": {"settings": repr(distill), "kl": curve}} if distill else {}
    path = None
    if output.path is not None:
        path = checkpoint.save(
            model, output.path, plan=plan, format=output.format, tokenizer=tokenizer, metadata=metadata,
            overwrite=output.overwrite,
            prove=lambda stage: {"reload_kl": sanity.check_reloaded(model, checkpoint.load(stage, cache=False))},
        )  # fmt: skip
        if store is not None:
            store.clear()
    return QuantizeResult(model, tokenizer, plan, coverage, {k: v.loss for k, v in results.items()}, path, metadata)


def split_steps(steps: Sequence[str | Transform | Distill]) -> tuple[list[Transform], Distill | None]:
    """Return the transforms and the distillation among the steps."""
    made = [Distill() if one == "distill" else TRANSFORMS.get(one)() if isinstance(one, str) else one for one in steps]
    return [one for one in made if not isinstance(one, Distill)], next((one for one in made if isinstance(one, Distill)), None)


def plan(
    model: nn.Module | str | Path, scheme: str | Scheme | SchemeChoice = "w4a16", *, rules: Sequence[Rule] = ()
) -> Resolution:
    """Decide for every layer what :func:`quantize` would do with it, without reading a weight.

    Args:
        model: a transformers model, or a hub id, directory or ``"demo"``, of which only the config is read.
        scheme: preset name or scheme of the layers that no rule decides.
        rules: see :class:`quantkit.Rule`.

    Returns:
        The plan, the layers left in float and why, and what was chosen for you. :func:`quantize` takes it as its scheme.

    Raises:
        SpecError: a rule matches nothing, or a group size does not divide a layer.
    """
    if not isinstance(model, nn.Module):
        model = contents_of(load_config(model)).model
    return make_plan(describe(model), scheme, rules, scale_dtype=_scale_dtype(model))


def collect(
    model: nn.Module | str | Path,
    collectors: Sequence[str] = ("hessian",),
    *,
    calibration: Calibration = DEFAULT_CALIBRATION,
    run: Run = DEFAULT_RUN,
    tokenizer: Any = None,
) -> tuple[dict[str, SiteStatistics], str]:
    """Run the float model over calibration text once and collect statistics of every layer's input.

    The statistics serve any number of :func:`quantize` calls (``calibration=Calibration(statistics=...)``) and can be kept
    with :func:`quantkit.save_statistics`. The model is not changed. Arguments as in :func:`quantize`.

    Returns:
        Layer name to statistics, and the fingerprint of the calibration tokens.
    """
    model, tokenizer = _resolve_model(model, tokenizer)
    structure = describe(model)
    batches = calibration.batches(tokenizer)
    check_model(model, structure)
    compute = run.compute or Compute.default(model)
    found = collect_statistics(model, structure, unpadded(batches), collectors, compute=compute, progress=run.report)
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
