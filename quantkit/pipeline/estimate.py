"""What a run will do, estimated from the model's config alone: no weight is read, nothing is written.

Bytes are exact: they come from the same layouts that the format writes. They count tensors, not the few kilobytes of
headers, config and tokenizer. Peak memory is an estimate: the sum of what is alive at the widest moment of the walk,

- the model as loaded, and the finished codes;
- one block in float32;
- with calibration: tokens x (2 hidden + 3 widest input) x 4 bytes, the suspended batches of one block (a gated MLP's);
- with calibration: 5 x widest input^2 x 4 bytes, a Hessian, its damped copy, factor and inverse;
- the logits of one window in float32, three times over, while the result is measured;
- what the quantizer and the steps say they take beside that;
- what Python and torch need to exist.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from quantkit.calibrate.data import Calibration
from quantkit.checkpoint.check import layout_bytes, layout_of
from quantkit.checkpoint.contents import Contents, Entry, carried_layout
from quantkit.hf.ledger import ledger_of
from quantkit.nn.sites import Site, Structure
from quantkit.nn.sizes import WINDOW, RunSize
from quantkit.pipeline.blocks import needs_of
from quantkit.pipeline.training.cost import training_cost
from quantkit.pipeline.training.settings import START_WINDOWS, Training
from quantkit.qtensor import empty_qtensor
from quantkit.quantizers.base import Quantizer
from quantkit.spec import Plan
from quantkit.transforms.base import Step

RUNTIME_BYTES = 450 << 20
"""Resident size of a process that has imported torch and transformers."""
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
        peak_bytes: estimated peak memory of the run.
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
    if training is not None:
        calibration = replace(calibration, samples=min(calibration.samples, START_WINDOWS))
    size = _size(model, structure, sites, calibration, calibrates)
    costs = [step.cost(size) for step in steps] + ([training_cost(training, size)] if training is not None else [])
    passes = [text for cost in costs for text in cost.first]
    if size.tokens:
        forward = f"one forward of {size.tokens:,} tokens, {calibration.batch_size} windows at a time"
        passes.append(f"each of {size.blocks} blocks in turn: {', '.join((forward, *method.cost(size).passes))}")
    passes += [text for cost in costs for text in cost.last]
    passes.append("the written files once, to compare them with the model in memory")
    working = max(_working_bytes(size, method), *(cost.nbytes for cost in costs), 0)
    return Estimate(
        schemes=_tally((plan[site.name].weight.describe(), site.numel) for site in sites),
        weights=weights,
        quantized_bytes=nbytes(chosen, plan),
        kept_bytes=nbytes(kept, plan) + carried,
        float_bytes=float_bytes + carried,
        bits_per_weight=codes * 8 / weights,
        peak_bytes=float_bytes + codes + working + RUNTIME_BYTES,
        passes=tuple(passes),
        kept=_kept(model, structure, plan, reasons or {}),
    )


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


def _size(model: nn.Module, structure: Structure, sites: list[Site], calibration: Calibration, calibrates: bool) -> RunSize:
    """Return the sizes that costs are estimated from."""
    vocabulary, hidden = model.get_input_embeddings().weight.shape  # type: ignore[operator]
    blocks = [model.get_submodule(block.name) for block in structure.blocks]
    return RunSize(
        tokens=calibration.samples * calibration.length if calibrates else 0,
        length=calibration.length,
        blocks=len(blocks),
        block=max((sum(p.numel() for p in block.parameters()) for block in blocks), default=0),
        hidden=hidden,
        vocabulary=vocabulary,
        widest=max(site.in_features for site in sites),
        weights=sum(site.numel for site in sites),
    )


def _working_bytes(size: RunSize, method: Quantizer) -> int:
    """Return the estimated bytes of everything that lives only while a block is at work or a window is measured."""
    calibrating = 0
    if size.tokens:
        calibrating = 4 * (size.tokens * (2 * size.hidden + 3 * size.widest) + 5 * size.widest**2) + method.cost(size).nbytes
    return 4 * size.block + max(calibrating, 4 * 3 * WINDOW * size.vocabulary)
