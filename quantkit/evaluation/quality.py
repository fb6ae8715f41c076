"""How far a model is from its text and from another model, in one streaming pass.

For a scored token y with logits q of the model and p of the base, P = softmax(p), Q = softmax(q):

    nll  = log sum exp(q) - q[y]                         nats; perplexity = exp(mean nll)
    KL   = sum_v P_v (log P_v - log Q_v)                 nats; 0 if and only if the two predict the same

KL is computed as ``sum_v e_v (a_v - b_v) / S_p + log S_q - log S_p`` from logits shifted by their own maximum
(a = p - max p, b = q - max q, e = exp a, S = sum of exponentials): sums in float32, logarithms in float64. Equal logits
give exactly 0, and rounding leaves about 1e-7 per token, far below the 1e-3 of an 8-bit model.

Standard errors. Tokens of one window are not independent, so the unit of the error is the window: with per-window sums s_w
over n_w tokens and the mean m, ``se = sqrt(W / (W - 1) * sum_w (s_w - m n_w)^2) / sum_w n_w``; the perplexity's is
``ppl * se(nll)`` (delta method). The difference between two models on the same tokens is much better known than either
alone: ``nll_increase_se`` is the paired error.

Memory: the logits of one batch per model, about 30 bytes per scored token, and three scratch tiles of 16 MiB. The models'
forwards dominate the time; the statistics of a vocabulary of 49152 add less than a tenth.
"""

import itertools
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from quantkit.errors import CalibrationError
from quantkit.evaluation.reference import BaseLogits, LogitsFunction, run_model
from quantkit.evaluation.windows import Windows
from quantkit.system.compute import evaluation_mode
from quantkit.system.progress import Progress, ProgressCallback, ignore

TILE = 1 << 22
"""Logits worked on at a time. Smaller tiles stay in the cache, but on a busy machine their threads wait for each other."""

QUANTILES = (0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 0.999)
"""Levels at which the distribution of KL over tokens is kept."""


@dataclass(frozen=True, slots=True)
class Divergence:
    """Distance of a model's predictions from the base model's, over the same tokens.

    Attributes:
        tokens, windows: what was compared.
        mean, mean_se, median, p99, max: KL(base || model) per token, nats; the error is over windows, None for one window.
        quantiles: (level, KL) pairs at :data:`QUANTILES`.
        same_top1: share of tokens where both models rank the same token first.
        right_to_wrong, wrong_to_right: tokens that only the base, or only the model, ranks first correctly ("flips").
        base_nll, base_perplexity: of the base on these tokens.
        nll_increase, nll_increase_se: mean nll(model) - nll(base), and its paired error.
    """

    tokens: int
    windows: int
    mean: float
    mean_se: float | None
    median: float
    p99: float
    max: float
    quantiles: tuple[tuple[float, float], ...]
    same_top1: float
    right_to_wrong: int
    wrong_to_right: int
    base_nll: float
    base_perplexity: float
    nll_increase: float
    nll_increase_se: float | None


@dataclass(frozen=True, slots=True)
class Quality:
    """How well a model predicts a text.

    Attributes:
        tokens, windows: what was scored.
        nll, nll_se: mean negative log-likelihood per token, nats, and its error over windows (None for one window).
        perplexity, perplexity_se: exp(nll) and its error by the delta method.
        top1: share of tokens that the model ranks first.
        divergence: against the base model, if one was given.
    """

    tokens: int
    windows: int
    nll: float
    nll_se: float | None
    perplexity: float
    perplexity_se: float | None
    top1: float
    divergence: Divergence | None = None


