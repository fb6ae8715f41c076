r"""GPTQ: round column by column and let the columns still to come make up for the error.

With :math:`H = E[x x^T]` and :math:`U` the upper Cholesky factor of :math:`(H + \lambda I)^{-1}`, after rounding column
:math:`k` to :math:`q_k` every later column :math:`j` becomes

.. math:: w_j \leftarrow w_j - \frac{w_k - q_k}{U_{kk}} U_{kj}

(Frantar, Ashkboos, Hoefler, Alistarh 2022, arXiv 2210.17323, algorithm 1). :meth:`GPTQ.quantize` is the whole method, line
by line:

1. every block of the weight gets a grid that minimises the error weighted by :math:`H_{kk}`, fixed from then on
   ("static groups"): groups stay contiguous columns, so files need no index (:mod:`quantkit.numerics.search`);
2. the damped Hessian is inverted and factorised, columns in order of falling :math:`H_{kk}` (activation order), once for all
   layers that read the same inputs (:func:`inverse_factor`). If the factorisation fails, damping is multiplied by ten and
   that is noted; inputs that never were active ("dead" columns, :math:`H_{kk} = 0`) couple to no other column and so are
   rounded to nearest;
3. the columns are rounded one after the other and each error is spread over the later ones by the formula above: the loop is
   :func:`quantkit.numerics.sweep.sweep`, twenty lines; :func:`quantkit.kernels.functions.rounding.sweep` is the same,
   compiled;
4. scales are fitted to the codes and codes chosen again, each with all others fixed (:mod:`quantkit.numerics.descent`).

Cost: out x in^2 / 2 multiply-adds, one factorisation and one triangular inverse of an in x in matrix, all in float32.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from quantkit.errors import CalibrationError
from quantkit.kernels.functions import rounding
from quantkit.nn.sites import SiteStatistics
from quantkit.nn.sizes import RunSize
from quantkit.numerics import block_scales, descent, ggml, grid
from quantkit.qtensor import BlockTensor, GridTensor
from quantkit.quantizers.base import QUANTIZERS, BlockCost, Quantizer, usual_size
from quantkit.quantizers.rtn import rounded
from quantkit.spec import QuantSpec, Scheme

_MAX_DAMPING = 1.0


@QUANTIZERS.register("gptq")
@dataclass(frozen=True)
class GPTQ(Quantizer):
    """GPTQ with activation order over static groups.

    Args:
        damping: lambda as a fraction of the mean of the Hessian's diagonal.
        act_order: visit columns by falling importance; otherwise from first to last.
        clip: how grids are chosen: ``"importance"`` (weighted search), ``"mse"`` (unweighted search) or ``"absmax"``.
        rounds: how often, after the sweep, scales are fitted to the codes and codes chosen again by coordinate descent.
        guided: weigh every token by what the predictions make of its error (:mod:`quantkit.calibrate.guidance`); takes a
            backward pass over the calibration text.
    """

    damping: float = 0.01
    act_order: bool = True
    clip: Literal["importance", "mse", "absmax"] = "importance"
    rounds: int = 1
    guided: bool = False
    divisible: ClassVar[bool] = True

    @property
    def needs(self) -> tuple[str, ...]:
        """Names of the collectors: the second moment of the inputs, with all tokens alike or not."""
        return ("guided_hessian" if self.guided else "hessian",)

    def quantize(
        self, weight: Tensor, spec: QuantSpec, statistics: SiteStatistics | None
    ) -> tuple[GridTensor | BlockTensor, tuple[str, ...]]:
        """Quantize ``weight`` (out, in) against the second moment of its inputs (in, in).

        Without statistics the weight is rounded to nearest, and the note says so.
        """
        if statistics is None:
            return rounded(weight, spec), ("no calibration input: rounded to nearest",)
        hessian = usual_size(statistics.results[self.needs[0]].to(weight.device))
        weight = self._target(weight, statistics)
        inverse = statistics.derived(_Factorise(self.needs[0], self.damping, self.act_order, weight.device))
        raised = inverse.damping > self.damping * 1.5
        note = f"Cholesky factorisation needed damping {inverse.damping:g} instead of {self.damping:g}"
        choose = self._on_grid if spec.blocks is None else self._in_blocks
        return choose(weight, spec, hessian, inverse), (note,) if raised else ()

    def cost(self, size: RunSize) -> BlockCost:
        """Return the backward pass that guides it, if one does, and the weights of all tokens, for seven layers a block."""
        first = ("and before all of them one forward and one backward pass",)
        return BlockCost(first, 4 * 7 * size.tokens * size.blocks) if self.guided else BlockCost()

    def rejects(self, scheme: Scheme) -> str | None:
        """Say why layers of a scheme cannot be quantized by this; None if they can."""
        return None if scheme.weight.blocks is not None else super().rejects(scheme)

    def _on_grid(self, weight: Tensor, spec: QuantSpec, hessian: Tensor, inverse: "InverseHessian") -> GridTensor:
        qparams = self._grid(weight, spec, hessian.diagonal())
        codes = rounding.sweep(weight, qparams, spec, inverse.order, inverse.factor)
        damped = damp(hessian, inverse.damping) if self.rounds else hessian
        for _ in range(self.rounds):
            if spec.block[0] == 1:
                scale, residual = descent.fit_scales(weight, codes, qparams, spec, damped)
                qparams = scale, qparams[1]
            else:
                residual = (weight - grid.dequantize(codes, *qparams, spec)) @ damped
            codes = rounding.descend(residual, codes, qparams, spec, inverse.order, damped)
        return GridTensor.from_codes(codes, *qparams, spec)

    def _in_blocks(self, weight: Tensor, spec: QuantSpec, hessian: Tensor, inverse: "InverseHessian") -> BlockTensor:
        """Do the same with scales of two levels; a grid with minimums is one without, for a weight moved by them."""
        kind = ggml.BLOCK_TYPES[str(spec.blocks)]
        importance = hessian.diagonal() if self.clip == "importance" else None
        content = rounding.search_blocks(weight, kind, importance)
        target, qparams = block_scales.as_grid(weight, content, kind)
        codes = rounding.sweep(target, qparams, spec, inverse.order, inverse.factor)
        damped = damp(hessian, inverse.damping)
        for _ in range(self.rounds):
            content = content._replace(codes=codes.view_as(content.codes))
            content, residual = block_scales.fit(weight, content, kind, damped)
            _, qparams = block_scales.as_grid(weight, content, kind)
            codes = rounding.descend(residual, codes, qparams, spec, inverse.order, damped)
        return BlockTensor.from_content(content._replace(codes=codes.view_as(content.codes)), spec)

    def _target(self, weight: Tensor, statistics: SiteStatistics) -> Tensor:
        """Return the weight that the quantized one should come close to."""
        return weight

    def _grid(self, weight: Tensor, spec: QuantSpec, importance: Tensor) -> tuple[Tensor, Tensor | None]:
        if self.clip == "absmax":
            return grid.choose_qparams(weight, spec)
        return rounding.search_qparams(weight, spec, importance if self.clip == "importance" else None)


@dataclass(frozen=True, slots=True)
class InverseHessian:
    """The factorised inverse of a damped Hessian.

    Attributes:
        order: int64 (in,), the order in which columns are rounded.
        factor: float32 (in, in), U with rows and columns in that order.
        damping: what was needed, as a fraction of the mean of the diagonal.
    """

    order: Tensor
    factor: Tensor
    damping: float


@dataclass(frozen=True, slots=True)
class _Factorise:
    """Computes what layers with the same inputs share: column order and U."""

    moment: str
    damping: float
    act_order: bool
    device: torch.device

    def __call__(self, statistics: SiteStatistics) -> InverseHessian:
        hessian = usual_size(statistics.results[self.moment].to(self.device))
        importance = hessian.diagonal()
        order = torch.arange(len(importance), device=hessian.device)
        if self.act_order:
            order = importance.argsort(descending=True, stable=True)
        return InverseHessian(order, *inverse_factor(hessian, self.damping, order))


def damp(hessian: Tensor, damping: float) -> Tensor:
    """Return ``hessian`` (n, n) with ``damping`` times the mean of its non-zero diagonal added to the diagonal.

    Dead inputs, whose diagonal is zero, get that mean itself.
    """
    damped = hessian.clone()
    diagonal = damped.diagonal()
    dead = diagonal <= 0
    mean = float(diagonal[~dead].mean()) if bool((~dead).any()) else 1.0
    diagonal.add_(damping * mean)
    diagonal[dead] = mean
    return damped


def _ordered(hessian: Tensor, order: Tensor | None) -> Tensor:
    return hessian if order is None else hessian[order[:, None], order]


def inverse_factor(hessian: Tensor, damping: float, order: Tensor | None = None) -> tuple[Tensor, float]:
    """Factorise the damped inverse Hessian, raising the damping tenfold until it works.

    Beside ``hessian`` three matrices of its size are in memory at a time; that of a wide layer is as large as its block.

    Args:
        hessian: float32 (n, n), symmetric, positive semi-definite; rows of dead inputs are zero.
        damping: fraction of the mean of the non-zero diagonal.
        order: int64 (n,), which row and column of ``hessian`` come first; None leaves them as they are.

    Returns:
        U, upper triangular (n, n), with U^T U = (H + lambda I)^-1, and the damping that was used.

    Raises:
        CalibrationError: if even damping by the full mean does not help.
    """
    while True:
        # With J the reversal and J H J = L L^T, the wanted factor is J L^-1 J: no inverse of H, no second factorisation.
        lower, failed = torch.linalg.cholesky_ex(damp(_ordered(hessian, order), damping).flip(0, 1))
        if not int(failed):
            # The library works in place on columns that are contiguous; the identity is its own transpose.
            inverse = torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device).T
            inverse = torch.linalg.solve_triangular(lower, inverse, upper=False, out=inverse)
            del lower
            upper = inverse.flip(0, 1)
            del inverse
            if bool(torch.isfinite(upper).all()):
                return upper, damping
        if damping * 10 > _MAX_DAMPING:
            raise CalibrationError(
                f"the Hessian of {len(hessian)} inputs cannot be factorised even with damping {damping:g}; "
                "use more calibration text"
            )
        damping = max(damping, 1e-4) * 10
