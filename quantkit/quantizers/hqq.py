r"""HQQ: fit the grid to most of the weights and let the few large errors be, without any data.

With errors counted in steps of the grid, :math:`d = (w - s(q - z)) / s`, minimise a norm that forgives outliers,

.. math:: \sum_k |d_k|^p, \qquad 0 < p < 1

by half-quadratic splitting (Badri, Shaji 2023, "Half-Quadratic Quantization of Large Machine Learning Models", equations 4 to
7): part of the error is declared an outlier, :math:`e = \operatorname{sign}(d) \max(0, |d| - |d|^{p - 1} / \beta)`, and the
grid is fitted by least squares to what is left, with :math:`\beta` growing.

The paper keeps the scale and moves a zero point that is a float. Zero points here are whole codes, which such small moves
never reach, so the scale is fitted as well; and scales are rounded as they are stored before anything is compared. Every
block keeps the best grid that it has seen, the one of its range among them. A float zero point would need a second float per
block, which no format here stores.

Cost: about fifteen passes over the weight per round.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from quantkit.errors import SpecError
from quantkit.nn.sites import SiteStatistics
from quantkit.numerics import grid
from quantkit.qtensor import GridTensor
from quantkit.quantizers.base import QUANTIZERS, Quantizer
from quantkit.quantizers.rtn import nearest
from quantkit.spec import QuantSpec

_GROWTH = 1.01


@QUANTIZERS.register("hqq")
@dataclass(frozen=True)
class HQQ(Quantizer):
    """Half-quadratic quantization; needs no calibration.

    Args:
        p: exponent of the norm; smaller forgives outliers more.
        beta: how much of an error is forgiven at first: errors below about ``beta ** (-1 / (2 - p))`` steps are none.
        rounds: fits of the grid.

    Raises:
        SpecError: an exponent outside 0 to 1, or a negative ``beta`` or ``rounds``.
    """

    p: float = 0.7
    beta: float = 10.0
    rounds: int = 20
    by_rows: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 < self.p <= 1 or self.beta <= 0 or self.rounds < 0:
            raise SpecError(f"hqq: p={self.p}, beta={self.beta}, rounds={self.rounds}; want 0 < p <= 1, beta > 0, rounds >= 0")

    def quantize(
        self, weight: Tensor, spec: QuantSpec, statistics: SiteStatistics | None
    ) -> tuple[GridTensor, tuple[str, ...]]:
        """Quantize ``weight`` (out, in); ``statistics`` are not used."""
        blocks = grid.to_blocks(weight, spec)  # (out_blocks, in_blocks, n)
        stored, zero_point = grid.choose_qparams(weight, spec)
        top = 2**spec.bits - 1
        scale = stored.float()
        zero = torch.full_like(scale, grid.zero_code(spec)) if zero_point is None else zero_point.float()
        best_loss, best_scale, best_zero = torch.full_like(scale, torch.inf), scale, zero
        beta = self.beta
        for _ in range(self.rounds + 1):
            exact = blocks / scale.unsqueeze(-1)
            levels = torch.clamp(exact.round(), -zero.unsqueeze(-1), (top - zero).unsqueeze(-1))
            error = exact - levels
            loss = error.abs().pow(self.p).sum(-1) * scale.pow(self.p)
            better = loss < best_loss
            best_loss = torch.where(better, loss, best_loss)
            best_scale, best_zero = torch.where(better, scale, best_scale), torch.where(better, zero, best_zero)
            size = error.abs()
            outlier = error.sign() * (size - size.clamp(min=1e-6).pow(self.p - 1) / beta).clamp_(min=0)
            fitted = exact - outlier  # what the grid shall come close to, in steps of the present scale
            if zero_point is not None:
                zero = (zero + (levels - fitted).mean(-1)).round_().clamp_(0, top)
                levels = torch.clamp(fitted.round(), -zero.unsqueeze(-1), (top - zero).unsqueeze(-1))
            norm, cross = levels.square().sum(-1), (levels * fitted).sum(-1)
            factor = torch.where((norm > 0) & (cross > 0), cross / norm.clamp(min=1), torch.ones_like(norm))
            scale = grid.round_scale(scale * factor, spec.scale_dtype).float()
            beta *= _GROWTH
        qparams = best_scale.to(stored.dtype), None if zero_point is None else best_zero.to(torch.uint8)
        return nearest(weight, qparams, spec), ()
