"""What does not go together, said before any long work."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from quantkit.calibrate.chain import block_walk
from quantkit.calibrate.collectors import COLLECTORS
from quantkit.calibrate.data import Calibration
from quantkit.errors import CalibrationError, QuantkitError, SpecError
from quantkit.hf.experts import enable_experts
from quantkit.nn.block_calls import CANNOT_RUN, why_entangled
from quantkit.nn.embedding import input_table
from quantkit.nn.quantized import LARGE_ERROR, Quantized
from quantkit.nn.sites import Site, SiteStatistics, Structure
from quantkit.numerics import grid
from quantkit.pipeline.blocks import needs_of
from quantkit.pipeline.fused import refuse_parted
from quantkit.pipeline.plan import Resolution, check_plan
from quantkit.pipeline.settings import Output, Run
from quantkit.quantizers.base import Quantizer, quantizer_name
from quantkit.spec import Plan
from quantkit.system.compute import Compute
from quantkit.system.memory import PageRelease
from quantkit.transforms.base import Setup, Step, step_name

log = logging.getLogger(__name__)


def refuse_run(
    structure: Structure,
    resolution: Resolution,
    method: Quantizer,
    steps: Sequence[Step],
    *,
    output: Output,
    strict: bool = False,
    answers_only: bool = False,
    statistics: Mapping[str, SiteStatistics] | None = None,
) -> None:
    """Raise what is wrong with a run as far as can be seen without working: plan, format, coverage, method and steps.

    Raises:
        QuantkitError: the first thing that is wrong.
    """
    plan, written = resolution.plan, output.path is not None
    check_plan(plan, structure, output.format if written else None)
    if written and output.keeps_together:
        refuse_parted(structure, plan, resolution.skipped)
    if strict:
        refuse_gaps(structure, resolution)
        refuse_unseen(structure, plan, method, statistics)
    refuse_combinations(plan, structure, method, steps, statistics)
    if answers_only:
        refuse_uncounted(plan, method, steps)


def refuse_combinations(
    plan: Plan,
    structure: Structure,
    method: Quantizer,
    steps: Sequence[Step],
    statistics: Mapping[str, SiteStatistics] | None,
) -> None:
    """Ask the quantizer and every step what they do not go together with.

    Args:
        plan: layer name to scheme.
        structure: the model's blocks and layers.
        method: the quantizer.
        steps: in order.
        statistics: what was given to quantize without text, or None.

    Raises:
        SpecError: a scheme that the quantizer or a step cannot work with.
        CalibrationError: steps and quantizer that undo each other; statistics that do not fit the run.
    """
    blocks = {site.name: site for site in structure.sites if site.name in plan}
    for name, scheme in plan.items():
        reasons = [step.rejects(scheme) for step in steps if name in blocks]
        reasons += [method.rejects(scheme)] if name not in structure.ends else []
        if reason := next(filter(None, reasons), None):
            raise SpecError(f"{name}: {reason}")
    setup = Setup(plan, structure, tuple(steps), method.refines_blocks, statistics is not None)
    for step in steps:
        step.check(setup)
    _refuse_shared(structure, steps)
    if statistics is not None:
        _check_statistics(plan, blocks, method, statistics)


def check_settings(calibration: Any = None, output: Any = None, run: Any = None) -> None:
    """Refuse settings that are of another class; None stands for one that is not asked about.

    Raises:
        SpecError: a path or a text in place of :class:`Calibration`, and so on.
    """
    for name, value, kind in (("calibration", calibration, Calibration), ("output", output, Output), ("run", run, Run)):
        if value is not None and not isinstance(value, kind):
            raise SpecError(f"{name}={value!r}: want a quantkit.{kind.__name__}, such as quantkit.{kind.__name__}(...)")


def _refuse_shared(structure: Structure, steps: Sequence[Step]) -> None:
    """Refuse rewriting weights that several blocks share: it fits one of them and not the others."""
    inside = sorted(name for name in structure.shared for block in structure.blocks if name.startswith(f"{block.name}."))
    if inside and (step := next((one for one in steps if one.stage == "before"), None)) is not None:
        raise SpecError(
            f"{inside[0]} is {structure.skipped[inside[0]]}: {step_name(step)} would rewrite it for one block and spoil it for "
            "the other; leave this step out"
        )


def refuse_uncounted(plan: Plan, method: Quantizer, steps: Sequence[Step]) -> None:
    """Refuse what sees every token of the calibration text, where only the answers shall count.

    Raises:
        CalibrationError: a step or quantizer that learns, or a static input scale.
    """
    learners = [step_name(step) for step in steps if step.stage == "after"]
    learners += [quantizer_name(method)] if method.refines_blocks else []
    if learners:
        raise CalibrationError(f"answers_only=True: {learners[0]} learns from every token; leave one of the two out")
    if static := next((name for name, scheme in plan.items() if scheme.static), None):
        raise CalibrationError(f"answers_only=True: the static input scale of {static} must see every token; use dynamic ones")


def _check_statistics(
    plan: Plan, sites: Mapping[str, Site], method: Quantizer, statistics: Mapping[str, SiteStatistics]
) -> None:
    """Make sure that given statistics are what the quantizer needs, of the very layers that are planned."""
    name = quantizer_name(method)
    if method.refines_blocks:
        raise CalibrationError(f"{name} learns from activations, which statistics= do not hold; pass data= instead")
    if paired := [need for need in method.needs if COLLECTORS.get(need).paired]:
        raise CalibrationError(
            f"{name} needs {paired[0]}, which compares quantized layers with the float model while quantizing and which "
            "statistics= cannot hold; pass data= instead"
        )
    for site in sites.values():
        scheme = plan[site.name]
        needs = needs_of(method, scheme)
        if scheme.rotated and needs:
            raise CalibrationError(f"{site.name}: statistics= are of inputs that are not rotated; pass data= instead")
        if reason := _misfit(site, method, needs, statistics):
            raise CalibrationError(f"{site.name}: {reason}; collect them from this model, or pass data= instead")


def _misfit(site: Site, method: Quantizer, needs: Sequence[str], statistics: Mapping[str, SiteStatistics]) -> str | None:
    """Say what is wrong with the statistics of one layer; None if they hold what is needed."""
    if not needs:
        return None
    if site.name not in statistics:
        few = ", ".join(list(statistics)[:2]) or "none"
        return f"statistics= say nothing about this layer; they are of {len(statistics)} layers ({few} ...)"
    found = statistics[site.name]
    experts = site.shape[0] if len(site.shape) == 3 else 1
    if len(found.tokens) != experts:
        return f"statistics= are of {len(found.tokens)} experts, the layer has {experts}"
    for need in needs:
        if need not in found.results:
            held = ", ".join(found.results) or "nothing"
            who = quantizer_name(method) if need in method.needs else "its static input scale"
            return f"statistics= hold {held}, not {need}, which {who} needs"
        shape = tuple(found.results[need].shape)
        lead = (experts,) if len(site.shape) == 3 else ()
        if shape[: len(lead)] != lead or shape[-1] != site.in_features:
            want = ", ".join(map(str, (*lead, "...", site.in_features)))
            return f"statistics= hold {need} of shape {shape}, want ({want})"
    return None


def refuse_absent(model: nn.Module, *, empty: bool = False) -> None:
    """Refuse a model whose weights are not in memory, such as one that was offloaded to a disk.

    Args:
        model: the model.
        empty: whether one without any weights will do.
    """
    absent = [parameter.is_meta for parameter in model.parameters()]
    if any(absent) and not (empty and all(absent)):
        name = next(name for name, parameter in model.named_parameters() if parameter.is_meta)
        raise QuantkitError(
            f"{name} is on the meta device and holds no numbers: the model is empty or offloaded; load it into memory (without "
            "device_map), or give its directory in its place"
        )


def check_model(model: nn.Module) -> None:
    """Make sure that the model's numbers are sound, before hours are spent."""
    refuse_absent(model)
    pages = PageRelease()
    for name, parameter in model.named_parameters():
        if parameter.numel() and not bool(torch.isfinite(grid.largest_magnitude(parameter.detach()))):
            raise CalibrationError(f"{name}: the weight holds NaN or infinity; repair or reload the model")
        pages.add(parameter)
    pages.flush()
    enable_experts(model)


