"""What a quantizer is, and the one place that runs it on a site."""

import dataclasses
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from quantkit.errors import CalibrationError, SpecError
from quantkit.numerics import grid
from quantkit.qtensor import QTensor, stack
from quantkit.registry import Registry
from quantkit.spec import QuantSpec


class Statistics(Protocol):
    """What calibration knows about the input of one site."""

    results: dict[str, Tensor]
    tokens: tuple[int, ...]
    cache: dict[str, Tensor]

    def expert(self, index: int) -> "Statistics":
        """Return the statistics of one expert of a 3-D site."""


class Quantizer(Protocol):
    """Turns one float weight into codes on a given grid.

    A member is a frozen dataclass whose fields are its options. ``needs`` names the collectors it wants; empty means that
    it works without calibration.
    """

    needs: ClassVar[tuple[str, ...]]

    def quantize(self, weight: Tensor, spec: QuantSpec, statistics: Statistics | None) -> tuple[QTensor, tuple[str, ...]]:
        """Quantize a finite float32 ``weight`` (out, in).

        Args:
            weight: not modified.
            spec: the grid; divides the weight.
            statistics: results of :attr:`needs`, or None if the site was never reached in calibration.

        Returns:
            The quantized weight and notes on anything unusual (extra damping, a fallback), empty when all went well.
        """


QUANTIZERS: Registry[type[Quantizer]] = Registry("quantizer", package="quantkit.quantizers", error=SpecError)


@dataclass(frozen=True, slots=True)
class Quantized:
    """A quantized site.

    Attributes:
        qtensor: the codes.
        loss: relative squared error of the site's output over the calibration inputs, ||(W - Q) x||^2 / ||W x||^2, or of the
            weight itself where no statistics exist; of its block's output where the block was learned as a whole.
        notes: what was unusual.
        fell_back: the quantizer wanted statistics and there were none.
        bias: (out,), the site's bias corrected for the rounding of the weight; None leaves it alone.
    """

    qtensor: QTensor
    loss: float
    notes: tuple[str, ...] = ()
    fell_back: bool = False
    bias: Tensor | None = None


def quantize_site(
    quantizer: Quantizer,
    name: str,
    weight: Tensor,
    spec: QuantSpec,
    statistics: Statistics | None,
    global_scale: Tensor | None = None,
) -> Quantized:
    """Quantize the weight (out, in) or (experts, out, in) of the site called ``name``.

    Experts are quantized one by one, each with its own statistics; one that saw no token in calibration falls back.

    Args:
        quantizer: how codes are chosen. On a grid with a global scale it sees the weight multiplied by that.
        name: for messages.
        weight: floating, not modified.
        spec: the grid.
        statistics: what the quantizer needs, or None.
        global_scale: (1,) that a grid with one shall have, because other sites have it too; None takes the weight's own.

    Raises:
        SpecError: if the grid does not divide the weight.
        CalibrationError: if the weight holds NaN or infinity.
    """
    if reason := spec.rejects(tuple(weight.shape)):
        raise SpecError(f"{name}: {reason}")
    if not spec.is_integer and not getattr(quantizer, "any_grid", False):
        raise SpecError(f"{name}: {type(quantizer).__name__} chooses integers, not {spec.dtype}; use quantizer rtn")
    if not bool(torch.isfinite(weight).all()):
        raise CalibrationError(f"{name}: the weight holds NaN or infinity; repair or reload the model")
    if weight.dim() == 2:
        return _quantize_matrix(quantizer, weight, spec, statistics, global_scale)
    parts = [
        _quantize_matrix(quantizer, matrix, spec, statistics.expert(i) if statistics and statistics.tokens[i] else None)
        for i, matrix in enumerate(weight)
    ]
    notes = [f"expert {i}: {note}" for i, part in enumerate(parts) for note in part.notes]
    loss = sum(part.loss for part in parts) / len(parts)
    return Quantized(stack([p.qtensor for p in parts]), loss, tuple(notes), any(p.fell_back for p in parts))


def _quantize_matrix(
    quantizer: Quantizer, weight: Tensor, spec: QuantSpec, statistics: Statistics | None, global_scale: Tensor | None = None
) -> Quantized:
    weight = weight.float()
    if spec.has_global_scale:
        own = global_scale if global_scale is not None else grid.choose_global_scale(weight.abs().amax().view(1), spec)
        qtensor, notes = quantizer.quantize(weight * own.to(weight), spec, statistics)
        qtensor = dataclasses.replace(qtensor, global_scale=own.to(weight))
    else:
        qtensor, notes = quantizer.quantize(weight, spec, statistics)
    fell_back = bool(quantizer.needs) and statistics is None
    return Quantized(qtensor, relative_error(weight, qtensor.dequantize(), statistics), notes, fell_back)


def relative_error(weight: Tensor, approximation: Tensor, statistics: Statistics | None) -> float:
    """Return ||(W - Q) x||^2 / ||W x||^2 in expectation over the calibration inputs (plain weights without statistics)."""
    error = weight - approximation
    if statistics is not None and "hessian" in statistics.results:
        hessian = statistics.results["hessian"]
        noise, signal = ((e @ hessian) * e for e in (error, weight))
    elif statistics is not None and "mean_square" in statistics.results:
        noise, signal = (e.double().square() * statistics.results["mean_square"] for e in (error, weight))
    else:
        noise, signal = error.square(), weight.square()
    return float(noise.sum(dtype=torch.float64) / signal.sum(dtype=torch.float64).clamp(min=1e-30))
