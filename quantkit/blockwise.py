"""Quantize a model one block at a time, each block seeing what the quantized blocks before it produce.

Only the block at work is on the device and in the compute dtype; the rest of the model stays where and what it is. The
activations between blocks (tokens x hidden) are kept in the compute dtype.
"""

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from quantkit.calibrate.walk import SiteStatistics, block_sites, record_inputs, walk_block
from quantkit.errors import CalibrationError
from quantkit.hf.blocks import call_block, cast_call, record_block_calls
from quantkit.memory import drop_pages, mapped_pages, return_freed_memory
from quantkit.nn.install import install
from quantkit.nn.sites import Block, Site, Structure, read_weight, write_weight
from quantkit.numerics import grid
from quantkit.progress import Progress, ProgressCallback
from quantkit.quantizers.base import Quantized, Quantizer, quantize_site
from quantkit.quantizers.rtn import RTN
from quantkit.rescale import shared_global_scales
from quantkit.resume import ResumeStore
from quantkit.spec import Plan, QuantSpec, Scheme

log = logging.getLogger(__name__)

Visit = Callable[[Site, Callable[[Sequence[str]], SiteStatistics]], None]


@dataclass(frozen=True)
class Compute:
    """Where and in which dtype a block runs while it is at work."""

    device: torch.device
    dtype: torch.dtype

    @classmethod
    def default(cls, model: nn.Module) -> "Compute":
        """Use the GPU in the model's dtype if there is one, otherwise the CPU in float32."""
        if torch.cuda.is_available():
            return cls(torch.device("cuda"), next(model.parameters()).dtype)
        return cls(torch.device("cpu"), torch.float32)


@contextlib.contextmanager
def resident(block: nn.Module, compute: Compute) -> Iterator[None]:
    """Move ``block`` to the compute device and dtype; afterwards every tensor is back where and what it was.

    A tensor that was not written to meanwhile gets its own memory back, so that a narrower dtype leaves no trace in it.
    """
    tensors = [*block.parameters(), *block.buffers()]
    home = [tensor.data for tensor in tensors]
    block.to(compute.device, compute.dtype)
    tensors = [*block.parameters(), *block.buffers()]  # buffers are new objects now
    moved = [tensor.data_ptr() for tensor in tensors]
    try:
        yield
    finally:
        for tensor, own, address in zip(tensors, home, moved, strict=True):
            tensor.data = own if tensor.data_ptr() == address else tensor.data.to(own.device, own.dtype)


class Chain:
    """The calibration batches on their way through the blocks.

    Args:
        model: the float model.
        structure: its blocks.
        batches: int64 token ids (B, T), without padding.
        compute: where blocks run.
        twin: also run the float blocks over what the float blocks before them produce, for quantizers that compare.

    Attributes:
        hidden: current input of the next block, one (B, T, H) per batch.
        twin: the same in the float model; empty if not asked for.
    """

    def __init__(
        self, model: nn.Module, structure: Structure, batches: Sequence[Tensor], compute: Compute, *, twin: bool = False
    ) -> None:
        self.model, self.structure, self.compute = model, structure, compute
        recorded = [record_block_calls(model, structure, ids) for ids in batches]
        self.hidden: list[Tensor] = [one.hidden.to(compute.dtype) for one in recorded]
        self.calls = [one.calls for one in recorded]
        self.twin = list(self.hidden) if twin else []

    @property
    def state(self) -> list[Tensor]:
        """What an interrupted run must find again: all hidden states, those of the float model last."""
        return [*self.hidden, *self.twin]

    @state.setter
    def state(self, tensors: list[Tensor]) -> None:
        self.hidden, self.twin = tensors[: len(self.calls)], tensors[len(self.calls) :]

    def advance(self, index: int, sites: Sequence[Site], visit: Visit) -> None:
        """Run block ``index`` (resident already) over all batches, visiting ``sites``; its outputs become the inputs."""
        block = self.structure.blocks[index]
        module = self.model.get_submodule(block.name)
        device, dtype = self.compute.device, self.compute.dtype

        def forward(pending: list[Tensor], batch: int) -> Callable[[], Tensor]:
            def run() -> Tensor:
                args, kwargs = cast_call(*self.calls[batch][index], dtype, device)
                # The chain gives up its reference, so that a block's input is freed as soon as the block is done with it.
                hidden, pending[batch] = pending[batch].to(device), pending[batch].new_empty(0)
                return call_block(module, hidden, args, kwargs).cpu()

            return run

        twins: list[dict[str, Tensor]] = []
        if self.twin:
            runs = [forward(self.twin, i) for i in range(len(self.calls))]
            self.twin, twins = record_inputs(module, block.name, sites, runs)
        pending, self.hidden = self.hidden, []
        runs = [forward(pending, i) for i in range(len(self.calls))]
        outputs = walk_block(module, block.name, sites, runs, visit, twins)
        if any(not bool(torch.isfinite(out.sum())) for out in outputs):
            raise CalibrationError(f"{block.name}: its output holds NaN or infinity; check the model and its dtype")
        self.hidden = outputs


