"""train(): quantize a model, train it behind its rounding, and end in the same proven checkpoint as :func:`quantkit.quantize`.

    start: a quantizer's codes on the same text    ->  prepare: float weights inside the cells of those codes
    train: AdamW towards the float model           ->  convert: the best codes seen, installed, written, read back, compared

The float model stays as the teacher. Everything that an interrupted run needs is in ``<out>/training``
(:mod:`quantkit.pipeline.training.state`): the same call goes on and ends in the same bytes.
"""

import copy
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from quantkit import checkpoint
from quantkit.calibrate.data import Batch, Calibration, check_fit, from_ids, unpadded
from quantkit.checkpoint.digests import sums
from quantkit.errors import CalibrationError, SpecError
from quantkit.evaluation.coverage import coverage_before
from quantkit.evaluation.sanity import SanityCheck
from quantkit.hf.load import PreTrainedModel
from quantkit.hf.structure import describe
from quantkit.nn.linear import QuantModule
from quantkit.nn.quantized import Quantized
from quantkit.nn.sites import Site, Structure, read_weight, sharing_copy
from quantkit.numerics.inputs import InputQuantizer
from quantkit.pipeline.again import finished_result
from quantkit.pipeline.checks import check_model, check_settings, refuse_absent, refuse_run
from quantkit.pipeline.finish import Unfinished, metadata_of, open_writer
from quantkit.pipeline.outputs import check_others, claimed, with_others
from quantkit.pipeline.plan import Resolution, resolve, scale_dtype_for
from quantkit.pipeline.prepare import Start, check_training, convert, prepare, started
from quantkit.pipeline.quantize import open_float, quantize
from quantkit.pipeline.result import QuantizeResult
from quantkit.pipeline.resume import run_key
from quantkit.pipeline.rules import Rule, SchemeChoice
from quantkit.pipeline.settings import Output, Run, as_output
from quantkit.pipeline.steps import make_steps
from quantkit.pipeline.training.blocks import refuse_entangled, train_blocks
from quantkit.pipeline.training.cost import scratch_bytes
from quantkit.pipeline.training.loop import Learner, SaveState, carry_out, narrowed
from quantkit.pipeline.training.loss import Objective
from quantkit.pipeline.training.settings import START_WINDOWS, Training
from quantkit.pipeline.training.state import TrainingState
from quantkit.pipeline.training.teacher import Live, Stored, Teacher, refuse_another_stream
from quantkit.pipeline.training.updates import seen
from quantkit.quantizers.base import QUANTIZERS, Quantizer, relative_error
from quantkit.quantizers.rtn import RTN
from quantkit.spec import Plan, Scheme
from quantkit.system.progress import told
from quantkit.transforms.base import Step

log = logging.getLogger(__name__)

DEFAULT_TRAINING, DEFAULT_CALIBRATION, DEFAULT_OUTPUT, DEFAULT_RUN = Training(), Calibration(), Output(), Run()


def train(
    model: nn.Module | str | Path,
    scheme: str | Scheme | SchemeChoice | Plan | Resolution = "w4a16-asym",
    *,
    out: str | Path | None = None,
    training: Training = DEFAULT_TRAINING,
    method: str | Quantizer = "gptq",
    steps: Sequence[str | Step] = (),
    start: Start | None = None,
    rules: Sequence[Rule] = (),
    calibration: Calibration = DEFAULT_CALIBRATION,
    output: Output | Sequence[Output] = DEFAULT_OUTPUT,
    run: Run = DEFAULT_RUN,
    tokenizer: Any = None,
) -> QuantizeResult:
    """Train a model behind its rounding and, if ``out`` is given, write a checkpoint that has been read back and compared.

    A model that is given as an object is itself changed, as by :func:`quantkit.quantize`.

    Args:
        model: a transformers model (changed in place), or a hub id, directory or GGUF file to load.
        scheme: as for :func:`quantkit.quantize`.
        out: directory of the checkpoint; the same as ``output.path``.
        training: how long, how fast, towards what.
        method: quantizer that makes the codes which training begins with, from some windows of the same text.
        steps: what else is done to make them, as for :func:`quantkit.quantize`.
        start: a quantized model to begin with in place of that; see :func:`quantkit.prepare`.
        rules: as for :func:`quantkit.quantize`.
        calibration: the text that is trained on, and that the start is calibrated with.
        output: format of the checkpoint, and whether it may replace another; or several, as for :func:`quantkit.quantize`.
        run: strictness, resuming, progress. Training runs where the model is.
        tokenizer: needed for text; found by itself when ``model`` is a path.

    Returns:
        A :class:`QuantizeResult`; ``metadata["training"]`` has the losses of every step and of the evaluations.

    Raises:
        SpecError, CalibrationError, FormatError: before long work starts where that is possible.
        BusyError: another process is writing to ``out``.
    """
    output = as_output(output)
    check_settings(calibration, output, run)
    if not isinstance(training, Training):
        raise SpecError(f"training={training!r}: want a quantkit.Training, such as quantkit.Training(steps=200)")
    quantizer = QUANTIZERS.get(method)() if isinstance(method, str) else method
    todo, target = make_steps(steps), output.to(out)
    with claimed(target, "training a model"):
        model, tokenizer = open_float(model, tokenizer, target)
        refuse_absent(model, empty=True)
        structure = describe(model)
        resolution = resolve(structure, scheme, rules, scale_dtype_for(next(model.parameters()).dtype, *target.formats))
        check_training(structure, resolution.plan, True, training.adapters)
        job = _Job(
            model, tokenizer, structure, resolution, training, _Beginning(quantizer, todo.all, start), calibration, target, run
        )
        job.refuse()
        batches, read = calibration.read(tokenizer)
        check_fit(batches, model)
        job.split(batches)
        key = job.key(batches)
        if key is not None and (done := finished_result(model, tokenizer, target, run, key)):
            return with_others(done, target, key, resume=run.resume)
        check_model(model)
        if target.path is not None:
            checkpoint.check_output(
                target.path,
                model,
                resolution.plan,
                format=target.format,
                overwrite=target.overwrite,
                key=key if run.resume else None,
                scratch=scratch_bytes(training, job.sites.values(), job.plan, sum(ids.numel() for ids in unpadded(batches))),
            )
            check_others(target, model, resolution.plan, key, tokenizer, resume=run.resume)
        return with_others(_carry_out(job, key, batches, read), target, key, resume=run.resume)