def prepare_blocks(model: nn.Module, structure: Structure, compute: Compute) -> tuple[Structure, Compute]:
    """Find out how the model's blocks can run: one by one with ``compute``, or only all together.

    Returns:
        The structure, which says so if blocks are entangled, and what blocks can be computed with: a whole model runs where it
        is, in its own dtype; and products are not rounded where a block cannot do with what they return.
    """
    name = type(model).__name__
    reason = why_entangled(model, structure)
    if reason is None and (failed := _failure(model, structure, compute)) is not None:
        exact = replace(compute, products=None)
        reason = failed if exact == compute else _failure(model, structure, exact)
        if reason is None:
            log.warning("%s: products are not rounded to %s, which is slower: %s", name, compute.products, failed)
            compute = exact
    if reason is None:
        return structure, compute
    log.warning("%s cannot be run block by block; the whole model stays in memory and runs where it is: %s", name, reason)
    weight = next(model.parameters())
    return replace(structure, entangled=reason), Compute(weight.device, weight.dtype)


def _failure(model: nn.Module, structure: Structure, compute: Compute) -> str | None:
    """Say why blocks cannot run one by one with these dtypes, on a few tokens; None if they can."""
    chain = block_walk(model, structure, [torch.arange(8).unsqueeze(0).to(input_table(model)[1])], compute)
    for index, block in enumerate(structure.blocks):
        try:
            with torch.no_grad(), chain.placed(index):
                chain.advance(index, (), lambda site, gather: None)
        except (QuantkitError, *CANNOT_RUN) as error:
            return f"{block.name}: {error}"
    return None