def quantize_blocks(
    model: nn.Module,
    structure: Structure,
    plan: Plan,
    quantizer: Quantizer,
    chain: Chain | None,
    *,
    compute: Compute,
    store: ResumeStore | None,
    known: Mapping[str, SiteStatistics] | None,
    progress: ProgressCallback,
) -> dict[str, Quantized]:
    """Quantize every planned site, block by block, and install the results in ``model``.

    Args:
        model: changed in place.
        structure: its blocks and sites.
        plan: site name to scheme.
        quantizer: how codes are chosen.
        chain: calibration batches, or None if the quantizer needs none or ``known`` statistics are given.
        compute: where blocks run.
        store: where finished blocks are kept, or None.
        known: statistics from an earlier pass, by site name, used instead of a walk.
        progress: gets one event per site.

    Returns:
        The quantized sites by name, in model order.
    """
    finished = store.finished() if store else 0
    if finished:
        log.info("continuing after %d finished blocks", finished)
        if chain is not None and store is not None:
            chain.state = store.load_chain(finished - 1)
    results: dict[str, Quantized] = {}
    global_scales = shared_global_scales(model, structure, plan)
    drop_pages(mapped_pages(model.parameters()))  # what was read so far to check the model and to record its predictions
    for index, block in enumerate(structure.blocks):
        sites = block_sites(block, plan)
        mapped = mapped_pages(model.get_submodule(block.name).parameters())
        if index < finished and store is not None:
            loaded = store.load(index)
            quantized = {site.name: loaded[site.name] for site in sites}
        else:
            report = _reporter(progress, len(plan), len(results))
            with torch.no_grad(), resident(model.get_submodule(block.name), compute):
                quantized = _quantize_block(model, index, sites, plan, quantizer, chain, known or {}, global_scales, report)
            if store is not None:
                store.save(index, quantized, chain.state if chain else [])
        for site in sites:
            install(model, site, quantized[site.name].qtensor, plan[site.name].activation)
        results |= quantized
        drop_pages(mapped)
        return_freed_memory()
        progress(Progress("quantize", len(results), len(plan), block.name))
    return _quantize_outside(model, structure, plan, quantizer, compute, results, progress)


def needs_of(quantizer: Quantizer, scheme: Scheme) -> tuple[str, ...]:
    """Return the statistics that one site wants: the quantizer's, and the range of its inputs for a static grid."""
    return (*quantizer.needs, *(("abs_max",) if scheme.static else ()))


