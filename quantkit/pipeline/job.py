"""One run of quantize() with its plan made: what it asks before it begins, and what it works with."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from quantkit import checkpoint
from quantkit.calibrate.data import Batch, Calibration, unpadded, unpadded_counts
from quantkit.calibrate.statistics import load_statistics
from quantkit.checkpoint.handed import Share
from quantkit.errors import QuantkitError, WorkerError
from quantkit.hf.load import PreTrainedModel
from quantkit.nn.lean import leaving
from quantkit.nn.sites import SiteStatistics, Structure
from quantkit.pipeline.blocks import BlockRun, calibration_chain, needs_of, windows_of
from quantkit.pipeline.checks import (
    prepare_blocks,
    refuse_run,
)
from quantkit.pipeline.finish import open_writer
from quantkit.pipeline.memory import PLAIN, Ways, memory_of, run_size, scratch_in
from quantkit.pipeline.outputs import check_others
from quantkit.pipeline.plan import Resolution
from quantkit.pipeline.resume import ResumeStore, run_key, settings_key
from quantkit.pipeline.scales import fit_scales
from quantkit.pipeline.settings import Output, Run
from quantkit.pipeline.steps import Steps, corrections_of
from quantkit.pipeline.together import check_agreement, check_windows, refuse_together
from quantkit.quantizers.base import Quantizer
from quantkit.spec import Scheme
from quantkit.system.compute import Compute
from quantkit.transforms.base import Correction

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
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
        """Layer name to scheme."""
        return self.resolution.plan

    @cached_property
    def compute(self) -> Compute:
        """Where blocks run, and in which dtype."""
        return self.run.compute or Compute.default(self.model, self.run.device)

    @cached_property
    def statistics(self) -> Mapping[str, SiteStatistics] | None:
        """What is used in place of text, by layer name."""
        given = self.calibration.statistics
        return load_statistics(given)[0] if isinstance(given, str | Path) else given

    @cached_property
    def corrections(self) -> dict[str, tuple[Correction, ...]]:
        """Layer name to what changes its result once it is quantized."""
        return corrections_of(self.model, self.structure, self.plan, self.steps.during)

    @property
    def walks(self) -> bool:
        """Whether calibration text runs through the blocks while they are quantized."""
        needed = bool(self.corrections) or any(needs_of(self.method, scheme) for scheme in self.plan.values())
        return needed and self.statistics is None

    @property
    def reads_text(self) -> bool:
        """Whether calibration text is read at all."""
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

    def prepared(self) -> "Job":
        """Return the job with what is known of how its blocks can run, if they have to."""
        if not self.runs_blocks:
            return self
        with leaving(self.model, self.leaving):
            structure, compute = prepare_blocks(self.model, self.structure, self.compute)
        if structure.entangled is not None and self.run.workers.shares:
            raise WorkerError(
                f"workers cannot share a model that only runs as a whole: {structure.entangled}; start one process"
            )
        if structure.entangled is not None and self.run.max_memory is not None:
            raise QuantkitError(f"max_memory cannot be kept to by a model that only runs as a whole: {structure.entangled}")
        return replace(self, structure=structure, run=replace(self.run, compute=compute))

    def within_memory(self, batches: Sequence[Batch]) -> "Job":
        """Return the job with what keeps it within the memory that it may take.

        Raises:
            QuantkitError: nothing does.
        """
        if self.model.device.type == "meta":  # there is nothing left to do
            return self
        sites = [site for site in (*self.structure.sites, *self.structure.after) if site.name in self.plan]
        tokens = sum(batch.ids.numel() for batch in self.run.workers.share(batches))
        size = run_size(self.model, self.structure, sites, tokens if self.walks else 0, self.calibration.length)
        size = replace(size, shared=self.run.workers.shares)
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
        refuse_together(self.run.workers, self.method, self.steps.all, written=self.output.path is not None)

    def with_fitting_scales(self) -> "Job":
        """Return the run with a plan whose scales hold the weights as they are."""
        dtype = str(self.model.dtype).removeprefix("torch.")
        return replace(self, resolution=fit_scales(self.model, self.structure, self.resolution, self.output.formats, dtype))

    @property
    def methods(self) -> tuple[object, ...]:
        """What decides the files beside model, plan, text and format; how many workers there are does not."""
        how = [*(["all experts"] if self.calibration.all_experts else []), *(["workers"] if self.run.workers.shares else [])]
        return (*self.steps.all, self.method, self.compute, *how)

    def check_workers(self, batches: Sequence[Batch]) -> None:
        """Make sure that all workers have something to do, and the same in mind."""
        if self.run.workers.shares:
            check_windows(self.run.workers, unpadded(batches))
            check_agreement(self.run.workers, self.model, settings_key(self.plan, self.methods, batches))

    def block_run(self, structure: Structure, batches: Sequence[Batch]) -> BlockRun:
        """Return how blocks are quantized, with this worker's share of the text before the first."""
        run, scratch, chain = self.run, scratch_in(self.output.path, self.ways.spills), None
        if self.walks:
            texts, counted = windows_of(unpadded(batches), unpadded_counts(batches), self.method, run.workers)
            chain = calibration_chain(
                self.model, structure, texts, self.method, self.compute, counted, run.report, scratch, run.workers
            )
        return BlockRun(
            self.model,
            structure,
            self.plan,
            self.method,
            self.compute,
            chain,
            self.statistics or {},
            self.corrections,
            progress=run.report,
            strict=run.strict,
            keep=bool(self.steps.after),
            workers=run.workers,
            formats=self.output.formats,
        )

    def key(self, batches: Sequence[Batch]) -> checkpoint.Key | None:
        """Return what decides the files; None if nothing is to be written."""
        output = self.output
        if output.path is None:
            return None
        known = self.statistics
        return run_key(
            self.model, self.plan, self.methods, batches, tokenizer=self.tokenizer, statistics=known, format=output.format
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

    def open_store(self, key: checkpoint.Key | None, share: Share) -> ResumeStore | None:
        """Open the checkpoint that finished blocks go to."""
        writer = open_writer(self.output, self.run, self.model, self.plan, key)
        return None if writer is None else ResumeStore(writer, share)
