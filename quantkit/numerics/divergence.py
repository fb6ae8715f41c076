r"""The gradient of KL divergence by the logits, for learning from another model's predictions.

.. math:: KL(P \| Q) = \sum_v P_v (\log P_v - \log Q_v), \qquad \frac{\partial KL}{\partial q_v} = Q_v - P_v

with :math:`Q = softmax(q)` of the learner and :math:`P = softmax(p)` of the teacher.

Of a teacher of whom only the likeliest tokens K are known, all others R count as one, with the rest of the probability:

.. math:: KL_K(P \| Q) = \sum_{v \in K} P_v (\log P_v - \log Q_v) + P_R (\log P_R - \log Q_R), \qquad
    \frac{\partial KL_K}{\partial q_v} = Q_v - P_v \;(v \in K), \quad Q_v (1 - P_R / Q_R) \;(v \in R)

which is never more than the divergence of all tokens: what P and Q do inside the rest is not seen.
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


def bucket_divergence_gradient(logits: Tensor, tokens: Tensor, log_p: Tensor, log_rest: Tensor) -> tuple[float, Tensor]:
    """Return the summed divergence from predictions of which the likeliest tokens are known, and its gradient by ``logits``.

    Args:
        logits: (rows, V), floating; the learner's. Not modified.
        tokens: int (rows, K), the known tokens of every row, each once; K <= V.
        log_p: float32 (rows, K), their log probabilities.
        log_rest: float32 (rows,), log of the probability of all others together; minus infinity for none.

    Returns:
        The sum as a float, in nats, and the gradient in the dtype of ``logits``.
    """
    total, gradient = 0.0, torch.empty_like(logits)
    rows = max(1, _TILE // logits.shape[-1])
    for start in range(0, len(logits), rows):
        part = slice(start, start + rows)
        log_q, known, wanted, rest = logits[part].float().log_softmax(-1), tokens[part].long(), log_p[part], log_rest[part]
        p, p_rest = wanted.exp(), rest.exp()
        log_q_rest = log_q.scatter(-1, known, -torch.inf).logsumexp(-1)
        total += float((p * (wanted - log_q.gather(-1, known))).sum(dtype=torch.float64))
        total += float(torch.where(p_rest > 0, p_rest * (rest - log_q_rest), 0.0).sum(dtype=torch.float64))
        q = log_q.exp_()
        at_known = q.gather(-1, known) - p
        kept = torch.where(p_rest > 0, 1 - (rest - log_q_rest).exp(), 1.0)
        gradient[part] = q.mul_(kept.unsqueeze(-1)).scatter_(-1, known, at_known)
    return total, gradient