def static_scale(site: Site, activation: QuantSpec, statistics: SiteStatistics | None) -> Tensor:
    """Return the scale (..., 1) that covers every input seen in calibration; an expert that saw none gets the widest.

    Raises:
        CalibrationError: no input was seen.
    """
    if statistics is None or "abs_max" not in statistics.results:
        raise CalibrationError(f"{site.name}: its static input scale needs calibration inputs; use more text, or w8a8")
    largest = statistics.results["abs_max"].amax(-1, keepdim=True).float().cpu()  # (..., 1)
    largest = torch.where(largest > 0, largest, largest.amax())
    scale, _ = grid.choose_qparams(largest.unsqueeze(-1), activation)
    return scale.squeeze(-1)


def _reporter(progress: ProgressCallback, total: int, before: int) -> Callable[[str, Quantized, int], None]:
    def report(name: str, one: Quantized, done: int) -> None:
        for note in one.notes:
            log.warning("%s: %s", name, note)
        progress(Progress("quantize", before + done, total, name, one.loss))

    return report


def _quantize_block(
    model: nn.Module,
    index: int,
    sites: list[Site],
    plan: Plan,
    quantizer: Quantizer,
    chain: Chain | None,
    known: Mapping[str, SiteStatistics],
    global_scales: Mapping[str, Tensor],
    report: Callable[[str, Quantized, int], None],
) -> dict[str, Quantized]:
    quantized: dict[str, Quantized] = {}

    def choose(site: Site, statistics: SiteStatistics | None) -> None:
        weight, scheme = read_weight(model, site), plan[site.name]
        one = quantize_site(quantizer, site.name, weight, scheme.weight, statistics, global_scales.get(site.name))
        write_weight(model, site, one.qtensor.dequantize())  # later sites and blocks see the quantized weight
        qtensor = one.qtensor.to("cpu")
        if scheme.activation is not None and scheme.static:
            qtensor = dataclasses.replace(qtensor, input_scale=static_scale(site, scheme.activation, statistics))
        quantized[site.name] = dataclasses.replace(one, qtensor=qtensor)
        report(site.name, one, len(quantized))

    if chain is not None:
        chain.advance(index, sites, lambda site, statistics: choose(site, statistics(needs_of(quantizer, plan[site.name]))))
    for site in sites:
        if site.name not in quantized:
            choose(site, known.get(site.name))
    return {site.name: quantized[site.name] for site in sites}


def _quantize_outside(
    model: nn.Module,
    structure: Structure,
    plan: Plan,
    quantizer: Quantizer,
    compute: Compute,
    results: dict[str, Quantized],
    progress: ProgressCallback,
) -> dict[str, Quantized]:
    """Quantize planned sites outside the blocks (embedding, output head), which are not part of the walk.

    The two ends of the model are rounded to nearest, whatever the quantizer: no statistics say which of their rows matter.
    """
    ends = {structure.head, structure.embedding.name if structure.embedding else None}
    for site in block_sites(Block("", structure.after), plan):
        weight = read_weight(model, site).to(compute.device)
        method = RTN("mse" if plan[site.name].weight.bits < 8 else "absmax") if site.name in ends else quantizer
        one = quantize_site(method, site.name, weight, plan[site.name].weight, None)
        results[site.name] = Quantized(one.qtensor.to("cpu"), one.loss, one.notes, one.fell_back)
        install(model, site, results[site.name].qtensor, plan[site.name].activation)
        progress(Progress("quantize", len(results), len(plan), site.name, one.loss))
    return results


def collect_statistics(
    model: nn.Module,
    structure: Structure,
    batches: Sequence[Tensor],
    needs: Sequence[str],
    *,
    compute: Compute,
    progress: ProgressCallback,
) -> dict[str, SiteStatistics]:
    """Run the float model once and return the named statistics of every site in its blocks; the model is not changed."""
    chain = Chain(model, structure, batches, compute)
    found: dict[str, SiteStatistics] = {}
    for index, block in enumerate(structure.blocks):
        with torch.no_grad(), resident(model.get_submodule(block.name), compute):
            chain.advance(index, block.sites, lambda site, statistics: found.__setitem__(site.name, statistics(needs)))
        progress(Progress("calibrate", index + 1, len(structure.blocks), block.name))
    return found
