"""Quantize a model one block at a time, each block seeing what the quantized blocks before it produce.

Only the block at work is on the device and in the compute dtype; the rest of the model stays where and what it is. The
activations between blocks (tokens x hidden) are kept in the compute dtype.
"""

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from quantkit.calibrate.chain import Chain
from quantkit.calibrate.walk import Statistics, block_sites
from quantkit.errors import CalibrationError
from quantkit.nn.install import install
from quantkit.nn.sites import Block, Site, SiteStatistics, Structure, read_weight, write_weight
from quantkit.numerics import grid
from quantkit.numerics.hadamard import hadamard_transform
from quantkit.pipeline.resume import ResumeStore
from quantkit.quantizers.autoround import AutoRound, learn_block, relative_distance
from quantkit.quantizers.base import Quantized, Quantizer, quantize_site
from quantkit.quantizers.rtn import RTN
from quantkit.spec import Plan, QuantSpec, Scheme
from quantkit.system.compute import Compute, on_device
from quantkit.system.memory import drop_pages, mapped_pages, return_freed_memory
from quantkit.system.progress import Progress, ProgressCallback
from quantkit.transforms.scaling_groups import shared_global_scales

log = logging.getLogger(__name__)


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
    corrected: Collection[str] = (),
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
        corrected: names of sites whose bias is corrected; see :mod:`quantkit.transforms.bias`.

    Returns:
        The quantized sites by name, in model order.
    """
    finished = store.finished() if store else 0
    if finished:
        log.info("continuing after %d finished blocks", finished)
        if chain is not None and store is not None:
            chain.state = store.load_chain()
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
            with torch.no_grad(), on_device(model.get_submodule(block.name), compute):
                quantized = _quantize_block(
                    model, index, sites, plan, quantizer, chain, known or {}, global_scales, report, corrected
                )
        for site in sites:
            _write_bias(model, site, quantized[site.name])
            install(model, site, quantized[site.name].qtensor, plan[site.name].activation)
        if store is not None and index >= finished:
            store.save(index, quantized, chain.state if chain else [])
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


def _weight_to_store(model: nn.Module, site: Site, scheme: Scheme) -> Tensor:
    """Return a site's float weight as it will be stored: turned, where its inputs will be."""
    weight = read_weight(model, site)
    return hadamard_transform(weight.float()) if scheme.rotated else weight


def _write_stored(model: nn.Module, site: Site, scheme: Scheme, weight: Tensor) -> None:
    """Write a stored weight into the float model, whose inputs are not turned."""
    write_weight(model, site, hadamard_transform(weight, back=True) if scheme.rotated else weight)


def corrected_bias(
    model: nn.Module, site: Site, weight: Tensor, one: Quantized, statistics: SiteStatistics | None
) -> Quantized:
    """Return ``one`` with the bias that keeps the average output: b + (W - Q) E[x]; a note says where E[x] is unknown."""
    if statistics is None or "mean" not in statistics.results:
        return replace(one, notes=(*one.notes, "no calibration input: the bias is not corrected"))
    mean = statistics.results["mean"].to(weight.device)
    lost = (weight.double() - one.qtensor.dequantize().to(weight.device).double()) @ mean
    bias = model.get_submodule(site.module).get_parameter("bias")
    return replace(one, bias=(bias.detach().double() + lost.to(bias.device)).to(bias.dtype).cpu())


def _write_bias(model: nn.Module, site: Site, one: Quantized) -> None:
    if one.bias is not None:
        bias = model.get_submodule(site.module).get_parameter("bias")
        bias.data = one.bias.to(bias.device)


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
    corrected: Collection[str],
) -> dict[str, Quantized]:
    quantized: dict[str, Quantized] = {}

    learns = isinstance(quantizer, AutoRound) and chain is not None and bool(sites)
    inputs = list(chain.hidden) if learns and chain is not None else []
    origin = {site.name: _weight_to_store(model, site, plan[site.name]) for site in sites} if learns else {}

    def choose(site: Site, statistics: SiteStatistics | None) -> None:
        scheme = plan[site.name]
        weight = _weight_to_store(model, site, scheme)
        one = quantize_site(quantizer, site.name, weight, scheme.weight, statistics, global_scales.get(site.name))
        _write_stored(model, site, scheme, one.qtensor.dequantize())  # later sites and blocks see the quantized weight
        qtensor = one.qtensor.to("cpu")
        if scheme.activation is not None and scheme.static:
            qtensor = replace(qtensor, input_scale=static_scale(site, scheme.activation, statistics))
        quantized[site.name] = replace(one, qtensor=qtensor)
        if site.name in corrected:
            quantized[site.name] = corrected_bias(model, site, weight, quantized[site.name], statistics)
            _write_bias(model, site, quantized[site.name])
        report(site.name, one, len(quantized))

    if chain is not None:

        def visit(site: Site, statistics: Statistics) -> None:
            needs = (*needs_of(quantizer, plan[site.name]), *(("mean",) if site.name in corrected else ()))
            choose(site, statistics(needs, plan[site.name].rotated))

        chain.advance(index, sites, visit)
    for site in sites:
        if site.name not in quantized:
            choose(site, known.get(site.name))
    if learns and chain is not None and isinstance(quantizer, AutoRound):
        quantized = _learn(model, index, sites, plan, quantizer, chain, quantized, origin, inputs)
    return {site.name: quantized[site.name] for site in sites}


def _learn(
    model: nn.Module,
    index: int,
    sites: list[Site],
    plan: Plan,
    settings: AutoRound,
    chain: Chain,
    start: dict[str, Quantized],
    origin: Mapping[str, Tensor],
    inputs: Sequence[Tensor],
) -> dict[str, Quantized]:
    """Learn the codes and scales of a block; keep what it started with if that is better. The chain goes on with the result.

    Args:
        model, index, sites, plan, settings, chain: as for :func:`quantize_blocks`; the chain has passed the block.
        start: the quantized sites, which are in the model already.
        origin: site name to float weight.
        inputs: what the chain held before the block.
    """
    before = relative_distance(chain.hidden, chain.float_hidden)
    learned = learn_block(
        model,
        {site: (start[site.name].qtensor, origin[site.name], plan[site.name].activation) for site in sites},
        lambda batch: chain.call(index, batch, inputs[batch]),
        chain.float_hidden,
        settings,
        chain.compute,
    )
    for site, qtensor in learned.items():
        _write_stored(model, site, plan[site.name], qtensor.dequantize())
    with chain.compute.rounding_products():
        outputs = [chain.call(index, batch, x).to("cpu", chain.compute.dtype) for batch, x in enumerate(inputs)]
    after = relative_distance(outputs, chain.float_hidden)
    log.info("%s: output error %.3e before learning, %.3e after", chain.structure.blocks[index].name, before, after)
    if not after < before:
        return start
    chain.hidden = outputs
    return {site.name: replace(start[site.name], qtensor=q.to("cpu"), loss=after) for site, q in learned.items()}


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
        weight = _weight_to_store(model, site, plan[site.name]).to(compute.device)
        method = RTN("mse" if plan[site.name].weight.bits < 8 else "absmax") if site.name in ends else quantizer
        one = quantize_site(method, site.name, weight, plan[site.name].weight, None)
        results[site.name] = Quantized(one.qtensor.to("cpu"), one.loss, one.notes, one.fell_back)
        install(model, site, results[site.name].qtensor, plan[site.name].activation)
        progress(Progress("quantize", len(results), len(plan), site.name, one.loss))
    return results
