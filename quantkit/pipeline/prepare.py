"""prepare() and convert(): a model that any training loop can train behind its rounding, and the quantized model it becomes.

    quantkit.prepare(model, "w4a16-asym-g64")
    ...                                     # your own loop, transformers' Trainer, accelerate
    quantkit.convert(model)
    quantkit.save(model, "out")

In between the model is an ordinary module: its parameters are the float weights and their scales
(:mod:`quantkit.nn.fake`). A start from a quantized model (``start=``) is far closer than rounding to nearest: before the first
step the prepared model computes what that one does.
"""

import copy
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from quantkit import checkpoint
from quantkit.checkpoint.verify import installed, installed_plan
from quantkit.errors import SpecError
from quantkit.formats.base import nearest_stored
from quantkit.hf.experts import enable_experts
from quantkit.hf.load import PreTrainedModel, adopt
from quantkit.hf.structure import describe
from quantkit.nn import fake
from quantkit.nn.fake import Learned
from quantkit.nn.install import install
from quantkit.nn.linear import QuantModule
from quantkit.nn.sites import Site, Structure, read_weight
from quantkit.numerics.inputs import InputQuantizer
from quantkit.pipeline.checks import check_model
from quantkit.pipeline.plan import Resolution, check_plan, resolve, scale_dtype_for
from quantkit.pipeline.result import QuantizeResult
from quantkit.pipeline.rules import Rule, SchemeChoice
from quantkit.qtensor import QTensor
from quantkit.quantizers.base import quantize_site
from quantkit.quantizers.rtn import RTN
from quantkit.spec import Plan, Scheme
from quantkit.transforms.scaling_groups import shared_global_scales

Start = QuantizeResult | nn.Module | str | Path
"""What training can begin with: a result, a quantized model, or the directory of a checkpoint."""


def prepare(
    model: nn.Module,
    scheme: str | Scheme | SchemeChoice | Plan | Resolution | None = None,
    *,
    start: Start | None = None,
    rules: Sequence[Rule] = (),
    share: float = 1.0,
    learn_zero: bool = False,
    adapters: int = 0,
    kv: str | None = None,
    format: str | None = None,
) -> nn.Module:
    """Put trainable stand-ins where the layers of a float model are, in place; :func:`convert` makes quantized layers of them.

    Args:
        model: a float model; or one that is quantized already, whose codes are the start.
        scheme: as for :func:`quantkit.quantize`; None is the plan of ``start``.
        start: a quantized model of the same architecture: a result, a model, or the directory of a checkpoint. Its codes and
            scales are where training begins. If what is not quantized in it differs from the float model's (a step rewrote it),
            ``model`` becomes a copy of it, and weights begin with the codes' own values. None rounds to nearest.
        rules: as for :func:`quantkit.quantize`, beside a scheme that is no plan.
        share: how far weights go, inside the cells of their codes, from the codes' own values to the float weight: 0 to 1.
        learn_zero: learn zero points, too.
        adapters: rank of low-rank changes that are learned in place of weights, and folded in by :func:`convert`; 0 learns
            weights.
        kv: None, or ``"float"``; keys and values cannot be trained behind rounding.
        format: what the model will be saved in, where that wants scales of a dtype of its own (``"modelopt"``).

    Returns:
        ``model``. Every parameter that required a gradient still does, and so do the weights and scales of the stand-ins.

    Raises:
        SpecError: before anything is changed: a layer that cannot have its scheme, one whose module reads its weight in its own
            way, a static grid for inputs without a start, a start that does not fit, or a key/value scheme.
    """
    refuse_kv(kv)
    if not 0 <= share <= 1:
        raise SpecError(f"share={share}: want 0 (the codes' own values) to 1 (as close to the float weight as their cells go)")
    how = Learned(share, learn_zero, adapters)
    if adapters < 0:
        raise SpecError(f"adapters={adapters}: want a rank, or 0 for none")
    if any(isinstance(part, QuantModule) for part in model.modules()):
        if scheme is not None or start is not None:
            raise SpecError("the model is quantized already, and is its own start; leave scheme and start out")
        enable_experts(model)
        fake.trainable(model, {}, how)
        return model
    model = adopt(cast(PreTrainedModel, model))
    structure = describe(model)
    begin = None if start is None else started(start)
    plan = planned(model, structure, scheme, begin, rules, format)
    check_training(structure, plan, begin is not None, adapters)
    check_model(model)
    sites = {site.name: site for site in (*structure.sites, *structure.after) if site.name in plan}
    if begin is not None and not _same_rest(model, begin, sites):
        model.__dict__ = (begin if isinstance(start, str | Path) else copy.deepcopy(begin)).__dict__
        fake.trainable(model, {}, how)
        return model
    formats = [format] if format else []
    qtensors = _nearest(model, structure, plan, formats) if begin is None else installed(begin)
    origins: dict[str, Tensor] = {}
    for name, site in sites.items():
        activation = plan[name].activation
        origins[name] = InputQuantizer(activation).prepare_weight(read_weight(model, site))
        install(model, site, qtensors[name], activation)
    fake.trainable(model, origins, how)
    return model


def convert(model: nn.Module) -> nn.Module:
    """Put quantized layers where the trainable stand-ins of a prepared model are, in place, and return it.

    The model computes what the prepared one did, but for the rounding of sums. Every parameter that is not quantized is as
    training left it.

    Raises:
        SpecError: a weight holds NaN or infinity, the parameters are spread over processes, or the model is not prepared.
    """
    fake.quantized(model)
    return model.eval()


