"""What does not go together, said before any long work."""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from quantkit.errors import CalibrationError, SpecError
from quantkit.hf.experts import enable_experts
from quantkit.nn.block_calls import check_chain
from quantkit.nn.sites import Structure
from quantkit.pipeline.distill import Distill
from quantkit.pipeline.plan import Resolution, check_together
from quantkit.quantizers.autoround import AutoRound
from quantkit.quantizers.base import Quantizer
from quantkit.spec import Plan
from quantkit.transforms.base import Transform
from quantkit.transforms.rotate import Rotate

log = logging.getLogger(__name__)


def refuse_combinations(
    plan: Plan, structure: Structure, method: Quantizer, changes: Sequence[Transform], distill: Distill | None, known: Any
) -> None:
    """Raise SpecError or CalibrationError where things do not go together; arguments as in :func:`quantize`, resolved."""
    learner = "distillation" if distill else "autoround" if isinstance(method, AutoRound) else None
    check_together(plan, structure, learner=learner, rotated=any(isinstance(change, Rotate) for change in changes))
    if changes and known is not None:
        raise CalibrationError(
            f"statistics= are of inputs before {type(changes[0]).__name__}, which changes them; pass data= instead"
        )
    if isinstance(method, AutoRound) and known is not None:
        raise CalibrationError("autoround learns from activations, which statistics= do not hold; pass data= instead")
    turned = next((name for name, scheme in plan.items() if scheme.rotated), None)
    if turned is not None and known is not None and method.needs:
        raise CalibrationError(f"{turned}: statistics= are of inputs that are not rotated; pass data= instead")


def biases_to_correct(
    model: nn.Module, structure: Structure, plan: Plan, method: Quantizer, distill: Distill | None
) -> list[str]:
    """Return the planned linear layers of the blocks that have a bias; refuse what would undo a correction."""
    if distill or isinstance(method, AutoRound):
        raise CalibrationError("bias-correction: codes or scales are learned after it, which would undo it; leave one out")
    sites = [site for site in structure.sites if site.name in plan and len(site.shape) == 2]
    biased = [site.name for site in sites if getattr(model.get_submodule(site.module), "bias", None) is not None]
    if not biased:
        raise CalibrationError("bias-correction: none of the planned layers has a bias; leave it out")
    return biased


def check_model(model: nn.Module, structure: Structure) -> None:
    """Make sure that the model's numbers are sound and that its blocks can be run one by one, before hours are spent."""
    for name, parameter in model.named_parameters():
        if not bool(torch.isfinite(parameter.detach().abs().amax())):
            raise CalibrationError(f"{name}: the weight holds NaN or infinity; repair or reload the model")
    enable_experts(model)
    check_chain(model, structure)


def refuse_gaps(structure: Structure, resolution: Resolution) -> None:
    """With strict=True, every linear layer and expert of the blocks must be in the plan or skipped by a rule."""
    gaps = [name for name, reason in structure.skipped.items() if reason.startswith("experts module")]
    decided = resolution.plan.keys() | resolution.skipped.keys()
    gaps += [site.name for site in structure.sites if site.name not in decided]
    if gaps:
        more = f" (and {len(gaps) - 1} more)" if len(gaps) > 1 else ""
        raise SpecError(f"{gaps[0]}{more} would stay in float; strict=True wants a rule with skip for it")


def report_fallen(names: list[str], strict: bool) -> None:
    """Warn of layers that were rounded to nearest for want of inputs; with ``strict`` that is a CalibrationError."""
    if names:
        log.warning("%d sites fell back to rounding: %s ...", len(names), names[0])
        if strict:
            raise CalibrationError(f"{names[0]} (and {len(names) - 1} more) fell back to rounding; strict=True forbids that")
