"""What can only be known by trying: how long a plan takes, how far it is from the float model, and one layer at a time."""

from collections.abc import Sequence
from typing import Annotated, Any

import torch
from pydantic import Strict
from torch import Tensor, nn

from quantkit.calibrate.data import Calibration
from quantkit.checkpoint.verify import installed
from quantkit.errors import SpecError
from quantkit.evaluation import evaluate
from quantkit.evaluation.latency import measure_latency
from quantkit.evaluation.quality import score
from quantkit.evaluation.reference import BaseLogits
from quantkit.evaluation.windows import Windows
from quantkit.mixed.groups import Menu
from quantkit.mixed.shares import shares
from quantkit.nn.install import install
from quantkit.nn.sites import Site, SiteStatistics, Structure, read_weight, sharing_copy, write_weight
from quantkit.numerics.inputs import InputQuantizer
from quantkit.pipeline.quantize import quantize
from quantkit.quantizers.base import Quantizer, quantize_site
from quantkit.quantizers.rtn import RTN
from quantkit.spec import Plan, Scheme
from quantkit.system.progress import Progress, ProgressCallback
from quantkit.system.settings import Positive, settings


@settings(SpecError)
class Decoding:
    """Under which conditions a token is timed: one sequence, after ``context`` tokens.

    Args:
        context: tokens before it.
        new_tokens: tokens that are timed in a round.
        rounds: how often; the median counts.
        engine: as for :func:`quantkit.compare_latency`.
    """

    context: Positive = 256
    new_tokens: Positive = 16
    rounds: Positive = 5
    engine: Annotated[str, Strict()] = "auto"


def rounded_copy(model: nn.Module, structure: Structure, plan: Plan) -> nn.Module:
    """Return a copy of a model whose planned layers are rounded to nearest: as large and as fast as any with that plan."""
    copy = sharing_copy(model)
    for site in (*structure.sites, *structure.after):
        if (scheme := plan.get(site.name)) is None:
            continue
        weight = InputQuantizer(scheme.activation).prepare_weight(read_weight(model, site))
        one = quantize_site(RTN(), site.name, weight, scheme.weight, None).qtensor
        if scheme.static:
            one = one.with_parts({"input_scale": torch.ones(*site.shape[:-2], 1)})
        install(copy, site, one, scheme.activation)
    return copy


def milliseconds(model: nn.Module, structure: Structure, plan: Plan, decoding: Decoding) -> float:
    """Return the median time of one decoded token under a plan; an empty one is the float model."""
    copy = rounded_copy(model, structure, plan) if plan else model
    found = measure_latency(
        copy,
        context=decoding.context,
        new_tokens=decoding.new_tokens,
        rounds=decoding.rounds,
        engine=decoding.engine,
    )
    return found.decode_ms.median


def choice_times(model: nn.Module, menu: Menu, decoding: Decoding, progress: ProgressCallback) -> tuple[tuple[int, ...], ...]:
    """Return for every group the time of its candidates for one token, in nanoseconds.

    The whole model is timed with every choice wherever it can be had, and a group's time is its share of the weights: decoding
    reads every weight once. The sum over groups is then the time of the model, with everything that is not searched in it.
    """
    names = list(dict.fromkeys(one.choice for group in menu.groups for one in group.candidates))
    times: dict[str, float] = {}
    for index, name in enumerate(names):
        plan: dict[str, Scheme] = {}
        for group in menu.groups:
            own = next((one for one in group.candidates if one.choice == name), group.candidates[-1])
            plan |= own.schemes
        times[name] = milliseconds(model, menu.structure, plan, decoding)
        progress(Progress("search", index + 1, len(names), f"timing {name}"))
    return tuple(
        tuple(round(1e6 * times[one.choice] * group.numel / menu.numel) for one in group.candidates) for group in menu.groups
    )


def divergence(
    model: nn.Module, plan: Plan, method: Quantizer, calibration: Calibration, tokenizer: Any, progress: ProgressCallback
) -> float:
    """Return the mean KL of the model quantized by a plan, with the real quantizer, on text that it was not calibrated on."""
    result = quantize(sharing_copy(model), plan, method=method, calibration=calibration, tokenizer=tokenizer)
    report = evaluate(result.model, model, tokenizer=tokenizer, windows=8, length=512, latency=False, progress=progress)
    assert report.quality.divergence is not None
    return report.quality.divergence.mean


def plan_shares(
    model: nn.Module,
    structure: Structure,
    quantized: nn.Module,
    windows: Sequence[Tensor],
    progress: ProgressCallback,
) -> tuple[dict[str, float], float]:
    """Return layer name to its share of the KL of a quantized model, and the KL; see :mod:`quantkit.mixed.shares`.

    The quantized weights of all layers are there in float meanwhile. Embeddings and heads have no share.
    """
    changed, changes = sharing_copy(model), dict[Site, Tensor]()
    weights = installed(quantized)
    for site in (*structure.sites, *structure.after):
        if (one := weights.get(site.name)) is None:
            continue
        weight = one.dequantize()
        if site in structure.sites:
            changes[site] = weight - read_weight(model, site).to(weight)
        write_weight(changed, site, weight)
    return shares(model, changed, changes, windows, progress)


def one_at_a_time(
    model: nn.Module,
    menu: Menu,
    method: Quantizer,
    statistics: dict[str, SiteStatistics],
    windows: Sequence[Tensor],
    progress: ProgressCallback,
) -> tuple[tuple[float, ...], ...]:
    """Return for every group the measured KL of its candidates with all other layers in float.

    The reference that :mod:`quantkit.mixed.scores` is compared with: one pass over the text for every candidate.
    """
    ids = torch.cat([one for one in windows if one.shape == windows[0].shape])
    scored = torch.ones_like(ids, dtype=torch.bool)
    scored[:, 0] = False
    text, base, found = Windows(ids, scored), BaseLogits(model), []
    model = sharing_copy(model)  # the caller's stays what it is, also when this is interrupted
    for number, group in enumerate(menu.groups):
        own = {site.name: read_weight(model, site).clone() for site in group.sites}
        losses = []
        for candidate in group.candidates:
            for site in group.sites:
                if (scheme := candidate.schemes.get(site.name)) is None:
                    continue
                inputs = InputQuantizer(scheme.activation)
                weight = inputs.prepare_weight(own[site.name])
                one = quantize_site(method, site.name, weight, scheme.weight, statistics.get(site.name)).qtensor
                write_weight(model, site, inputs.restore_weight(one.dequantize()))
            quality = score(model, text, base).divergence if candidate.schemes else None
            losses.append(quality.mean if quality is not None else 0.0)
        for site in group.sites:
            write_weight(model, site, own[site.name])
        found.append(tuple(losses))
        progress(Progress("search", number + 1, len(menu.groups), f"measuring {group.name}"))
    return tuple(found)