def refuse_kv(kv: object) -> None:
    """Refuse to train keys and values behind rounding."""
    if kv not in (None, "float"):
        raise SpecError(
            f"kv={kv!r}: keys and values are not trained behind rounding; train weights, and give kv= to what runs the model"
        )


def started(start: Start) -> PreTrainedModel:
    """Return the quantized model that training begins with.

    Raises:
        SpecError: it is no quantized model.
    """
    given = start.model if isinstance(start, QuantizeResult) else start
    model = given if isinstance(given, nn.Module) else checkpoint.load(given, compute="exact", cache=False)
    if not any(isinstance(part, QuantModule) for part in model.modules()):
        raise SpecError(
            f"start={type(start).__name__}: it has no quantized layer; give a result, a quantized model or a checkpoint"
        )
    return cast(PreTrainedModel, model)


def planned(
    model: PreTrainedModel,
    structure: Structure,
    scheme: str | Scheme | SchemeChoice | Plan | Resolution | None,
    begin: PreTrainedModel | None,
    rules: Sequence[Rule] = (),
    format: str | None = None,
) -> dict[str, Scheme]:
    """Return layer name to scheme: what a user asks for, which is also what the start has.

    Raises:
        SpecError: the two differ, or neither is given.
    """
    scales = scale_dtype_for(model.dtype, *([format] if format else []))
    if begin is None:
        if scheme is None:
            raise SpecError("scheme=None without start=: say which scheme is trained, such as 'w4a16-asym-g64'")
        return resolve(structure, scheme, rules, scales).plan
    own = dict(installed_plan(begin))
    if scheme is None and not rules:
        return own
    asked = resolve(structure, "w4a16" if scheme is None else scheme, rules, scales).plan
    if odd := next((name for name in {**own, **asked} if own.get(name) != asked.get(name)), None):
        names = [one.describe() if (one := plan.get(odd)) else "float" for plan in (own, asked)]
        raise SpecError(f"{odd}: the start has {names[0]}, the scheme says {names[1]}; give one of them, or make them agree")
    return own


_ALIKE = {"Q4_0": "w4a16-g32", "Q5_0": "w5a16-g32", "Q8_0": "w8a16-g32"}
"""The schemes whose numbers are those of blocks with one scale each."""


def check_training(structure: Structure, plan: Plan, has_start: bool, adapters: int = 0) -> None:
    """Refuse layers that cannot be trained, by name.

    Raises:
        SpecError: see :func:`prepare`.
    """
    check_plan(plan, structure, None)
    for site in (*structure.sites, *structure.after):
        if site.name not in plan:
            continue
        if (blocks := plan[site.name].weight.blocks) is not None:
            raise SpecError(
                f"{site.name}: {blocks}: scales of a GGUF file's blocks are not trained; train {_ALIKE.get(blocks, 'w4a16')} "
                "and write that as GGUF with quantkit convert"
            )
        if adapters >= min(site.shape[-2:]):
            raise SpecError(
                f"{site.name}: adapters of rank {adapters} for a weight {site.shape} are no fewer numbers than it; use a rank "
                f"below {min(site.shape[-2:])}, or adapters=0"
            )
        if site.read:
            raise SpecError(
                f"{site.name}: its module multiplies by it in its own way, so it cannot be trained behind rounding; leave it "
                "in float by a rule"
            )
        if plan[site.name].static and not has_start:
            raise SpecError(
                f"{site.name}: the static scale of its inputs is found in calibration; quantize first and give the result as "
                "start=, or use a scheme with dynamic activations"
            )


def _nearest(model: PreTrainedModel, structure: Structure, plan: Plan, formats: Sequence[str]) -> dict[str, QTensor]:
    """Return every planned layer rounded to nearest."""
    scales = shared_global_scales(model, structure, plan)
    found = {}
    for site in (*structure.sites, *structure.after):
        if site.name in plan:
            scheme = plan[site.name]
            weight = InputQuantizer(scheme.activation).prepare_weight(read_weight(model, site))
            method = RTN("mse" if scheme.weight.is_integer and scheme.weight.bits < 8 else "absmax")
            one = quantize_site(method, site.name, weight, scheme.weight, None, scales.get(site.name)).qtensor
            found[site.name] = nearest_stored(one, formats)
    return found


def _same_rest(model: PreTrainedModel, begin: PreTrainedModel, sites: Mapping[str, Site]) -> bool:
    """Say whether a start has in float what the model has, apart from the weights of ``sites``.

    Raises:
        SpecError: the start is of another model.
    """
    qtensors = installed(begin)
    for name, site in sites.items():
        if name not in qtensors or tuple(qtensors[name].shape) != site.shape:
            raise SpecError(f"start: {name} has no quantized weight {site.shape} in it; give one of the same model")
    weights = {f"{site.module}.{site.parameter}" for site in sites.values()}
    weights |= {name for name, p in model.named_parameters(remove_duplicate=False) if id(p) in _owned(model, weights)}
    own: dict[str, Tensor] = dict(begin.named_parameters(remove_duplicate=False))
    rest = {name: p for name, p in model.named_parameters(remove_duplicate=False) if name not in weights}
    if odd := next((name for name, p in rest.items() if name in own and own[name].shape != p.shape), None):
        raise SpecError(f"start: {odd} has shape {tuple(own[odd].shape)}, the model's {tuple(rest[odd].shape)}")
    return all(name in own and torch.equal(own[name].to(p.device, p.dtype), p) for name, p in rest.items())


def _owned(model: nn.Module, names: Collection[str]) -> set[int]:
    """Return the identities of parameters, which others may be tied to."""
    return {id(p) for name, p in model.named_parameters(remove_duplicate=False) if name in names}
