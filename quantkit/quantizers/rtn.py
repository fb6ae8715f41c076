"""Round to nearest: every weight goes to the closest code of its block's grid.

``clip`` says how the grid is chosen: ``absmax`` covers the whole range; ``mse`` searches the range with the least squared
weight error; ``importance`` weighs that error by the second moment of the inputs and so needs calibration.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from quantkit.kernels.functions import rounding
from quantkit.nn.sites import SiteStatistics
from quantkit.numerics import grid
from quantkit.qtensor import GridTensor
from quantkit.quantizers.base import QUANTIZERS, Quantizer
from quantkit.spec import QuantSpec


@QUANTIZERS.register("rtn")
@dataclass(frozen=True)
class RTN(Quantizer):
    """Round to nearest; needs no calibration.

    Args:
        clip: ``"absmax"`` (the whole range, and the only one for dtypes that are not integers) or ``"mse"`` (search for the
            range with the least squared error).
    """

    clip: Literal["absmax", "mse"] = "absmax"
    any_grid: ClassVar[bool] = True

    def quantize(
        self, weight: Tensor, spec: QuantSpec, statistics: SiteStatistics | None
    ) -> tuple[GridTensor, tuple[str, ...]]:
        """Quantize ``weight`` (out, in); ``statistics`` are not used."""
        absmax = self.clip == "absmax" or not spec.is_integer
        qparams = grid.choose_qparams(weight, spec) if absmax else rounding.search_qparams(weight, spec)
        return nearest(weight, qparams, spec), ()


@QUANTIZERS.register("rtn-importance")
@dataclass(frozen=True)
class ImportanceRTN(Quantizer):
    """Round to nearest on the grid that loses least when inputs are weighted by their second moment E[x^2]."""

    needs: ClassVar[tuple[str, ...]] = ("mean_square",)

    def quantize(
        self, weight: Tensor, spec: QuantSpec, statistics: SiteStatistics | None
    ) -> tuple[GridTensor, tuple[str, ...]]:
        """Quantize ``weight`` (out, in) with importances ``statistics.results["mean_square"]`` (in,)."""
        importance = statistics.results["mean_square"] if statistics else None
        return nearest(weight, rounding.search_qparams(weight, spec, importance), spec), ()


def nearest(weight: Tensor, qparams: tuple[Tensor, Tensor | None], spec: QuantSpec) -> GridTensor:
    """Round ``weight`` to the given grid."""
    return GridTensor.from_codes(grid.quantize(weight, *qparams, spec), *qparams, spec)
