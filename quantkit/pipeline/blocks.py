"""Quantize a model one block at a time, each block seeing what the quantized blocks before it produce.

Only the block at work is on the device and in the compute dtype; the rest of the model stays where and what it is. The
activations between blocks (tokens x hidden) are kept in the compute dtype.
"""

import contextlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import zip_longest

import torch
from torch import Tensor, nn

from quantkit.calibrate.backward import Counted
from quantkit.calibrate.chain import BlockWalk, block_walk, relative_distance
from quantkit.calibrate.collect import Gather
from quantkit.calibrate.collectors import COLLECTORS
from quantkit.calibrate.guidance import token_weights
from quantkit.calibrate.walk import block_sites
from quantkit.checkpoint.handed import Share
from quantkit.errors import CalibrationError
from quantkit.formats.base import nearest_stored
from quantkit.nn.install import install
from quantkit.nn.quantized import Quantized
from quantkit.nn.sites import Block, Site, SiteStatistics, Structure, read_weight, write_weight
from quantkit.numerics import grid
from quantkit.numerics.inputs import InputQuantizer, static_scale
from quantkit.pipeline.resume import ResumeStore
from quantkit.quantizers.base import QuantizedBlock, Quantizer, quantize_site
from quantkit.quantizers.rtn import RTN
from quantkit.spec import ActivationSpec, Plan, Scheme
from quantkit.system.compute import Compute, on_device
from quantkit.system.memory import drop_pages, mapped_pages, return_freed_memory
from quantkit.system.progress import Progress, ProgressCallback, ignore, told
from quantkit.system.scratch import MEMORY, Scratch
from quantkit.system.workers import ALONE, Workers
from quantkit.transforms.base import Correction
from quantkit.transforms.scaling_groups import shared_global_scales

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class BlockRun:
    """What is the same for all blocks of a model while they are quantized.

    Attributes:
        model: changed in place.
        structure: its blocks and layers.
        plan: layer name to scheme.
        method: how codes are chosen.
        compute: where blocks run.
        chain: calibration batches, or None if nothing needs them or ``known`` statistics are given.
        known: statistics from an earlier pass, by layer name, used instead of a walk.
        corrections: layer name to what changes its result once it is quantized.
        store: where finished blocks are kept, or None.
        progress: gets one event per layer.
        strict: a layer that falls back to plain rounding ends the run.
        keep: finished blocks stay in memory, for a step that goes on with them, although they are in a store.
        workers: who carries out the run together.
        formats: what will be written, which have a say in the last digits of scales.
    """

    model: nn.Module
    structure: Structure
    plan: Plan
    method: Quantizer
    compute: Compute
    chain: BlockWalk | None = None
    known: Mapping[str, SiteStatistics] = field(default_factory=dict)
    corrections: Mapping[str, Sequence[Correction]] = field(default_factory=dict)
    store: ResumeStore | None = None
    progress: ProgressCallback = ignore
    strict: bool = False
    keep: bool = False
    formats: Sequence[str] = ()
    workers: Workers = ALONE

    @cached_property
    def walked(self) -> int:
        """Number of leading blocks that text runs through: behind the last with a planned layer nobody wants to know."""
        planned = [index for index, block in enumerate(self.structure.blocks) if block_sites(block, self.plan)]
        return planned[-1] + 1 if planned else 0

    def chain_at(self, index: int) -> BlockWalk | None:
        """Return what brings calibration text to a block; None if nothing there is quantized by it."""
        return self.chain if index < self.walked else None

    @property
    def share(self) -> Share:
        """Which part of what blocks hand on is this process's."""
        batches = len(self.chain.hidden) if self.chain is not None else 0
        return Share(self.workers, batches) if self.workers.shares else Share()

    def needs(self, name: str) -> tuple[str, ...]:
        """Return the statistics wanted of a layer's inputs."""
        corrections = self.corrections.get(name, ())
        return (*needs_of(self.method, self.plan[name]), *(need for one in corrections for need in one.needs))