@dataclass(frozen=True)
class _Beginning:
    """What training begins with: a quantized model, or how one is made."""

    method: Quantizer
    steps: tuple[Step, ...]
    start: Start | None

    def check(self) -> None:
        """Refuse steps that would not be taken, and a directory without a checkpoint."""
        if self.start is None:
            return
        if self.steps:
            raise SpecError("steps beside start=: the start is made already; leave one of them out")
        if isinstance(self.start, str | Path) and not (Path(self.start) / "config.json").is_file():
            raise SpecError(f"start={str(self.start)!r}: want the directory of a checkpoint; a quantizer is method='gptq'")

    def describe(self) -> str:
        """Return what a checkpoint records of it."""
        return ", ".join(map(repr, (*self.steps, self.method))) if self.start is None else "a quantized model"

    @property
    def decides(self) -> tuple[object, ...]:
        """What a key says of it."""
        if self.start is None:
            return (*self.steps, self.method)
        return tuple(f"{name} {digest}" for name, digest in sums(started(self.start).state_dict().items()))


@dataclass(frozen=True)
class _Job:
    """One run with its plan made and nothing done yet."""

    model: PreTrainedModel
    tokenizer: Any
    structure: Structure
    resolution: Resolution
    training: Training
    beginning: _Beginning
    calibration: Calibration
    output: Output
    run: Run

    @property
    def plan(self) -> dict[str, Scheme]:
        return self.resolution.plan

    @cached_property
    def sites(self) -> dict[str, Site]:
        return {site.name: site for site in (*self.structure.sites, *self.structure.after) if site.name in self.plan}

    def refuse(self) -> None:
        """Raise what is wrong with the run as far as can be seen without working."""
        for note in self.resolution.notes:
            log.info(note)
        if self.calibration.answers_only or self.calibration.statistics is not None:
            raise CalibrationError("training learns from every token of a text; leave answers_only and statistics out")
        beginning = self.beginning
        beginning.check()
        method = beginning.method if beginning.start is None else RTN()
        refuse_run(self.structure, self.resolution, method, beginning.steps, output=self.output, strict=self.run.strict)

    def split(self, batches: Sequence[Batch]) -> tuple[list[Tensor], list[Tensor]]:
        """Return the windows (T,) to train on, and those that are held out, spread evenly over the text.

        Raises:
            CalibrationError: too few windows.
        """
        rows = [row for ids in unpadded(batches) for row in ids]
        held = self.training.held_out
        if len(rows) < 2 * held:
            raise CalibrationError(
                f"{len(rows)} windows of text, {held} of which are held out: want at least {2 * held}; use more samples"
            )
        apart = {(2 * i + 1) * len(rows) // (2 * held) for i in range(held)}
        return [row for i, row in enumerate(rows) if i not in apart], [rows[i] for i in sorted(apart)]

    def key(self, batches: Sequence[Batch]) -> checkpoint.Key | None:
        """Return what decides the files; None if nothing is to be written."""
        if self.output.path is None:
            return None
        decides = replace(self.training, save_every_s=0.0)
        methods = (*self.beginning.decides, decides, self.model.dtype, self.model.device.type)
        return run_key(self.model, self.plan, methods, batches, tokenizer=self.tokenizer, format=self.output.format)

    def begin(self, state: TrainingState | None, windows: Sequence[Tensor]) -> Start:
        """Return the quantized model that training begins with, made now if it has to be from some of the windows (T,)."""
        if self.beginning.start is not None:
            return self.beginning.start
        count = min(START_WINDOWS, len(windows))
        chosen = [windows[i * len(windows) // count] for i in range(count)]
        return quantize(
            sharing_copy(self.model),
            self.resolution.plan,
            method=self.beginning.method,
            steps=self.beginning.steps,
            calibration=replace(self.calibration, data=from_ids(chosen), statistics=None, answers_only=False),
            output=Output(state.start if state else None, format="native", overwrite=True, fused=self.output.fused),
            run=self.run,
            tokenizer=self.tokenizer,
        ).model


def _carry_out(job: _Job, key: checkpoint.Key | None, batches: Sequence[Batch], read: Mapping[str, Any]) -> QuantizeResult:
    """Make the start, train, convert, measure and write; ``read`` is what is recorded of the text."""
    model, training, out = job.model, job.training, job.output.path
    sanity = SanityCheck.start(model, job.tokenizer, job.calibration.bos or None)
    rows = coverage_before(model, job.structure, job.plan, job.resolution.skipped)
    state = TrainingState(Path(out), key, resume=job.run.resume) if out is not None and key is not None else None
    origins = {
        name: InputQuantizer(job.plan[name].activation).prepare_weight(read_weight(model, site))
        for name, site in job.sites.items()
    }
    windows, held_out = job.split(batches)
    objective, float_model = _objective(job, state, windows, held_out)
    begin = job.begin(state, windows)
    prepare(model, start=begin, share=training.share, learn_zero=training.learn_zero, adapters=training.adapters)
    if float_model is not None:
        refuse_another_stream(float_model, model, job.structure.blocks[0].name, windows[0])
    before = {parameter: parameter.requires_grad for parameter in model.parameters()}
    learner = Learner(model, objective, training, windows, held_out)
    if state is not None and state.restore(learner):
        told.info("continuing after step %d of %d", learner.done, training.steps)
    with narrowed(model, training.compute_dtype(model.device)):
        if float_model is not None and training.block_steps:
            train_blocks(learner, float_model, job.structure, state or SaveState(), job.run.report)
        del float_model
        carry_out(learner, state or SaveState(), job.run.report)
    if state is not None:
        state(learner)  # what is left to do takes a while, too
    for parameter, wanted in before.items():
        parameter.requires_grad_(wanted)
    results = _installed_best(model, learner, origins)
    writer = _written(job, key, results)
    metadata = metadata_of(job.resolution, job.beginning.describe(), batches, read, results)
    metadata["training"] = {"settings": repr(training), **learner.history.facts()}
    done = Unfinished(model, job.tokenizer, job.structure, job.resolution, rows, sanity, writer).finish(results, metadata)
    if state is not None:
        state.clear()
    return done


def _objective(
    job: _Job, state: TrainingState | None, windows: Sequence[Tensor], held_out: Sequence[Tensor]
) -> tuple[Objective, nn.Module | None]:
    """Return what is minimised, and the float model, which ``job.model`` still is, if blocks are compared with its own."""
    training, compares = job.training, bool(job.training.block_steps or job.training.hidden)
    if training.block_steps:
        refuse_entangled(job.model, job.structure)
    float_model = _float_model(job) if compares or (training.asks_teacher and training.teacher == "live") else None
    blocks = tuple(block.name for block in job.structure.blocks) if training.hidden else ()
    teacher: Teacher | None = None
    if training.teacher == "stored":
        place = (None, None) if state is None else (state.teacher, state.key)
        teacher = stored = Stored([*seen(training, windows), *held_out], training.top_k, *place)
        if stored.missing():
            stored.make(float_model or _float_model(job), job.run.report)
    elif training.asks_teacher and float_model is not None:
        teacher = Live(float_model, blocks)
    objective = Objective(teacher, training.next_token_share, training.together, training.hidden, blocks)
    return objective, float_model if compares else None


def _float_model(job: _Job) -> nn.Module:
    """Return the float model in the dtype of the products, which stays what it is when ``job.model`` is trained."""
    dtype = job.training.compute_dtype(job.model.device)
    model: nn.Module = job.model
    return sharing_copy(model) if dtype == job.model.dtype else copy.deepcopy(model).to(dtype)


def _installed_best(model: nn.Module, learner: Learner, origins: Mapping[str, Tensor]) -> dict[str, Quantized]:
    """Convert the model, give it the best codes that were seen, and return them by layer."""
    convert(model)
    results = {}
    for name, module in model.named_modules():
        if isinstance(module, QuantModule):
            qtensor = learner.best[module.tied_to or name]
            module.qtensor = qtensor
            if module.tied_to is None:
                results[name] = Quantized(qtensor, relative_error(origins[name], qtensor.dequantize(), None))
    return {name: results[name] for name in origins}


def _written(job: _Job, key: checkpoint.Key | None, results: Mapping[str, Quantized]) -> checkpoint.CheckpointWriter | None:
    """Write every block; a run that was killed while it wrote goes on."""
    writer = open_writer(job.output, job.run, job.model, job.plan, key)
    if writer is None:
        return None
    for index, block in list(enumerate(writer.structure.blocks))[writer.finished :]:
        writer.write_block(index, {site.name: results[site.name].qtensor for site in block.sites if site.name in results})
    return writer