def score(
    model: nn.Module | LogitsFunction,
    windows: Windows,
    base: nn.Module | LogitsFunction | BaseLogits | None = None,
    *,
    kl_windows: int | None = None,
    batch_size: int = 1,
    progress: ProgressCallback = ignore,
) -> Quality:
    """Measure perplexity over ``windows`` and, given ``base``, the divergence from it, in one pass.

    Args:
        model: causal model, or a function from ids (B, T) to logits (B, T, vocabulary). Put in eval mode meanwhile.
        windows: tokens and the positions that count.
        base: the model to compare with; a :class:`BaseLogits` when several models are compared with the same one.
        kl_windows: compare with the base on the first so many windows only; None for all.
        batch_size: windows per forward; the logits of a batch are held at once.
        progress: receives stage ``"evaluate"`` after every batch.

    Raises:
        CalibrationError: for non-finite logits, naming the window; for logits that do not fit the ids or the base's.
    """
    compared = 0 if base is None else len(windows) if kl_windows is None else min(kl_windows, len(windows))
    if base is not None and compared < 1:
        raise CalibrationError(f"kl_windows={kl_windows}: want at least 1 window to compare with the base")
    alone: list[_Tokens] = []
    beside: list[_Tokens] = []
    with evaluation_mode(model, base):
        for start, stop in _batches(len(windows), compared, batch_size):
            ids, scored = windows.ids[start:stop], windows.scored[start:stop]
            q = _logits(model, ids, "model")
            p = _logits(base, ids, "base") if base is not None and start < compared else None
            (alone if p is None else beside).append(_score_batch(q, p, ids, scored, start))
            progress(Progress("evaluate", stop, len(windows)))
    return _summarise(alone, beside)


_Tokens = tuple[NDArray[np.int64], NDArray[np.float64]]
"""Window number of each scored token (n,), and its values (2 or 6, n) as :func:`_score_rows` gives them."""


def _batches(windows: int, compared: int, batch_size: int) -> list[tuple[int, int]]:
    """Split windows into batches that never straddle the end of the compared ones."""
    if batch_size < 1:
        raise CalibrationError(f"batch_size={batch_size}: want at least 1")
    edges = sorted({*range(0, compared, batch_size), *range(compared, windows, batch_size), windows})
    return list(itertools.pairwise(edges))


def _logits(model: nn.Module | LogitsFunction, ids: Tensor, who: str) -> Tensor:
    logits = run_model(model, ids)
    if logits.ndim != 3 or logits.shape[:2] != ids.shape:
        raise CalibrationError(f"{who}: logits {tuple(logits.shape)} for ids {tuple(ids.shape)}; want (B, T, vocabulary)")
    return logits


