"""quantize(): the whole story in one function.

describe the model -> plan every site and ask grid and format whether they can -> walk the blocks in order, each seeing the
quantized outputs of those before it -> install quantized modules -> write, reload and compare the checkpoint. Every finished
block is on the disk, so a killed run continues where it stopped.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from torch import nn

from quantkit import checkpoint
from quantkit.calibrate.chain import collect_statistics
from quantkit.calibrate.data import Batch, Calibration, check_fit, unpadded, unpadded_counts
from quantkit.calibrate.data import fingerprint as data_fingerprint
from quantkit.checkpoint.contents import contents_of
from quantkit.errors import SpecError
from quantkit.evaluation.coverage import coverage_before
from quantkit.evaluation.sanity import SanityCheck
from quantkit.hf.experts import enable_experts
from quantkit.hf.load import PreTrainedModel, adopt, load_float
from quantkit.hf.source import load_config, locate
from quantkit.hf.structure import describe
from quantkit.nn.probes import all_experts_shown
from quantkit.nn.sites import SiteStatistics
from quantkit.pipeline.again import finished_result, read_back, replaced_model
from quantkit.pipeline.blocks import quantize_blocks
from quantkit.pipeline.checks import (
    check_model,
    check_settings,
    prepare_blocks,
    refuse_absent,
)
from quantkit.pipeline.finish import Unfinished, metadata_of
from quantkit.pipeline.job import Job
from quantkit.pipeline.memory import scratch_folder
from quantkit.pipeline.outputs import claimed, with_others
from quantkit.pipeline.plan import Resolution, make_plan, resolve, scale_dtype_for
from quantkit.pipeline.result import QuantizeResult
from quantkit.pipeline.rules import Rule, SchemeChoice
from quantkit.pipeline.settings import Output, Run, as_output
from quantkit.pipeline.steps import Learning, apply_transforms, make_steps
from quantkit.pipeline.together import assist
from quantkit.quantizers.base import QUANTIZERS, Quantizer
from quantkit.spec import Plan, Scheme
from quantkit.system.compute import Compute
from quantkit.system.progress import Progress
from quantkit.transforms.base import Step

log = logging.getLogger(__name__)

DEFAULT_CALIBRATION, DEFAULT_OUTPUT, DEFAULT_RUN = Calibration(), Output(), Run()


def quantize(
    model: nn.Module | str | Path,
    scheme: str | Scheme | SchemeChoice | Plan | Resolution = "w4a16",
    *,
    out: str | Path | None = None,
    method: str | Quantizer = "gptq",
    steps: Sequence[str | Step] = (),
    rules: Sequence[Rule] = (),
    calibration: Calibration = DEFAULT_CALIBRATION,
    output: Output | Sequence[Output] = DEFAULT_OUTPUT,
    run: Run = DEFAULT_RUN,
    tokenizer: Any = None,
) -> QuantizeResult:
    """Quantize a causal language model and, if ``out`` is given, write a checkpoint that has been read back and compared.

    A model that is given as an object is itself changed. For a second scheme load it again, or give ``copy.deepcopy(model)``.

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
        output: format of the checkpoint, and whether it may replace another; a list of them writes the same codes in several
            formats, each read back and compared. The first decides what :attr:`QuantizeResult.path` is.
        run: strictness, resuming, device, progress.
        tokenizer: needed for text; found by itself when ``model`` is a path.

    Returns:
        A :class:`QuantizeResult`. With ``out``, the layers of its model are read from the written files, mapped, when they are
        first run, so that a large model leaves none of itself in memory; the files may be renamed, replaced or deleted before,
        but not written to. Where ``out`` already holds what the same call has written, it is read back, and the result
        says ``already_done``.

    Raises:
        SpecError, CalibrationError, FormatError: before long work starts where that is possible.
        BusyError: another process is writing to ``out``.
    """
    output = as_output(output)
    check_settings(calibration, output, run)
    quantizer = QUANTIZERS.get(method)() if isinstance(method, str) else method
    if not hasattr(quantizer, "rejects") or isinstance(quantizer, type):
        raise SpecError(f"method={method!r}: want a name such as 'gptq', or an instance such as quantkit.GPTQ()")
    todo, target = make_steps(steps), output.to(out)  # mistakes in names come before a model is loaded
    workers = run.workers
    with claimed(target if workers.writes else DEFAULT_OUTPUT, "quantizing a model"):
        model, tokenizer = open_float(model, tokenizer, target)
        refuse_absent(model, empty=True)
        structure = describe(model)
        job = Job(
            model=model,
            tokenizer=tokenizer,
            structure=structure,
            resolution=resolve(structure, scheme, rules, scale_dtype_for(next(model.parameters()).dtype, *target.formats)),
            method=quantizer,
            steps=todo,
            calibration=calibration,
            output=target,
            run=run,
        )
        job.refuse()
        batches, read = calibration.read(tokenizer) if job.reads_text else ([], {})
        check_fit(batches, model)
        job = job.within_memory(batches)
        job.check_workers(batches)
        if not workers.writes:
            return _assist(job, batches)
        key = job.key(batches)
        done = None if key is None else finished_result(model, tokenizer, target, run, key)
        if workers.agree(done is None):
            check_model(model)
            job = job.prepared().with_fitting_scales()
            job.check_output(key, batches)
            done = _carry_out(job, key, batches, read)
        assert done is not None
        done = with_others(done, target, key, resume=run.resume)
        workers.wait()
        return done


def _carry_out(job: Job, key: checkpoint.Key | None, batches: Sequence[Batch], read: Mapping[str, Any]) -> QuantizeResult:
    """Transform, quantize, learn, measure and write; ``read`` is what is recorded of the calibration text."""
    model, compute, progress, texts = job.model, job.compute, job.run.report, unpadded(batches)
    sanity = SanityCheck.start(model, job.tokenizer, job.calibration.bos or None, job.leaving)
    counted = unpadded_counts(batches)
    structure = apply_transforms(
        model, job.structure, job.plan, job.steps.before, texts, counted=counted, compute=compute, progress=progress
    )
    blocks = job.block_run(structure, batches)
    rows = coverage_before(model, structure, job.plan, job.resolution.skipped)
    store = job.open_store(key, blocks.share)
    learning = Learning.record(job.steps.after, store, model, structure, texts, compute=compute, progress=progress)
    with all_experts_shown(model, job.calibration.all_experts):
        results = quantize_blocks(replace(blocks, store=store))
    results, facts = learning.finish(model, structure, results)
    metadata = metadata_of(job.resolution, repr(job.method), batches, read, results) | job.steps.metadata(facts)
    writer = store.writer if store is not None else None
    progress(Progress("prove", 0, 1))
    done = Unfinished(model, job.tokenizer, structure, job.resolution, rows, sanity, writer).finish(results, metadata)
    progress(Progress("prove", 1, 1))
    return done


def _assist(job: Job, batches: Sequence[Batch]) -> QuantizeResult:
    """Do a part of the work for the worker that writes, and return what it has written."""
    model, workers, path = job.model, job.run.workers, Path(str(job.output.path))
    if workers.agree(True):
        refuse_absent(model)
        enable_experts(model)
        job = job.prepared().with_fitting_scales()
        blocks = job.block_run(job.structure, batches)
        with all_experts_shown(model, job.calibration.all_experts):
            assist(blocks, path, blocks.share)
        del blocks
    workers.wait()
    return read_back(model, job.tokenizer, path, verify=False)


def plan(
    model: nn.Module | str | Path,
    scheme: str | Scheme | SchemeChoice = "w4a16",
    *,
    rules: Sequence[Rule] = (),
    format: str | None = None,
) -> Resolution:
    """Decide for every layer what :func:`quantize` would do with it, without reading a weight.

    Args:
        model: a transformers model, or a hub id, directory or ``"demo"``, of which only the config is read.
        scheme: preset name or scheme of the layers that no rule decides.
        rules: see :class:`quantkit.Rule`.
        format: what will be written, where that wants scales of a dtype of its own (``"modelopt"``).

    Returns:
        The plan, the layers left in float and why, and what was chosen for you. :func:`quantize` takes it as its scheme.

    Raises:
        SpecError: a rule matches nothing, or a group size does not divide a layer.
    """
    if not isinstance(model, nn.Module):
        model = contents_of(load_config(model), weights=model).model
    dtype = scale_dtype_for(next(model.parameters()).dtype, *([format] if format else []))
    return make_plan(describe(model), scheme, rules, scale_dtype=dtype)


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
    check_settings(calibration, run=run)
    model, tokenizer = open_float(model, tokenizer)
    structure = describe(model)
    batches = calibration.batches(tokenizer)
    check_fit(batches, model)
    check_model(model)
    structure, compute = prepare_blocks(model, structure, run.compute or Compute.default(model, run.device))
    with all_experts_shown(model, calibration.all_experts):
        found = collect_statistics(
            model,
            structure,
            unpadded(batches),
            collectors,
            counted=unpadded_counts(batches),
            compute=compute,
            progress=run.report,
        )
    return found, data_fingerprint(batches)


def open_float(model: nn.Module | str | Path, tokenizer: Any, output: Output = DEFAULT_OUTPUT) -> tuple[PreTrainedModel, Any]:
    """Return a float model that a user gave, or load the one that was named, with its tokenizer."""
    if isinstance(model, nn.Module):
        return adopt(cast(PreTrainedModel, model)), tokenizer
    place = locate(model)
    scratch = None if output.path is None else scratch_folder(output.path)
    loaded, found = replaced_model(place, output) or load_float(place, scratch=scratch)
    return loaded, tokenizer if tokenizer is not None else found
