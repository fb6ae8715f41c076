"""What a run will do, estimated from the model's config alone: no weight is read, nothing is written.

Bytes are exact: they come from the same layouts that the format writes. They count tensors, not the few kilobytes of
headers, config and tokenizer. Peak memory is an estimate; :mod:`quantkit.pipeline.memory` says what it is made of.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from quantkit.calibrate.data import Calibration
from quantkit.checkpoint.check import layout_bytes, layout_of
from quantkit.checkpoint.contents import Contents, Entry, carried_layout
from quantkit.hf.ledger import ledger_of
from quantkit.hf.made import lies_on_disk, written_bytes
from quantkit.nn.sites import Structure
from quantkit.pipeline.blocks import needs_of
from quantkit.pipeline.memory import memory_of, run_size
from quantkit.pipeline.training.cost import Trained, scratch_bytes, trained_numbers, training_cost
from quantkit.pipeline.training.settings import START_WINDOWS, Training
from quantkit.qtensor import empty_qtensor
from quantkit.quantizers.base import Quantizer
from quantkit.spec import Plan
from quantkit.transforms.base import Step

DEFAULT_CALIBRATION = Calibration()


@dataclass(frozen=True, slots=True)
class Estimate:
    """The prediction.

    Attributes:
        schemes: description of a scheme to (sites, weights).
        weights: number of weights that will be quantized.
        quantized_bytes: what they take in the checkpoint.
        kept_bytes: every other parameter, in the checkpoint's dtype, and what is carried over from the source as it is.
        float_bytes: the whole model in the checkpoint's dtype, unquantized, with what is carried over.
        bits_per_weight: stored bits per quantized weight: codes, scales, zero points and row padding.
        peak_bytes: estimated peak memory of the run (resident size of the process).
        disk_bytes: most that the run has on the disk at a time: the checkpoint, what a continued run wants, activations.
        passes: what will be run through the model, in order.
        kept: reason to (tensors, parameters), for everything that stays in float.
    """

    schemes: dict[str, tuple[int, int]]
    weights: int
    quantized_bytes: int
    kept_bytes: int
    float_bytes: int
    bits_per_weight: float
    peak_bytes: int
    disk_bytes: int
    passes: tuple[str, ...]
    kept: dict[str, tuple[int, int]]

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors of the checkpoint."""
        return self.quantized_bytes + self.kept_bytes


def estimate(
    contents: Contents,
    plan: Plan,
    method: Quantizer,
    steps: Sequence[Step] = (),
    *,
    calibration: Calibration = DEFAULT_CALIBRATION,
    format: str = "compressed-tensors",
    reasons: Mapping[str, str] | None = None,
    training: Training | None = None,
    max_memory: int | None = None,
) -> Estimate:
    """Estimate size, memory and passes of a run.

    Args:
        contents: what a checkpoint of the model holds; its empty model has the dtype that will be loaded and written.
        plan: layer name to scheme.
        method: the quantizer.
        steps: what else is done.
        calibration: how much text there will be, if any is needed.
        format: checkpoint format.
        reasons: layer name to why it stays in float.
        training: what is trained afterwards, if anything is.
        max_memory: most bytes of memory that the run may take.

    Raises:
        QuantkitError: the run cannot keep to ``max_memory``.
    """
    model, structure = contents.model, contents.structure
    sites = [site for site in contents.sites.values() if site.name in plan]
    weights = sum(site.numel for site in sites)
    codes = sum(empty_qtensor(plan[site.name].weight, site.shape).nbytes for site in sites)
    chosen = [entry for entry in contents.entries if entry.site and entry.site.name in plan]
    kept = [entry for entry in contents.entries if not (entry.site and entry.site.name in plan)]

    def nbytes(entries: Iterable[Entry], plan: Plan) -> int:
        return sum(layout_bytes(layout_of(contents, model, plan, format, entry)) for entry in entries)

    carried = layout_bytes(carried_layout(ledger_of(model)))
    float_bytes = nbytes(contents.entries, {})
    calibrates = any(needs_of(method, scheme) for scheme in plan.values()) or any(step.needs for step in steps)
    windows = calibration.samples
    if training is not None:
        calibration = replace(calibration, samples=min(calibration.samples, START_WINDOWS))
    tokens = calibration.samples * calibration.length if calibrates else 0
    size = run_size(model, structure, sites, tokens, calibration.length)
    costs = [step.cost(size) for step in steps]
    if training is not None:
        trained = Trained(trained_numbers(training, sites, plan), codes, model.dtype, windows)
        costs.append(training_cost(training, size, trained))
    passes = [text for cost in costs for text in cost.first]
    if size.tokens:
        forward = f"one forward of {size.tokens:,} tokens, {calibration.batch_size} windows at a time"
        passes.append(f"each of {size.blocks} blocks in turn: {', '.join((forward, *method.cost(size).passes))}")
    passes += [text for cost in costs for text in cost.last]
    passes.append("the written files once, to compare them with the model in memory")
    memory = memory_of(model, structure, plan, size, method, steps)
    ways = memory.choose(max_memory)
    peak = max(memory.peak(ways), memory.runtime + float_bytes + costs[-1].nbytes if training is not None else 0)
    quantized, rest = nbytes(chosen, plan), nbytes(kept, plan) + carried
    handed = 2 * size.tokens * size.hidden * 4 + (memory.on_disk if ways.spills else 0) + _made_on_disk(model)
    if training is not None:  # the start is a checkpoint of its own
        handed = max(handed, quantized + rest + scratch_bytes(training, sites, plan, windows * calibration.length))
    return Estimate(
        schemes=_tally((plan[site.name].weight.describe(), site.numel) for site in sites),
        weights=weights,
        quantized_bytes=quantized,
        kept_bytes=rest,
        float_bytes=float_bytes + carried,
        bits_per_weight=codes * 8 / weights,
        peak_bytes=peak,
        disk_bytes=quantized + rest + handed,
        passes=tuple(passes),
        kept=_kept(model, structure, plan, reasons or {}),
    )


def _made_on_disk(model: nn.Module) -> int:
    ledger = ledger_of(model)
    return written_bytes(model, ledger) if ledger is not None and lies_on_disk(model, ledger) else 0


def _kept(model: nn.Module, structure: Structure, plan: Plan, reasons: Mapping[str, str]) -> dict[str, tuple[int, int]]:
    sites = [site for site in (*structure.sites, *structure.outside) if site.name not in plan]
    own = {name for name, _ in model.named_parameters()}  # a tied name shares another's memory and takes none of its own
    skipped = {name: reason for name, reason in structure.skipped.items() if name.removesuffix(".weight") not in plan}
    rest = [(reason, model.get_parameter(name).numel() if name in own else 0) for name, reason in skipped.items()]
    ledger = ledger_of(model)
    carried = ledger.carried_headers.values() if ledger is not None else ()
    rest = [*rest, *(("carried over: the model's class does not know it", torch.Size(h.shape).numel()) for h in carried)]
    return _tally([*((reasons.get(site.name, "not in the plan"), site.numel) for site in sites), *rest])


def _tally(rows: Iterable[tuple[str, int]]) -> dict[str, tuple[int, int]]:
    """Return name to (number of rows, sum of their sizes), in order of first appearance."""
    found: dict[str, tuple[int, int]] = {}
    for name, size in rows:
        count, total = found.get(name, (0, 0))
        found[name] = (count + 1, total + size)
    return found