def quantize_blocks(run: BlockRun) -> dict[str, Quantized]:
    """Quantize every planned layer, block by block, and install the results in the model.

    Returns:
        The quantized layers by name, in model order.
    """
    model, structure, plan, store = run.model, run.structure, run.plan, run.store
    finished = run.workers.least(store.finished() if store else 0)
    if finished:
        told.info("continuing after block %d of %d", finished, len(structure.blocks))
        if (chain := run.chain_at(finished)) is not None and chain.state and store is not None:
            chain.state = store.load_chain(len(chain.state))
    results: dict[str, Quantized] = {}
    global_scales = shared_global_scales(model, structure, plan)
    drop_pages(mapped_pages(model.parameters()))  # what was read so far to check the model and to record its predictions
    run.progress(Progress("quantize", 0, len(plan)))  # the first layer takes a while
    for index, block in enumerate(structure.blocks):
        sites = block_sites(block, plan)
        known = [one for site in sites if site.name in run.known for one in run.known[site.name].results.values()]
        mapped = mapped_pages([*model.get_submodule(block.name).parameters(), *known])
        if index < finished and store is not None:
            loaded = store.load(index)
            quantized = {site.name: loaded[site.name] for site in sites}
            _catch_up(run, index, quantized)
        else:
            report = reporter(run, len(results))
            with torch.no_grad(), placed(run, index):
                quantized = quantize_block(run, index, sites, global_scales, report)
        for site in sites:
            _write_bias(model, site, quantized[site.name])
        if store is not None and index >= finished:
            chain = run.chain_at(index + 1)
            store.save(index, quantized, chain.state if chain else [])
        if store is not None and not run.keep:
            quantized = store.on_disk(index, quantized)
        for site in sites:
            install(model, site, quantized[site.name].qtensor, plan[site.name].activation)
        results |= quantized
        drop_pages(mapped)
        return_freed_memory()
        run.progress(Progress("quantize", len(results), len(plan), block.name))
    return _quantize_outside(run, results)


def calibration_chain(
    model: nn.Module,
    structure: Structure,
    batches: Sequence[Tensor],
    method: Quantizer,
    compute: Compute,
    counted: Counted = (),
    progress: ProgressCallback = ignore,
    scratch: Scratch = MEMORY,
    workers: Workers = ALONE,
) -> BlockWalk:
    """Return the calibration batches (int64 (B, T), without padding) before the first block, as a quantizer compares them.

    A quantizer whose statistics are guided has a backward pass run over them first. ``workers`` have other batches.
    """
    compares = method.refines_blocks or any(COLLECTORS.get(name).paired for name in method.needs)
    weights = None
    if any(COLLECTORS.get(name).guided for name in method.needs):
        weights = token_weights(model, structure, batches, counted=counted, compute=compute, progress=progress)
    chain = block_walk(
        model,
        structure,
        batches,
        compute,
        with_float=compares,
        counted=counted,
        weights=weights,
        scratch=scratch,
    )
    chain.workers = workers
    return chain


def windows_of(
    batches: Sequence[Tensor], counted: Counted, method: Quantizer, workers: Workers
) -> tuple[list[Tensor], Counted]:
    """Return the batches (int64 (B, T)) that this process runs, in the sizes that a quantizer wants, and their marks."""
    if method.batch_size is not None:
        size = method.batch_size
        counted = [part for ids, marks in zip_longest(batches, counted) for part in _split(marks, size, len(ids))]
        batches = [part for ids in batches for part in ids.split(size)]
    return workers.share(batches), workers.share(counted)


