r"""The gradient of KL divergence by the logits, for learning from another model's predictions.

.. math:: KL(P \| Q) = \sum_v P_v (\log P_v - \log Q_v), \qquad \frac{\partial KL}{\partial q_v} = Q_v - P_v

with :math:`Q = softmax(q)` of the learner and :math:`P = softmax(p)` of the teacher.
"""

import torch
from torch import Tensor

_TILE = 1 << 22
"""Logits worked on at a time, so that the temporaries stay small."""


def divergence_gradient(logits: Tensor, wanted: Tensor) -> tuple[float, Tensor]:
    """Return the summed KL(wanted || logits) over all rows, in nats, and its gradient by ``logits``.

    Args:
        logits: (rows, V), floating; the learner's. Not modified.
        wanted: (rows, V) of the same dtype; the teacher's.

    Returns:
        The sum as a float, and the gradient in the dtype of ``logits``.
    """
    total, gradient = 0.0, torch.empty_like(logits)
    rows = max(1, _TILE // logits.shape[-1])
    for start in range(0, len(logits), rows):
        part = slice(start, start + rows)
        log_q, log_p = logits[part].float().log_softmax(-1), wanted[part].float().log_softmax(-1)
        p = log_p.exp()
        total += float((log_p.sub_(log_q).mul_(p)).sum(dtype=torch.float64))
        gradient[part] = log_q.exp_().sub_(p)
    return total, gradient
