r"""How much each choice of each layer is expected to cost, in nats of KL divergence per token, from one backward pass.

Let a layer's weight change by E. To second order the KL divergence between the model's predictions before and after, summed
over the tokens of a window of text, is

.. math:: \tfrac12 E\big[\langle G, E \rangle^2\big], \qquad G = \sum_t \delta_t x_t^T

with G the gradient, with respect to the weight, of the log-probability of tokens *drawn from the model's own predictions* for
that window: the Fisher information of the predictions (Martens 2020, New insights and perspectives on the natural gradient
method, arXiv 1412.1193, section 9). G sums over the tokens of the window before it is squared, because one E acts on all of
them: errors of keys, which every later query reads, add up. Taking tokens for independent (as K-FAC does) expects two to five
times too little of query and key projections, and ten times too much where a few tokens have huge activations.

What E is depends on who rounds. Errors :math:`\eta` of rounding a weight to its grid are as good as independent, of a mean
square m that is measured. Rounding to nearest leaves them as they are. A quantizer that makes up for errors in later columns
(GPTQ and its kin) turns those of one row into :math:`E = \eta\, \mathrm{diag}(1/U_{kk})\, U`, with U the upper Cholesky factor
of the inverse second moment of the inputs, as in :mod:`quantkit.quantizers.gptq`: this is what its algorithm does to errors,
not a bound. In expectation over roundings

.. math:: E\big[\langle G, E \rangle^2\big] = \sum_{r,k} m_{rk} F_{rk}, \qquad F_{rk} = \big((G U^T)_{rk} / U_{kk}\big)^2

and F, averaged over windows, is all that is kept of a layer.

Inputs that are rounded too add :math:`\tfrac12 \sum_r g_r \sum_k w_{rk}^2 \, n_k`, with n the mean squared error of input k and
:math:`g_r = E[\delta_r^2]`: their errors differ from token to token.

Errors and F are those of at most :data:`ROWS` rows of a matrix, spread evenly, each standing for its neighbours.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from quantkit.errors import CalibrationError
from quantkit.numerics import grid
from quantkit.numerics.hadamard import hadamard_transform
from quantkit.numerics.inputs import InputQuantizer, static_scale
from quantkit.quantizers.base import quantize_site, usual_size
from quantkit.quantizers.gptq import inverse_factor
from quantkit.quantizers.rtn import RTN
from quantkit.spec import ActivationSpec, QuantSpec, Scheme

_DAMPING = 0.01

ROWS = 128
"""Rows of a matrix that are looked at."""


def seen_rows(rows: int) -> slice:
    """Return the rows of a matrix that stand for all of them."""
    return slice(None, None, max(1, rows // ROWS))


@dataclass
class Sensitivity:
    """What the predictions make of errors of a matrix (out, in).

    Attributes:
        fisher: F of the rows of :func:`seen_rows`, float32 (rows, in), divided by the number of tokens: for weights as they are
            (False) and, where a choice wants that, multiplied by a Hadamard matrix (True).
        gradient: mean square over tokens of the gradient of every output, (out,): how much the other rows count.
        noise: mean squared error of every input under what inputs may be rounded to, (in,).
        compensated: whether F is that of a quantizer which makes up for errors.
    """

    fisher: dict[bool, Tensor]
    gradient: Tensor
    noise: dict[ActivationSpec, Tensor] = field(default_factory=dict)
    compensated: bool = False

    @classmethod
    def of_weights(cls, squares: Tensor) -> "Sensitivity":
        """Return the sensitivity where the mean squared gradient of every weight (out, in) is known, and nothing of inputs."""
        return cls({False: squares[seen_rows(len(squares))]}, squares.sum(1))

    def total(self, losses: Tensor) -> float:
        """Return the expected KL of a matrix from the sums of E[<G, E>^2] of its seen rows, (rows,)."""
        rows = seen_rows(len(self.gradient))
        total, seen = self.gradient.sum(dtype=torch.float64), self.gradient[rows].sum(dtype=torch.float64)
        return 0.5 * float(losses.sum(dtype=torch.float64) * total / seen.clamp(min=1e-300))


def score(name: str, weight: Tensor, schemes: Sequence[Scheme], found: Sensitivity) -> list[float]:
    """Return the expected KL, in nats per token, of every scheme for one matrix.

    Args:
        name: of the layer, for messages.
        weight: floating (out, in).
        schemes: what it may be.
        found: its sensitivity.

    Raises:
        CalibrationError: gradients that are not finite.
    """
    losses = [_score(name, weight, scheme, found) for scheme in schemes]
    if not all(0 <= loss < float("inf") for loss in losses):
        raise CalibrationError(f"{name}: its gradients are not finite; check the model and its dtype")
    return losses


def _score(name: str, weight: Tensor, scheme: Scheme, found: Sensitivity) -> float:
    rows, alone = seen_rows(len(weight)), scheme.weight.block[0] == 1
    weight = weight[rows] if alone else weight  # a block of several rows has one scale for all of them
    weight = InputQuantizer(scheme.activation).prepare_weight(weight).float()
    fisher = found.fisher[scheme.rotated]
    squares = rounding_error(name, weight, scheme.weight).square()
    squares = squares if alone else squares[rows]
    if found.compensated:  # the weight that is rounded has moved: where it was in its group means nothing
        _, columns = grid.block_size(scheme.weight, tuple(weight.shape))
        squares, fisher = squares.unflatten(1, (-1, columns)).mean(-1), fisher.unflatten(1, (-1, columns)).sum(-1)
    loss = found.total((squares * fisher.to(squares)).sum(1))
    if scheme.activation is not None:
        seen = weight if alone else weight[rows]
        loss += found.total(found.gradient[rows].to(seen) * (seen.square() @ found.noise[scheme.activation].to(seen)))
    return loss


def compensation(moment: Tensor) -> Tensor:
    """Return what turns G (rows, in) into :math:`(G U^T)_{rk} / U_{kk}` when multiplied from the right, (in, in).

    Args:
        moment: E[x x^T] of the inputs, float32 (in, in).
    """
    hessian = usual_size(moment)
    order = hessian.diagonal().argsort(descending=True, stable=True)
    upper, _ = inverse_factor(hessian[order][:, order], _DAMPING)
    found = torch.empty_like(upper)
    found[order.unsqueeze(1), order] = (upper / upper.diagonal().unsqueeze(1)).T
    return found


def rounding_error(name: str, weight: Tensor, spec: QuantSpec) -> Tensor:
    """Return what rounding to nearest adds to a float32 weight (out, in).

    Scales hold all values. Quantizers that search for scales lose a third less at two bits and a sixth less at four, in all
    layers alike: plans hardly change, and the search is shorter.
    """
    if spec.has_global_scale:
        return quantize_site(RTN(), name, weight, spec, None).qtensor.dequantize() - weight
    qparams = grid.choose_qparams(weight, spec)
    return grid.dequantize(grid.quantize(weight, *qparams, spec), *qparams, spec) - weight


def rotated_moment(moment: Tensor) -> Tensor:
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
