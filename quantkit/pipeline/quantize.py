"""quantize(): the whole story in one function.

describe the model -> plan every site and ask grid and format whether they can -> walk the blocks in order, each seeing the
quantized outputs of those before it -> install quantized modules -> write, reload and compare the checkpoint. Every finished
block is on the disk, so a killed run continues where it stopped.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

from torch import nn

from quantkit import checkpoint
from quantkit.calibrate.chain import collect_statistics
from quantkit.calibrate.data import Batch, Calibration, check_fit, unpadded, unpadded_counts
from quantkit.calibrate.data import fingerprint as data_fingerprint
from quantkit.calibrate.statistics import load_statistics
from quantkit.checkpoint.contents import contents_of
from quantkit.errors import QuantkitError, SpecError
from quantkit.evaluation.coverage import coverage_before
from quantkit.evaluation.sanity import SanityCheck
from quantkit.hf.load import PreTrainedModel, adopt, load_float
from quantkit.hf.source import load_config, locate
from quantkit.hf.structure import describe
from quantkit.nn.lean import leaving
from quantkit.nn.probes import all_experts_shown
from quantkit.nn.sites import SiteStatistics, Structure
from quantkit.pipeline.again import finished_result, replaced_model
from quantkit.pipeline.blocks import BlockRun, calibration_chain, needs_of, quantize_blocks
from quantkit.pipeline.checks import (
    check_model,
    check_settings,
    prepare_blocks,
    refuse_absent,
    refuse_run,
)
from quantkit.pipeline.finish import Unfinished, metadata_of, open_writer
from quantkit.pipeline.memory import PLAIN, Ways, memory_of, run_size, scratch_in
from quantkit.pipeline.outputs import check_others, claimed, with_others
from quantkit.pipeline.plan import Resolution, make_plan, resolve, scale_dtype_for
from quantkit.pipeline.result import QuantizeResult
from quantkit.pipeline.resume import ResumeStore, run_key
from quantkit.pipeline.rules import Rule, SchemeChoice
from quantkit.pipeline.scales import fit_scales
from quantkit.pipeline.settings import Output, Run, as_output
from quantkit.pipeline.steps import Learning, Steps, apply_transforms, corrections_of, make_steps
from quantkit.quantizers.base import QUANTIZERS, Quantizer
from quantkit.spec import Plan, Scheme
from quantkit.system.compute import Compute
from quantkit.transforms.base import Correction, Step

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
    with claimed(target, "quantizing a model"):
        model, tokenizer = open_float(model, tokenizer, target)
        refuse_absent(model, empty=True)
        structure = describe(model)
        job = _Job(
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
        key = job.key(batches)
        done = None if key is None else finished_result(model, tokenizer, target, run, key)
        if done is None:
            check_model(model)
            job = job.prepared().with_fitting_scales()
            job.check_output(key, batches)
            done = _carry_out(job, key, batches, read)
        return with_others(done, target, key, resume=run.resume)


@dataclass(frozen=True)
class _Job:
    """One run with its plan made and nothing done yet."""

    model: PreTrainedModel
    tokenizer: Any
    structure: Structure
    resolution: Resolution
    method: Quantizer
    steps: Steps
    calibration: Calibration
    output: Output
    run: Run
    ways: Ways = PLAIN

    @property
    def plan(self) -> dict[str, Scheme]:
        return self.resolution.plan

    @cached_property
    def compute(self) -> Compute:
        return self.run.compute or Compute.default(self.model, self.run.device)

    @cached_property
    def statistics(self) -> Mapping[str, SiteStatistics] | None:
        given = self.calibration.statistics
        return load_statistics(given)[0] if isinstance(given, str | Path) else given

    @cached_property
    def corrections(self) -> dict[str, tuple[Correction, ...]]:
        return corrections_of(self.model, self.structure, self.plan, self.steps.during)

    @property
    def walks(self) -> bool:
        """Whether calibration text runs through the blocks while they are quantized."""
        needed = bool(self.corrections) or any(needs_of(self.method, scheme) for scheme in self.plan.values())
        return needed and self.statistics is None

    @property
    def reads_text(self) -> bool:
        return self.walks or bool(self.steps.after) or any(step.needs for step in self.steps.before)

    @property
    def leaving(self) -> tuple[str, ...]:
        """The paths of the blocks, if they leave memory after each use."""
        return tuple(block.name for block in self.structure.blocks) if self.ways.lean else ()

    @property
    def runs_blocks(self) -> bool:
        """Whether blocks are run at all: with text, or on a few tokens to see what reads what."""
        shared = any(scheme.weight.has_global_scale for scheme in self.plan.values())
        return self.reads_text or bool(self.steps.before) or shared

    def prepared(self) -> "_Job":
        """Return the job with what is known of how its blocks can run, if they have to."""
        if not self.runs_blocks:
            return self
        with leaving(self.model, self.leaving):
            structure, compute = prepare_blocks(self.model, self.structure, self.compute)
        if structure.entangled is not None and self.run.max_memory is not None:
            raise QuantkitError(f"max_memory cannot be kept to by a model that only runs as a whole: {structure.entangled}")
        return replace(self, structure=structure, run=replace(self.run, compute=compute))

    def within_memory(self, batches: Sequence[Batch]) -> "_Job":
        """Return the job with what keeps it within the memory that it may take.

        Raises:
            QuantkitError: nothing does.
        """
        if self.model.device.type == "meta":  # there is nothing left to do
            return self
        sites = [site for site in (*self.structure.sites, *self.structure.after) if site.name in self.plan]
        tokens = sum(batch.ids.numel() for batch in batches)
        size = run_size(self.model, self.structure, sites, tokens if self.walks else 0, self.calibration.length)
        written = self.output.path is not None
        memory = memory_of(self.model, self.structure, self.plan, size, self.method, self.steps.all, written=written)
        return replace(self, ways=memory.choose(self.run.max_memory))

    def refuse(self) -> None:
        """Raise what is wrong with the run as far as can be seen without working."""
        for note in self.resolution.notes:
            log.info(note)
        refuse_run(
            self.structure,
            self.resolution,
            self.method,
            self.steps.all,
            output=self.output,
            strict=self.run.strict,
            answers_only=self.calibration.answers_only,
            statistics=self.statistics,
        )

    def with_fitting_scales(self) -> "_Job":
        """Return the run with a plan whose scales hold the weights as they are."""
        dtype = str(self.model.dtype).removeprefix("torch.")
        return replace(self, resolution=fit_scales(self.model, self.structure, self.resolution, self.output.formats, dtype))

    def key(self, batches: Sequence[Batch]) -> checkpoint.Key | None:
        """Return what decides the files; None if nothing is to be written."""
        output = self.output
        if output.path is None:
            return None
        methods = (*self.steps.all, self.method, self.compute, *(("all experts",) if self.calibration.all_experts else ()))
        known = self.statistics
        return run_key(
            self.model, self.plan, methods, batches, tokenizer=self.tokenizer, statistics=known, format=output.format
        )

    def check_output(self, key: checkpoint.Key | None, batches: Sequence[Batch]) -> None:
        """Make sure that the files may be written."""
        output = self.output
        if output.path is None:
            return
        checkpoint.check_output(
            output.path,
            self.model,
            self.plan,
            format=output.format,
            overwrite=output.overwrite,
            key=key if self.run.resume else None,
            scratch=self.scratch_bytes(batches),
            tokenizer=self.tokenizer,
        )
        check_others(output, self.model, self.plan, key, self.tokenizer, resume=self.run.resume)

    def scratch_bytes(self, batches: Sequence[Batch]) -> int:
        """Return the size of what two blocks hand on, which is on the disk at the same time for a moment."""
        hidden = getattr(self.model.config.get_text_config(), "hidden_size", 0) or 0
        handed = 2 * sum(batch.ids.numel() for batch in batches) * hidden * self.compute.dtype.itemsize if self.walks else 0
        return handed * 4 if self.ways.spills else handed

    def open_store(self, key: checkpoint.Key | None) -> ResumeStore | None:
        """Open the checkpoint that finished blocks go to."""
        writer = open_writer(self.output, self.run, self.model, self.plan, key)
        return None if writer is None else ResumeStore(writer)


def _carry_out(job: _Job, key: checkpoint.Key | None, batches: Sequence[Batch], read: Mapping[str, Any]) -> QuantizeResult:
    """Transform, quantize, learn, measure and write; ``read`` is what is recorded of the calibration text."""
    model, compute, progress, texts = job.model, job.compute, job.run.report, unpadded(batches)
    sanity = SanityCheck.start(model, job.tokenizer, job.calibration.bos or None, job.leaving)
    counted = unpadded_counts(batches)
    structure = apply_transforms(
        model, job.structure, job.plan, job.steps.before, texts, counted=counted, compute=compute, progress=progress
    )
    scratch, method = scratch_in(job.output.path, job.ways.spills), job.method
    chain = calibration_chain(model, structure, texts, method, compute, counted, progress, scratch) if job.walks else None
    rows = coverage_before(model, structure, job.plan, job.resolution.skipped)
    store = job.open_store(key)
    learning = Learning.record(job.steps.after, store, model, structure, texts, compute=compute, progress=progress)
    blocks = BlockRun(
        model,
        structure,
        job.plan,
        job.method,
        compute,
        chain,
        job.statistics or {},
        job.corrections,
        store,
        progress,
        job.run.strict,
        keep=bool(job.steps.after),
        formats=job.output.formats,
    )
    with all_experts_shown(model, job.calibration.all_experts):
        results = quantize_blocks(blocks)
    results, facts = learning.finish(model, structure, results)
    metadata = metadata_of(job.resolution, repr(job.method), batches, read, results) | job.steps.metadata(facts)
    writer = store.writer if store is not None else None
    return Unfinished(model, job.tokenizer, structure, job.resolution, rows, sanity, writer).finish(results, metadata)


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
    loaded, found = replaced_model(place, output) or load_float(place)
    return loaded, tokenizer if tokenizer is not None else found
