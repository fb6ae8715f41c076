r"""How much each choice of each layer is expected to cost, in nats of KL divergence per token, from one backward pass.

Let a layer's weight change by E. Its output changes by :math:`E x`, and to second order the mean KL divergence between the
model's predictions before and after is

.. math:: \tfrac12 E_t\big[(\delta_t^T E x_t)^2\big] \approx \tfrac12 \sum_r g_r \; e_r^T H e_r,
   \qquad g_r = E[\delta_r^2], \quad H = \frac{E[|\delta|^2 x x^T]}{E[|\delta|^2]}

with :math:`\delta` the gradient of the log-probability of tokens *drawn from the model's own predictions* with respect to the
layer's output: the Fisher information of the predictions, factored into outputs and inputs as in K-FAC (Martens, Grosse 2015,
arXiv 1503.05671, section 3), of which only the diagonal on the output side is kept. Inputs are weighted by how much the
predictions hang on their token, without which the first tokens, large and of no consequence, rule H. :math:`e_r` is row r of E.

What E is depends on who rounds. Rounding to nearest gives it as it is. A quantizer that makes up for errors (GPTQ and its kin)
would leave of independent errors of rounding (LDLQ; Chee, Cai, Kuleshov, De Sa 2023, arXiv 2307.13304, theorem 1)

.. math:: E[e_r^T H e_r] = \sum_k m_{r,k} / U_{kk}^2

if it knew H, with U the upper Cholesky factor of :math:`H^{-1}` as in :mod:`quantkit.quantizers.gptq`, and :math:`m_{r,k}` the
mean squared error that rounding to the grid makes in the block of weight (r, k). It knows another H, without gradients and from
other text, so what it leaves lies between the two: their geometric mean is what is expected of it.

Inputs that are rounded too add :math:`\tfrac12 \sum_r g_r \sum_k w_{rk}^2 \, n_k`, with n the mean squared error of input k.

Errors are those of real rounding, of at most :data:`ROWS` rows of a matrix, spread evenly, each standing for its neighbours.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from quantkit.errors import CalibrationError
from quantkit.numerics import grid
from quantkit.numerics.hadamard import hadamard_transform
from quantkit.numerics.inputs import InputQuantizer, static_scale
from quantkit.quantizers.base import Quantizer, quantize_site, usual_size
from quantkit.quantizers.gptq import inverse_factor
from quantkit.quantizers.rtn import RTN
from quantkit.spec import ActivationSpec, QuantSpec, Scheme

_DAMPING = 0.01

ROWS = 256
"""Rows of a matrix that are rounded to see what rounding costs."""


@dataclass
class Sensitivity:
    """What a matrix (out, in) makes of errors.

    Attributes:
        moment: H, float32 (in, in).
        gradient: sum over all tokens of the squared gradient of every output, divided by their number, float32 (out,).
        noise: mean squared error of every input under what inputs may be rounded to, (in,).
        fisher: where inputs are not seen: mean squared gradient of every weight, (out, in), instead of the first two.
    """

    moment: Tensor | None
    gradient: Tensor | None
    noise: dict[ActivationSpec, Tensor] = field(default_factory=dict)
    fisher: Tensor | None = None

    def scaled(self, left: Tensor, rows: slice) -> float:
        """Return the expected KL of what is left, e_r^T H e_r, of some rows (rows,), which stand for all."""
        assert self.gradient is not None
        return 0.5 * _scaled(self.gradient[rows].to(left) * left, self.gradient, rows)


class Scorer:
    """Expected KL of the choices of layers, one matrix at a time.

    Args:
        method: the quantizer that will choose the codes.
    """

    def __init__(self, method: Quantizer) -> None:
        self.compensates = "hessian" in method.needs

    def score(self, name: str, weight: Tensor, schemes: Sequence[Scheme], found: Sensitivity) -> list[float]:
        """Return the expected KL, in nats per token, of every scheme for one matrix.

        Args:
            name: of the layer, for messages.
            weight: floating (out, in).
            schemes: what it may be.
            found: its sensitivity.

        Raises:
            CalibrationError: gradients that are not finite.
        """
        spread: dict[bool, Tensor] = {}
        losses = [self._score(name, weight, scheme, found, spread) for scheme in schemes]
        if not all(0 <= loss < float("inf") for loss in losses):
            raise CalibrationError(f"{name}: its gradients are not finite; check the model and its dtype")
        return losses

    def _score(self, name: str, weight: Tensor, scheme: Scheme, found: Sensitivity, spread: dict[bool, Tensor]) -> float:
        rows = slice(None, None, max(1, len(weight) // ROWS)) if scheme.weight.block[0] == 1 else slice(None)
        weight = InputQuantizer(scheme.activation).prepare_weight(weight[rows]).float()
        error = rounding_error(name, weight, scheme.weight)
        if found.fisher is not None:
            return 0.5 * _scaled((found.fisher[rows] * error.square()).sum(1), found.fisher.sum(1), rows)
        assert found.moment is not None
        assert found.gradient is not None
        moment = _rotated(found.moment) if scheme.rotated else found.moment
        loss = found.scaled(((error @ moment) * error).sum(1).clamp(min=0), rows)
        if self.compensates and scheme.weight.block[0] == 1:
            if scheme.rotated not in spread:
                spread[scheme.rotated] = unpredictable(moment)
            _, columns = grid.block_size(scheme.weight, tuple(error.shape))
            mean = error.square().unflatten(1, (-1, columns)).mean(-1)  # (rows, groups)
            left = mean @ spread[scheme.rotated].unflatten(0, (-1, columns)).sum(-1)
            loss = math.sqrt(loss * found.scaled(left, rows))
        if scheme.activation is not None:
            loss += found.scaled(weight.square() @ found.noise[scheme.activation].to(weight), rows)
        return loss


def unpredictable(moment: Tensor) -> Tensor:
    """Return 1 / U_kk^2 for every input (in,): what of it cannot be told from the inputs that are rounded after it.

    Args:
        moment: H, float32 (in, in).
    """
    hessian = usual_size(moment)
    order = hessian.diagonal().argsort(descending=True, stable=True)
    upper, _ = inverse_factor(hessian[order][:, order], _DAMPING)
    found = torch.empty_like(hessian.diagonal())
    found[order] = upper.diagonal().square().reciprocal()
    return found * float(moment.diagonal().sum() / hessian.diagonal().sum().clamp(min=1e-30))  # undoes usual_size


def _scaled(losses: Tensor, gradient: Tensor, rows: slice) -> float:
    """Return the sum over all rows of a matrix, of which ``losses`` are some: the rest are like them, by their gradients."""
    total, seen = gradient.sum(dtype=torch.float64), gradient[rows].sum(dtype=torch.float64)
    return float(losses.sum(dtype=torch.float64) * total / seen.clamp(min=1e-300))


def rounding_error(name: str, weight: Tensor, spec: QuantSpec) -> Tensor:
    """Return what rounding to nearest adds to a float32 weight (out, in)."""
    if spec.has_global_scale:
        return quantize_site(RTN(), name, weight, spec, None).qtensor.dequantize() - weight
    qparams = grid.choose_qparams(weight, spec)
    return grid.dequantize(grid.quantize(weight, *qparams, spec), *qparams, spec) - weight


def _rotated(moment: Tensor) -> Tensor:
    """Return the second moment of inputs after a Hadamard transform."""
    return hadamard_transform(hadamard_transform(moment).T.contiguous())


def input_noise(x: Tensor, specs: Sequence[ActivationSpec]) -> Mapping[ActivationSpec, Tensor]:
    """Return for every way to round inputs x (rows, in) the sum over rows of the squared error of each, (in,)."""
    found = {}
    for spec in specs:
        quantizer = InputQuantizer(spec)
        if spec.static:  # the scale that calibration would find on these rows
            quantizer = InputQuantizer(spec, static_scale(spec, quantizer.prepare_input(x).abs().amax(0)).to(x.device))
        prepared = quantizer.prepare_input(x)
        found[spec] = (quantizer.round(prepared) - prepared).float().square().sum(0)
    return found
