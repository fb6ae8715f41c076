"""What a recipe will do, predicted from the model's config alone: no weight is read, nothing is written.

Bytes are exact: they come from the same layouts that the format writes. They count tensors, not the few kilobytes of
headers, config and tokenizer. Peak memory is an estimate: the sum of what is alive at the widest moment of the walk,

- the model as loaded, and the finished codes;
- one block in float32;
- with calibration: tokens x (2 hidden + 3 widest input) x 4 bytes, the suspended batches of one block (a gated MLP's);
- with calibration: 5 x widest input^2 x 4 bytes, a Hessian, its damped copy, factor and inverse;
- the logits of one window in float32, three times over, while the result is proven;
- with distillation: codes as bytes and weights as bfloat16, the activations of one step's windows through all blocks;
- what Python and torch need to exist.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import nn

from quantkit.checkpoint.check import layout_bytes, layout_of
from quantkit.checkpoint.contents import Contents, Entry
from quantkit.nn.sites import Site, Structure
from quantkit.pipeline.distill import Distill
from quantkit.qtensor import QTensor
from quantkit.quantizers.autoround import AutoRound
from quantkit.quantizers.base import Quantizer
from quantkit.spec import Plan

RUNTIME_BYTES = 450 << 20
"""Resident size of a process that has imported torch and transformers."""
WINDOW = 512
"""Tokens of one window while measuring, for the memory of its logits."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """The prediction.

    Attributes:
        schemes: description of a scheme to (sites, weights).
        weights: number of weights that will be quantized.
        quantized_bytes: what they take in the checkpoint.
        kept_bytes: every other parameter, in the checkpoint's dtype.
        float_bytes: the whole model in the checkpoint's dtype, unquantized.
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
    *,
    format: str = "compressed-tensors",
    calibration_tokens: int = 0,
    batch_size: int = 8,
    quantizer: Quantizer | None = None,
    distill: Distill | None = None,
    length: int = WINDOW,
    reasons: Mapping[str, str] | None = None,
) -> Estimate:
    """Predict size, memory and passes of a run.

    Args:
        contents: what a checkpoint of the model holds; its empty model has the dtype that will be loaded and written.
        plan: site name to scheme.
        format: checkpoint format.
        calibration_tokens: tokens run through every block; 0 if the quantizer needs none.
        batch_size: calibration windows per forward.
        quantizer: decides what else a block goes through; None is one that runs it once.
        distill: settings of the distillation, if there will be one.
        length: tokens per calibration window.
        reasons: site name to why it stays in float.
    """
    model, structure = contents.model, contents.structure
    sites = [site for site in contents.sites.values() if site.name in plan]
    weights = sum(site.numel for site in sites)
    codes = sum(QTensor.empty(plan[site.name].weight, site.shape).nbytes for site in sites)
    chosen = [entry for entry in contents.entries if entry.site and entry.site.name in plan]
    kept = [entry for entry in contents.entries if not (entry.site and entry.site.name in plan)]

    def size(entries: Iterable[Entry], plan: Plan) -> int:
        return sum(layout_bytes(layout_of(contents, model, plan, format, entry)) for entry in entries)

    float_bytes, tokens = size(contents.entries, {}), calibration_tokens
    passes = ["the written files once, to compare them with the model in memory"]
    if tokens:
        text = f"one forward of {tokens:,} tokens, {batch_size} windows at a time"
        passes.insert(0, f"each of {len(structure.blocks)} blocks in turn: {text}{_more_passes(quantizer)}")
    working = _working_bytes(model, structure, sites, tokens, quantizer)
    if distill is not None:
        learned = distill.steps * distill.windows * length
        passes.insert(0, f"the float model: one forward of up to {learned:,} tokens")
        passes.insert(-1, f"the quantized model: {distill.steps} forwards and backwards of {distill.windows} windows")
        working = max(working, _learning_bytes(model, structure, sites, distill, length))
    return Estimate(
        schemes=_tally((plan[site.name].weight.describe(), site.numel) for site in sites),
        weights=weights,
        quantized_bytes=size(chosen, plan),
        kept_bytes=size(kept, plan),
        float_bytes=float_bytes,
        bits_per_weight=codes * 8 / weights,
        peak_bytes=float_bytes + codes + working + RUNTIME_BYTES,
        passes=tuple(passes),
        kept=_kept(model, structure, plan, reasons or {}),
    )


def _kept(model: nn.Module, structure: Structure, plan: Plan, reasons: Mapping[str, str]) -> dict[str, tuple[int, int]]:
    sites = [site for site in (*structure.sites, *structure.outside) if site.name not in plan]
    own = {name for name, _ in model.named_parameters()}  # a tied name shares another's memory and takes none of its own
    skipped = {name: reason for name, reason in structure.skipped.items() if name.removesuffix(".weight") not in plan}
    rest = ((reason, model.get_parameter(name).numel() if name in own else 0) for name, reason in skipped.items())
    return _tally([*((reasons.get(site.name, "not in the plan"), site.numel) for site in sites), *rest])


def _tally(rows: Iterable[tuple[str, int]]) -> dict[str, tuple[int, int]]:
    """Return name to (number of rows, sum of their sizes), in order of first appearance."""
    found: dict[str, tuple[int, int]] = {}
    for name, size in rows:
        count, total = found.get(name, (0, 0))
        found[name] = (count + 1, total + size)
    return found


def _more_passes(quantizer: Quantizer | None) -> str:
    text = ", and one of the float block" if quantizer is not None and "drift" in quantizer.needs else ""
    if isinstance(quantizer, AutoRound):
        text += f", then {quantizer.iters} forwards and backwards of {quantizer.batch_size} windows and a last forward"
    return text


def _working_bytes(model: nn.Module, structure: Structure, sites: list[Site], tokens: int, quantizer: Quantizer | None) -> int:
    """Return the estimated bytes of everything that lives only while a block is at work or a window is measured."""
    block = max((sum(p.numel() for p in model.get_submodule(b.name).parameters()) for b in structure.blocks), default=0)
    vocabulary, hidden = model.get_input_embeddings().weight.shape  # type: ignore[operator]
    widest = max(site.in_features for site in sites)
    calibrating = tokens * (2 * hidden + 3 * widest) + 5 * widest**2 if tokens else 0
    if quantizer is not None and "drift" in quantizer.needs:  # the float model's activations and inputs of sites, its moments
        calibrating += tokens * (2 * hidden + 2 * widest) + 2 * widest**2
    if isinstance(quantizer, AutoRound):  # the block's input and the float weights are kept, codes and drifts added
        calibrating += tokens * hidden + 3 * block
    return int(4 * (block + max(calibrating, 3 * WINDOW * vocabulary)))


def _learning_bytes(model: nn.Module, structure: Structure, sites: list[Site], distill: Distill, length: int) -> int:
    """Return the estimated bytes that live only while scales are learned, products running in two bytes per number."""
    vocabulary, hidden = model.get_input_embeddings().weight.shape  # type: ignore[operator]
    widest = max(site.in_features for site in sites)
    weights = sum(site.numel for site in sites)
    kept = distill.windows * length * len(structure.blocks) * (12 * hidden + 6 * widest)
    taught = distill.steps * distill.windows * length * hidden
    per_weight = 3 if distill.code_rate == 0 else 5  # codes as bytes, bfloat16 weights, float16 drifts
    return int(per_weight * weights + 2 * (kept + taught + 4 * length * vocabulary + vocabulary * hidden))