def _split(marks: Tensor | None, size: int, rows: int) -> Sequence[Tensor | None]:
    """Return the parts of ``size`` rows of a batch's marks (rows, T), as its ids are split."""
    return [None] * -(-rows // size) if marks is None else marks.split(size)


def _catch_up(run: BlockRun, index: int, quantized: Mapping[str, Quantized]) -> None:
    """Send the calibration text through a finished block again, as it was when it was finished, if its outputs are not stored.

    A method that learns blocks starts anew after each of them anyway.
    """
    chain = run.chain_at(index)
    if chain is None or chain.state or run.method.refines_blocks:
        return
    for site in block_sites(run.structure.blocks[index], quantized):
        _write_stored(run.model, site, run.plan[site.name], quantized[site.name].qtensor.dequantize())
        _write_bias(run.model, site, quantized[site.name])
    with torch.no_grad(), chain.placed(index):
        chain.advance(index, (), lambda site, gather: None)


def placed(run: BlockRun, index: int) -> contextlib.AbstractContextManager[object]:
    """Return the context in which a block is where it is quantized."""
    if (chain := run.chain_at(index)) is not None:
        return chain.placed(index)
    module = run.model.get_submodule(run.structure.blocks[index].name)
    here = all(parameter.device == run.compute.device for parameter in module.parameters())
    if here and run.compute.device.type == "cpu" and run.compute.dtype == torch.float32:
        return contextlib.nullcontext()  # quantizers widen what they are at work on; nobody runs the block
    return on_device(module, run.compute)


def needs_of(method: Quantizer, scheme: Scheme) -> tuple[str, ...]:
    """Return the statistics that one layer wants: the quantizer's, and the range of its inputs for a static grid."""
    return (*method.needs, *(("abs_max",) if scheme.static else ()))


def calibrated_scale(site: Site, activation: ActivationSpec, statistics: SiteStatistics | None) -> Tensor:
    """Return the scale (..., 1) that covers every input of a layer seen in calibration.

    Raises:
        CalibrationError: no input was seen, or inputs so large or small that the stored dtype cannot hold their scale.
    """
    if statistics is None or "abs_max" not in statistics.results:
        raise CalibrationError(f"{site.name}: its static input scale needs calibration inputs; use more text, or w8a8")
    largest = float(statistics.results["abs_max"].amax())
    wanted = grid.wanted_scales(torch.tensor([[largest]]), activation.grid).item()
    low, high = grid.scale_bounds(activation.grid.scale_dtype)
    if largest and not low <= wanted <= high:
        raise CalibrationError(
            f"{site.name}: its inputs reach {largest:.3g}, and {activation.grid.scale_dtype} cannot hold their static scale "
            f"{wanted:.3g}; use dynamic activations (w8a8, fp8-dynamic), or a scheme with float32 scales"
        )
    return static_scale(activation, statistics.results["abs_max"])


def _weight_to_store(model: nn.Module, site: Site, scheme: Scheme) -> Tensor:
    """Return a layer's float weight as it will be stored."""
    return InputQuantizer(scheme.activation).prepare_weight(read_weight(model, site))


def _write_stored(model: nn.Module, site: Site, scheme: Scheme, weight: Tensor) -> None:
    """Write a stored weight into the float model, whose inputs are as they are."""
    write_weight(model, site, InputQuantizer(scheme.activation).restore_weight(weight))


def _write_bias(model: nn.Module, site: Site, one: Quantized) -> None:
    if one.bias is not None:
        bias = model.get_submodule(site.module).get_parameter("bias")
        bias.data = one.bias.to(bias.device, bias.dtype)  # the checkpoint's dtype, outside of the walk


def reporter(run: BlockRun, before: int) -> Callable[[str, Quantized, int], None]:
    """Return what tells of a layer of a block (name, result, number of layers of the block that are done).

    Args:
        run: what is the same for all blocks.
        before: number of layers in the blocks before.
    """

    def report(name: str, one: Quantized, done: int) -> None:
        for note in one.notes:
            log.warning("%s: %s", name, note)
        if one.fell_back and run.strict:
            raise CalibrationError(
                f"{name}: {'; '.join(one.notes) or 'fell back to plain rounding'}; strict=True forbids that, use more text"
            )
        run.progress(Progress("quantize", before + done, len(run.plan), name, one.loss))

    return report


def quantize_block(
    run: BlockRun,
    index: int,
    sites: Sequence[Site],
    global_scales: Mapping[str, Tensor],
    report: Callable[[str, Quantized, int], None],
) -> dict[str, Quantized]:
    """Quantize the layers of one block, which is :func:`placed`; where text runs, its outputs are the next block's inputs.

    Args:
        run: what is the same for all blocks.
        index: of the block.
        sites: its planned layers.
        global_scales: layer name to a scale that several layers share.
        report: see :func:`reporter`.
    """
    chain = run.chain_at(index)
    refined = chain if run.method.refines_blocks and sites else None
    again = refined.rerunner(index) if refined is not None else None
    origin = {site.name: _weight_to_store(run.model, site, run.plan[site.name]) for site in sites} if refined else {}
    quantized: dict[str, Quantized] = {}

    def choose(site: Site, statistics: SiteStatistics | None) -> None:
        quantized[site.name] = _quantize_layer(run, site, statistics, global_scales.get(site.name))
        report(site.name, quantized[site.name], len(quantized))

    def visit(site: Site, gather: Gather) -> None:
        choose(site, gather(run.needs(site.name), InputQuantizer(run.plan[site.name].activation)))

    for site in sites:  # what is read in place is seen by nobody, and so comes first, for the others to see its rounding
        if site.read:
            choose(site, run.known.get(site.name))
    if chain is not None:
        chain.advance(index, [site for site in sites if not site.read], visit)
    for site in sites:
        if site.name not in quantized:
            choose(site, run.known.get(site.name))
    if refined is not None and again is not None:
        quantized = _refine(run, refined, sites, quantized, origin, again)
    return {site.name: quantized[site.name] for site in sites}


def _quantize_layer(run: BlockRun, site: Site, statistics: SiteStatistics | None, global_scale: Tensor | None) -> Quantized:
    """Quantize one layer and, where calibration text runs, write it into the model, for later layers and blocks to see."""
    scheme = run.plan[site.name]
    weight = _weight_to_store(run.model, site, scheme)
    one = quantize_site(run.method, site.name, weight, scheme.weight, statistics, global_scale, run.workers)
    one = replace(one, qtensor=nearest_stored(one.qtensor, run.formats))
    if run.chain is not None:
        _write_stored(run.model, site, scheme, one.qtensor.dequantize())
    qtensor = one.qtensor.to("cpu")
    if scheme.activation is not None and scheme.static:
        qtensor = qtensor.with_parts({"input_scale": calibrated_scale(site, scheme.activation, statistics)})
    if run.chain is None:
        drop_pages(mapped_pages([weight]))
    one = replace(one, qtensor=qtensor)
    for correction in run.corrections.get(site.name, ()):
        one = correction.correct(run.model.get_submodule(site.module), weight, one, statistics)
        _write_bias(run.model, site, one)
    return one


def _refine(
    run: BlockRun,
    chain: BlockWalk,
    sites: Sequence[Site],
    start: dict[str, Quantized],
    origin: Mapping[str, Tensor],
    again: Callable[[int], Tensor],
) -> dict[str, Quantized]:
    """Let the quantizer refine a block as a whole, and keep what it started with if that is better.

    The chain goes on with the result.

    Args:
        run: the chain has passed the block.
        chain: its chain.
        sites: the block's planned layers.
        start: the quantized layers, which are in the model already.
        origin: layer name to float weight.
        again: batch number to what the block makes of its inputs now.
    """
    before = relative_distance(chain.hidden, chain.float_hidden)
    layers = {
        site: (start[site.name].qtensor, origin[site.name], run.plan[site.name].activation) for site in sites if not site.read
    }
    block = QuantizedBlock(run.model, layers, again, chain.float_hidden, run.compute)
    refined = run.method.refine_block(block)
    for site, qtensor in refined.items():
        _write_stored(run.model, site, run.plan[site.name], qtensor.dequantize())
    with run.compute.rounding_products():
        outputs = [again(batch).to(output) for batch, output in enumerate(chain.hidden)]
    after = relative_distance(outputs, chain.float_hidden)
    log.info("%s: output error %.3e before learning, %.3e after", sites[0].name.rpartition(".")[0], before, after)
    better = after < before
    chain.replace(outputs if better else chain.hidden)
    if not better:
        return start
    return start | {site.name: replace(start[site.name], qtensor=q.to("cpu"), loss=after) for site, q in refined.items()}


def _quantize_outside(run: BlockRun, results: dict[str, Quantized]) -> dict[str, Quantized]:
    """Quantize planned layers outside the blocks (embedding, output head), which are not part of the walk.

    The two ends of the model are rounded to nearest, whatever the quantizer: no statistics say which of their rows matter.
    """
    for site in block_sites(Block("", run.structure.after), run.plan):
        scheme = run.plan[site.name]
        weight = _weight_to_store(run.model, site, scheme).to(run.compute.device)
        ends = site.name in run.structure.ends
        method = RTN("mse" if scheme.weight.bits < 8 else "absmax") if ends else run.method
        one = quantize_site(method, site.name, weight, scheme.weight, None)
        results[site.name] = replace(one, qtensor=nearest_stored(one.qtensor, run.formats).to("cpu"))
        for note in one.notes:
            log.warning("%s: %s", site.name, note)
        install(run.model, site, results[site.name].qtensor, scheme.activation)
        run.progress(Progress("quantize", len(results), len(run.plan), site.name, one.loss))
    return results