def refuse_gaps(structure: Structure, resolution: Resolution) -> None:
    """With strict=True, every linear layer and expert must be in the plan or skipped by a rule.

    Also every matrix that the model's class does not know, and which is carried over in float.
    """
    decided = resolution.plan.keys() | resolution.skipped.keys()
    gaps = [site.name for site in structure.sites if site.name not in decided]
    reasons = {name: structure.skipped[name] for name in sorted(structure.unreachable) if name not in decided}
    reasons |= {name: "the model's class does not know it" for name in sorted(structure.carried) if name not in decided}
    if gaps or reasons:
        first = next(iter([*(f"{name} ({reason})" for name, reason in reasons.items()), *gaps]))
        more = f" and {len(gaps) + len(reasons) - 1} more" if len(gaps) + len(reasons) > 1 else ""
        raise SpecError(f"{first}{more} would stay in float; strict=True wants a rule with skip for it")


def refuse_unseen(structure: Structure, plan: Plan, method: Quantizer, statistics: Mapping[str, SiteStatistics] | None) -> None:
    """With strict=True, no layer may fall back to plain rounding: not those whose inputs cannot be seen, either."""
    for site in structure.sites:
        wanted = site.read and site.name in plan and needs_of(method, plan[site.name])
        if wanted and site.name not in (statistics or {}):
            raise SpecError(
                f"{site.name}: its module reads it as a tensor: nobody sees its inputs, and {quantizer_name(method)} falls "
                "back to plain rounding; strict=True forbids that, use method rtn or a rule with skip"
            )


def report_fallen(names: list[str]) -> None:
    """Warn of layers that were rounded to nearest for want of inputs."""
    if names:
        log.warning("%d layers fell back to plain rounding: %s ...", len(names), names[0])


def report_lossy(results: Mapping[str, Quantized]) -> None:
    """Warn of layers whose output is hardly that of the float layer."""
    lossy = {name: one for name, one in results.items() if one.warnings}
    if lossy:
        worst = sorted(lossy, key=lambda name: -lossy[name].loss)
        shown = ", ".join(f"{name} ({lossy[name].loss ** 0.5:.2f})" for name in worst[:5])
        more = f" and {len(lossy) - 5} more" if len(lossy) > 5 else ""
        log.warning(
            "%d layers have a relative error above %g: %s%s; give them more bits, or leave them in float by a rule",
            len(lossy),
            LARGE_ERROR,
            shown,
            more,
        )
