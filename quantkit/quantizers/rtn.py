"""Round to nearest: every weight goes to the closest code of its block's grid.

``clip`` says how the grid is chosen: ``absmax`` covers the whole range; ``mse`` searches the range with the least squared
weight error; ``importance`` weighs that error by the second moment of the inputs and so needs calibration.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from quantkit.kernels.functions import rounding
from quantkit.nn.sites import SiteStatistics
from quantkit.numerics import ggml, grid
from quantkit.qtensor import BlockTensor, GridTensor, QTensor
from quantkit.quantizers.base import QUANTIZERS, Quantizer
from quantkit.spec import QuantSpec, Scheme


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
    by_rows: ClassVar[bool] = True

    def quantize_at_once(self, weight: Tensor, spec: QuantSpec) -> tuple[QTensor, float, float, int] | None:
        """Round a weight that a kernel rounds in one pass, on the grid of its range."""
        own = type(self).quantize is not RTN.quantize  # who rounds in another way is asked
        done = rounding.round_to_nearest(weight, spec) if self.clip == "absmax" and not own else None
        if done is None:
            return None
        qtensor = GridTensor(done.packed, done.scale, done.zero_point, spec, tuple(weight.shape))
        return qtensor, done.noise, done.signal, done.lost

    def quantize(
        self, weight: Tensor, spec: QuantSpec, statistics: SiteStatistics | None
    ) -> tuple[GridTensor | BlockTensor, tuple[str, ...]]:
        """Quantize ``weight`` (out, in); ``statistics`` are not used."""
        if spec.blocks is not None:
            return rounded(weight, spec), ()
        absmax = self.clip == "absmax" or not spec.is_integer
        qparams = grid.choose_qparams(weight, spec) if absmax else rounding.search_qparams(weight, spec)
        return nearest(weight, qparams, spec), ()


@QUANTIZERS.register("rtn-importance")
@dataclass(frozen=True)
class ImportanceRTN(Quantizer):
    """Round to nearest on the grid that loses least when inputs are weighted by their second moment E[x^2]."""

    needs: ClassVar[tuple[str, ...]] = ("mean_square",)
    divisible: ClassVar[bool] = True

    def rejects(self, scheme: Scheme) -> str | None:
        """Say why layers of a scheme cannot be quantized by this; None if they can."""
        return None if scheme.weight.blocks is not None else super().rejects(scheme)

    def quantize(
        self, weight: Tensor, spec: QuantSpec, statistics: SiteStatistics | None
    ) -> tuple[GridTensor | BlockTensor, tuple[str, ...]]:
        """Quantize ``weight`` (out, in) with importances ``statistics.results["mean_square"]`` (in,)."""
        importance = statistics.results["mean_square"] if statistics else None
        if spec.blocks is not None:
            return rounded(weight, spec, importance), ()
        return nearest(weight, rounding.search_qparams(weight, spec, importance), spec), ()


def nearest(weight: Tensor, qparams: tuple[Tensor, Tensor | None], spec: QuantSpec) -> GridTensor:
    """Round ``weight`` to the given grid."""
    return GridTensor.from_codes(grid.quantize(weight, *qparams, spec), *qparams, spec)


def rounded(weight: Tensor, spec: QuantSpec, importance: Tensor | None = None) -> GridTensor | BlockTensor:
    """Round ``weight`` to nearest: on the grid of its range, in blocks on the one that loses least.

    Blocks have no simple choice to fall back to: what several sub-blocks share is always a search.
    """
    if spec.blocks is None:
        return nearest(weight, grid.choose_qparams(weight, spec), spec)
    return BlockTensor.from_content(rounding.search_blocks(weight, ggml.BLOCK_TYPES[spec.blocks], importance), spec)
