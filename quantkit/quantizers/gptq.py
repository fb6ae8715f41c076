r"""GPTQ: round column by column and let the columns still to come make up for the error.

With :math:`H = E[x x^T]` and :math:`U` the upper Cholesky factor of :math:`(H + \lambda I)^{-1}`, after rounding column
:math:`k` to :math:`q_k` every later column :math:`j` becomes

.. math:: w_j \leftarrow w_j - \frac{w_k - q_k}{U_{kk}} U_{kj}

(Frantar, Ashkboos, Hoefler, Alistarh 2022, arXiv 2210.17323, algorithm 1). Here:

- columns are visited in order of falling :math:`H_{kk}` (activation order), but groups stay contiguous columns of the
  original order and their grids are fixed beforehand ("static groups"), so files need no index;
- grids minimise the error weighted by :math:`H_{kk}` (:mod:`quantkit.numerics.search`);
- inputs that never were active ("dead" columns, :math:`H_{kk} = 0`) are rounded to nearest and take no part;
- if the Cholesky factorisation fails, damping is multiplied by ten and that is noted;
- updates are batched over :attr:`GPTQ.block_columns` columns (section 3.3, step 2).

Cost: out x in^2 multiply-adds and three factorisations of an in x in matrix; everything in float32.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from quantkit.errors import CalibrationError
from quantkit.numerics import grid
from quantkit.numerics.search import search_qparams
from quantkit.qtensor import QTensor
from quantkit.quantizers.base import QUANTIZERS, Statistics
from quantkit.quantizers.rtn import nearest
from quantkit.spec import QuantSpec

_MAX_DAMPING = 1.0


@QUANTIZERS.register("gptq")
@dataclass(frozen=True)
class GPTQ:
    """GPTQ with activation order over static groups.

    Args:
        damping: lambda as a fraction of the mean of the Hessian's diagonal.
        act_order: visit columns by falling importance; otherwise from first to last.
        clip: how grids are chosen: ``"importance"`` (weighted search), ``"mse"`` (unweighted search) or ``"absmax"``.
        block_columns: columns per lazy batch of updates.
    """

    damping: float = 0.01
    act_order: bool = True
    clip: Literal["importance", "mse", "absmax"] = "importance"
    block_columns: int = 64
    needs: ClassVar[tuple[str, ...]] = ("hessian",)

    def quantize(self, weight: Tensor, spec: QuantSpec, statistics: Statistics | None) -> tuple[QTensor, tuple[str, ...]]:
        """Quantize ``weight`` (out, in) against ``statistics.results["hessian"]`` (in, in).

        Without statistics the weight is rounded to nearest, and the note says so.
        """
        if statistics is None:
            return nearest(weight, grid.choose_qparams(weight, spec), spec), ("no calibration input: rounded to nearest",)
        hessian = statistics.results["hessian"].to(weight.device)
        qparams = self._grid(weight, spec, hessian.diagonal())
        order, factor, notes = self._factorise(hessian, statistics)
        codes = sweep(weight, qparams, spec, order, factor, self.block_columns)
        return QTensor.from_codes(codes, *qparams, spec), notes

    def _grid(self, weight: Tensor, spec: QuantSpec, importance: Tensor) -> tuple[Tensor, Tensor | None]:
        if self.clip == "absmax":
            return grid.choose_qparams(weight, spec)
        return search_qparams(weight, spec, importance if self.clip == "importance" else None)

    def _factorise(self, hessian: Tensor, statistics: Statistics) -> tuple[Tensor, Tensor, tuple[str, ...]]:
        """Return the column order, U in that order, and notes; computed once for sites that share their statistics."""
        key = f"gptq {self.damping} {self.act_order}"
        if f"{key} factor" not in statistics.cache:
            importance = hessian.diagonal()
            order = torch.arange(len(importance), device=hessian.device)
            if self.act_order:
                order = importance.argsort(descending=True, stable=True)
            factor, damping = inverse_factor(hessian[order][:, order], self.damping)
            statistics.cache |= {f"{key} order": order, f"{key} factor": factor, f"{key} damping": torch.tensor(damping)}
        damping = float(statistics.cache[f"{key} damping"])
        raised = damping > self.damping * 1.5
        notes = (f"Cholesky factorisation needed damping {damping:g} instead of {self.damping:g}",) if raised else ()
        return statistics.cache[f"{key} order"], statistics.cache[f"{key} factor"], notes


def inverse_factor(hessian: Tensor, damping: float) -> tuple[Tensor, float]:
    """Factorise the damped inverse Hessian, raising the damping tenfold until it works.

    Args:
        hessian: float32 (n, n), symmetric, positive semi-definite; rows of dead inputs are zero.
        damping: fraction of the mean of the non-zero diagonal.

    Returns:
        U, upper triangular (n, n), with U^T U = (H + lambda I)^-1, and the damping that was used.

    Raises:
        CalibrationError: if even damping by the full mean does not help.
    """
    diagonal = hessian.diagonal()
    dead = diagonal <= 0
    mean = float(diagonal[~dead].mean()) if bool((~dead).any()) else 1.0
    while True:
        damped = hessian.clone()
        damped.diagonal().add_(damping * mean)
        damped.diagonal()[dead] = mean
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not int(failed):
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not int(failed) and bool(torch.isfinite(upper).all()):
                return upper, damping
        if damping * 10 > _MAX_DAMPING:
            raise CalibrationError(
                f"the Hessian of {len(diagonal)} inputs cannot be factorised even with damping {damping:g}; "
                "use more calibration text"
            )
        damping = max(damping, 1e-4) * 10


def sweep(
    weight: Tensor, qparams: tuple[Tensor, Tensor | None], spec: QuantSpec, order: Tensor, factor: Tensor, block_columns: int
) -> Tensor:
    """Round the columns of ``weight`` (out, in) in ``order``, feeding each error forward; returns uint8 codes (out, in).

    Everything is kept transposed, (in, out), so that a column is contiguous.
    """
    shape = tuple(weight.shape)
    top = 2**spec.bits - 1
    columns = weight.float().T[order].contiguous()  # (in, out)
    scales = _per_column(qparams[0].float(), spec, shape)[order]
    zero = grid.zero_code(spec)
    zeros = None if qparams[1] is None else _per_column(qparams[1].float(), spec, shape)[order]
    inverse = scales.reciprocal()
    codes = torch.empty_like(columns)
    diagonal = factor.diagonal().tolist()
    for start in range(0, shape[1], block_columns):
        stop = min(start + block_columns, shape[1])
        block, errors = columns[start:stop], torch.empty_like(columns[start:stop])
        for i in range(stop - start):
            k = start + i
            middle = zero if zeros is None else zeros[k]
            code = torch.mul(block[i], inverse[k], out=codes[k]).round_().add_(middle).clamp_(0, top)
            torch.sub(block[i], (code - middle).mul_(scales[k]), out=errors[i])
            errors[i].mul_(1 / diagonal[k])
            if k + 1 < stop:
                block[i + 1 :].addr_(factor[k, k + 1 : stop], errors[i], alpha=-1)
        columns[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)
    result = torch.empty(shape[1], shape[0], dtype=torch.uint8, device=weight.device)
    result[order] = codes.to(torch.uint8)
    return result.T.contiguous()


def _per_column(values: Tensor, spec: QuantSpec, shape: tuple[int, ...]) -> Tensor:
    """Expand per-block values to one row per column, (in, out)."""
    return grid.expand(values, spec, shape).expand(shape).T.contiguous()