def _score_batch(q: Tensor, p: Tensor | None, ids: Tensor, scored: Tensor, first: int) -> _Tokens:
    """Score one batch whose first window has number ``first``."""
    if p is not None and p.shape != q.shape:
        raise CalibrationError(f"the model predicts {q.shape[-1]} tokens, the base {p.shape[-1]}; they need one vocabulary")
    window, position = scored.nonzero(as_tuple=True)
    targets, rows = ids[window, position], window * ids.shape[1] + position - 1
    if len(targets) and int(targets.max()) >= q.shape[-1]:
        raise CalibrationError(f"token {int(targets.max())} of the text is outside the model's vocabulary of {q.shape[-1]}")
    dtype = torch.promote_types(q.dtype if p is None else torch.promote_types(q.dtype, p.dtype), torch.float32)
    step = max(1, TILE // q.shape[-1])
    scratch = [torch.empty(step, q.shape[-1], dtype=dtype, device=q.device) for _ in range(1 if p is None else 3)]
    parts = []
    for at in range(0, len(rows), step):
        part, target = rows[at : at + step], targets[at : at + step].to(q.device)
        base_rows = None if p is None else _rows(p, part, dtype).to(q.device)
        values = _score_rows(_rows(q, part, dtype), base_rows, target, [tile[: len(part)] for tile in scratch]).cpu()
        if not bool(values.isfinite().all()):
            bad = at + int((~values.isfinite()).any(0).nonzero()[0])
            where = f"window {first + int(window[bad])}, position {int(position[bad]) - 1}"
            who = "the model" if p is None else "the model or its base"
            raise CalibrationError(f"{where}: logits of {who} are not finite; look for overflow in its dtype, or broken scales")
        parts.append(values)
    values = torch.cat(parts, 1) if parts else torch.zeros(2 if p is None else 6, 0, dtype=torch.float64)
    return (first + window).numpy(), values.numpy()


def _rows(logits: Tensor, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Return rows (a rising index) of (B, T, V) logits as (rows, V) in ``dtype``; a view where they are adjacent and fit."""
    flat = logits.flatten(0, 1)
    start, stop = int(rows[0]), int(rows[-1]) + 1
    picked = flat[start:stop] if stop - start == len(rows) else flat[rows.to(flat.device)]
    return picked.to(dtype)


def _score_rows(q: Tensor, p: Tensor | None, target: Tensor, scratch: list[Tensor]) -> Tensor:
    """Return float64 (2, rows): nll and hit; with base logits ``p`` (6, rows): also KL, the base's nll and hit, agreement.

    ``q`` and ``p`` (rows, V) are not written to; ``scratch`` are tiles of their shape, one, or three with ``p``.
    A logit that is not finite makes the row's nll or KL not finite.
    """
    b = scratch[0]
    best_q, chosen_q = _shift(q, target, b)
    if p is None:
        poison = b.sum(-1).double() * 0  # -inf, which exp would hide, becomes nan
        nll = b.exp_().sum(-1).double().log() - chosen_q + poison
        return torch.stack([nll, (best_q == target).double()])
    a, difference = scratch[1:]
    best_p, chosen_p = _shift(p, target, a)
    torch.sub(a, b, out=difference)
    log_q = b.exp_().sum(-1).double().log()
    sum_p = a.exp_().sum(-1).double()
    log_p = sum_p.log()
    kl = difference.mul_(a).sum(-1).double() / sum_p + log_q - log_p
    hits = [(best_q == target).double(), (best_p == target).double(), (best_q == best_p).double()]
    return torch.stack([log_q - chosen_q, hits[0], kl, log_p - chosen_p, hits[1], hits[2]])


def _shift(logits: Tensor, target: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
    """Write logits minus their row's maximum to ``out``; return the argmax and the target's shifted logit (float64)."""
    top, best = logits.max(-1, keepdim=True)
    torch.sub(logits, top, out=out)
    return best.squeeze(-1), out.gather(-1, target[:, None]).squeeze(-1).double()


def _join(parts: list[_Tokens], values: int) -> _Tokens:
    windows = [window for window, _ in parts] or [np.zeros(0, np.int64)]
    return np.concatenate(windows), np.concatenate([v[:values] for _, v in parts] or [np.zeros((values, 0))], 1)


def _summarise(alone: list[_Tokens], beside: list[_Tokens]) -> Quality:
    window, (nll, hit) = _join(beside + alone, 2)
    mean, se = clustered_mean(nll, window)
    return Quality(
        tokens=len(nll),
        windows=len(np.unique(window)),
        nll=mean,
        nll_se=se,
        perplexity=perplexity(mean),
        perplexity_se=None if se is None else perplexity(mean) * se,
        top1=float(hit.mean()),
        divergence=_divergence(*_join(beside, 6)) if beside else None,
    )


def _divergence(window: NDArray[np.int64], values: NDArray[np.float64]) -> Divergence:
    nll, hit, kl, base_nll, base_hit, same = values
    if not len(kl):
        raise CalibrationError("no token is scored in the windows that are compared with the base; raise kl_windows")
    mean, se = clustered_mean(kl, window)
    increase, increase_se = clustered_mean(nll - base_nll, window)
    return Divergence(
        tokens=len(kl),
        windows=len(np.unique(window)),
        mean=mean,
        mean_se=se,
        median=float(np.median(kl)),
        p99=float(np.quantile(kl, 0.99)),
        max=float(kl.max()),
        quantiles=tuple(zip(QUANTILES, np.quantile(kl, QUANTILES).tolist(), strict=True)),
        same_top1=float(same.mean()),
        right_to_wrong=int(((base_hit == 1) & (hit == 0)).sum()),
        wrong_to_right=int(((base_hit == 0) & (hit == 1)).sum()),
        base_nll=float(base_nll.mean()),
        base_perplexity=perplexity(float(base_nll.mean())),
        nll_increase=increase,
        nll_increase_se=increase_se,
    )


def perplexity(nll: float) -> float:
    """Return exp(nll), or the largest float where that overflows (a model that is pure noise stays reportable)."""
    return float(np.exp(min(nll, 709.0)))


def clustered_mean(values: NDArray[np.float64], cluster: NDArray[np.int64]) -> tuple[float, float | None]:
    """Return the mean of ``values`` and its standard error when values of one cluster may be correlated.

    The error is that of a ratio of sums over clusters (equation in the module docstring); None for a single cluster.
    """
    mean = float(values.mean())
    _, index = np.unique(cluster, return_inverse=True)
    residuals = np.bincount(index, weights=values - mean)
    count = len(residuals)
    if count < 2:
        return mean, None
    return mean, float(np.sqrt(count / (count - 1) * (residuals**2).sum()) / len(values))
