r"""Bias correction: take back what rounding does to the average output.

Rounding errors of a layer do not average out where its inputs have a mean:

.. math:: b \leftarrow b + (W - Q)\, E[x]

(Nagel, van Baalen, Blankevoort, Welling 2019, arXiv 1906.04721, section 4.2, with the mean input from calibration text.) A
layer without a bias keeps none: a checkpoint's readers would not look for it. Nothing is rewritten beforehand; the correction
follows every layer's rounding, with the inputs that the quantized layers before it produce.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor, nn

from quantkit.errors import CalibrationError
from quantkit.nn.quantized import Quantized
from quantkit.nn.sites import SiteStatistics, Structure
from quantkit.spec import Plan
from quantkit.transforms.base import STEPS, Correction, Setup


@STEPS.register("bias-correction")
@dataclass(frozen=True)
class BiasCorrection(Correction):
    """Correct the biases of quantized layers."""

    needs: ClassVar[tuple[str, ...]] = ("mean",)

    def check(self, setup: Setup) -> None:
        """Refuse what would undo a correction, and statistics that do not know what quantized layers hand on."""
        if setup.learns_blocks or any(step.stage == "after" for step in setup.steps):
            raise CalibrationError("bias-correction: codes or scales are learned after it, which would undo it; leave one out")
        if setup.given_statistics:
            raise CalibrationError(
                "bias-correction wants the inputs behind quantized layers, which statistics= do not hold; pass data= instead"
            )

    def layers(self, model: nn.Module, structure: Structure, plan: Plan) -> list[str]:
        """Return the planned linear layers of the blocks that have a bias."""
        sites = [site for site in structure.sites if site.name in plan and len(site.shape) == 2 and not site.read]
        biased = [site.name for site in sites if getattr(model.get_submodule(site.module), "bias", None) is not None]
        if not biased:
            raise CalibrationError("bias-correction: none of the planned layers has a bias; leave it out")
        return biased

    def correct(self, module: nn.Module, weight: Tensor, quantized: Quantized, statistics: SiteStatistics | None) -> Quantized:
        """Return the result with the bias that keeps the average output; a note says where E[x] is unknown."""
        if statistics is None:
            return replace(quantized, notes=(*quantized.notes, "no calibration input: the bias is not corrected"))
        mean = statistics.results["mean"].to(weight.device)
        lost = (weight.double() - quantized.qtensor.dequantize().to(weight.device).double()) @ mean
        bias = module.get_parameter("bias")
        return replace(quantized, bias=(bias.detach().double() + lost.to(bias.device)).to(bias.dtype).cpu())
