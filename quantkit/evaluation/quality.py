"""Measure the perplexity of a model and its divergence from a base model, in one streaming pass.

For a scored token y with logits q of the model and p of the base, P = softmax(p), Q = softmax(q):

    nll  = log sum exp(q) - q[y]                         nats; perplexity = exp(mean nll)
    KL   = sum_v P_v (log P_v - log Q_v)                 nats; 0 if and only if the two distributions are equal

KL is computed as ``sum_v e_v (a_v - b_v) / S_p + log S_q - log S_p`` from logits minus their maximum (a = p - max p, b = q -
max q, e = exp a, S = sum of exponentials), with sums in float32 and logarithms in float64. Equal logits give exactly 0;
rounding contributes about 1e-7 per token, far below the 1e-3 of an 8-bit model.

Standard errors. Tokens of one window are not independent, so errors are computed over windows: with sums s_w over the n_w
tokens of each window and the mean m, ``se = sqrt(W / (W - 1) * sum_w (s_w - m n_w)^2) / sum_w n_w``. The error of the
perplexity is ``ppl * se(nll)`` (delta method). The difference between two models on the same tokens is known much better than
either value; ``nll_increase_se`` is its paired error.

Intervals. Errors of a mean say little where few windows are scored and their losses are skewed, as KL is. So 95 % intervals
come from a bootstrap over windows: 2000 times, as many windows are drawn with repetition, and the mean is taken (Efron 1979,
doi 10.1214/aos/1176344552; percentile method). The draws are the same every time.

Memory: the logits of one batch per model, about 30 bytes per scored token, and three temporary tiles of 16 MiB. Most of the
time is spent in the models' forward passes; the statistics take less than a tenth of it for a vocabulary of 49152.
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
"""Logits that are processed at a time. Smaller tiles fit in the cache, but synchronize threads more often."""

QUANTILES = (0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 0.999)
"""Levels at which the quantiles of KL over tokens are kept."""


@dataclass(frozen=True, slots=True)
class Divergence:
    """Divergence of a model's predictions from a base model's, over the same tokens.

    Attributes:
        tokens, windows: number of compared tokens and windows.
        mean, mean_se, median, p99, max: KL(base || model) per token in nats; the standard error is None for one window.
        quantiles: (level, KL) pairs at :data:`QUANTILES`.
        same_top1: fraction of tokens for which both models have the same most likely token.
        right_to_wrong, wrong_to_right: tokens whose most likely prediction is correct for the base only, or for the model only.
        base_nll, base_perplexity: of the base on these tokens.
        nll_increase, nll_increase_se: mean of nll(model) - nll(base) in nats, and its paired standard error.
        interval: 95 % interval of the mean, by bootstrap over windows; None for one window, and in older reports.
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
    interval: tuple[float, float] | None = None


@dataclass(frozen=True, slots=True)
class Quality:
    """How well a model predicts a text.

    Attributes:
        tokens, windows: number of scored tokens and windows.
        nll, nll_se: mean negative log-likelihood per token in nats, and its standard error over windows (None for one window).
        perplexity, perplexity_se: exp(nll), and its standard error by the delta method.
        top1: fraction of tokens that are the model's most likely prediction.
        divergence: divergence from the base model, if one was given.
        perplexity_interval: 95 % interval of the perplexity, by bootstrap over windows; None for one window, and in older
            reports.
    """

    tokens: int
    windows: int
    nll: float
    nll_se: float | None
    perplexity: float
    perplexity_se: float | None
    top1: float
    divergence: Divergence | None = None
    perplexity_interval: tuple[float, float] | None = None


def score(
    model: nn.Module | LogitsFunction,
    windows: Windows,
    base: nn.Module | LogitsFunction | BaseLogits | None = None,
    *,
    kl_windows: int | None = None,
    batch_size: int = 1,
    progress: ProgressCallback = ignore,
) -> Quality:
    """Measure perplexity over ``windows`` and, if ``base`` is given, the divergence from it, in one pass.

    Args:
        model: a causal model, which is in eval mode meanwhile, or a function from ids (B, T) to logits (B, T, V).
        windows: token windows and the positions to score.
        base: the model to compare with; a :class:`BaseLogits` to share its logits between several calls.
        kl_windows: compare with the base on the first windows only, this many; None for all.
        batch_size: windows per forward pass, whose logits are in memory together.
        progress: receives the stage ``"evaluate"`` after every batch.

    Raises:
        CalibrationError: logits that are not finite (the message names the window), or whose shape does not fit.
    """
    compared = 0 if base is None else len(windows) if kl_windows is None else min(kl_windows, len(windows))
    if base is not None and compared < 1:
        raise CalibrationError(f"kl_windows={kl_windows}: want at least 1, or None to compare all windows")
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
"""Window number of each scored token (n,), and the values (2 or 6, n) that :func:`_score_rows` returns."""


def _batches(windows: int, compared: int, batch_size: int) -> list[tuple[int, int]]:
    """Split windows into batches that contain either compared windows or others, but not both."""
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
    """Return the values of one batch, whose first window has the number ``first``."""
    if p is not None and p.shape != q.shape:
        raise CalibrationError(f"the model has {q.shape[-1]} logits, the base {p.shape[-1]}; want equal vocabularies")
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
            raise CalibrationError(f"{where}: logits of {who} are not finite; look for overflow in its dtype, or wrong scales")
        parts.append(values)
    values = torch.cat(parts, 1) if parts else torch.zeros(2 if p is None else 6, 0, dtype=torch.float64)
    return (first + window).numpy(), values.numpy()


def _rows(logits: Tensor, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Return rows (ascending indices) of logits (B, T, V) as (rows, V) in ``dtype``, as a view if possible."""
    flat = logits.flatten(0, 1)
    start, stop = int(rows[0]), int(rows[-1]) + 1
    picked = flat[start:stop] if stop - start == len(rows) else flat[rows.to(flat.device)]
    return picked.to(dtype)


def _score_rows(q: Tensor, p: Tensor | None, target: Tensor, scratch: list[Tensor]) -> Tensor:
    """Return nll and top-1 hit of each row; with a base also KL, the base's nll and hit, and whether the top-1 tokens agree.

    Args:
        q: logits of the model (rows, V).
        p: logits of the base (rows, V), or None.
        target: int64 (rows,), the correct tokens.
        scratch: temporary tensors (rows, V): one, or three with ``p``.

    Returns:
        float64 (2, rows), or (6, rows) with ``p``; nll or KL of a row with a logit that is not finite are not finite.
    """
    b = scratch[0]
    best_q, chosen_q = _shift(q, target, b)
    if p is None:
        poison = b.sum(-1).double() * 0  # makes nll nan if a logit is -inf, which exp would hide
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
    """Write logits minus the maximum of their row to ``out``; return the argmax, and ``out`` at the target in float64."""
    top, best = logits.max(-1, keepdim=True)
    torch.sub(logits, top, out=out)
    return best.squeeze(-1), out.gather(-1, target[:, None]).squeeze(-1).double()


def _join(parts: list[_Tokens], values: int) -> _Tokens:
    windows = [window for window, _ in parts] or [np.zeros(0, np.int64)]
    return np.concatenate(windows), np.concatenate([v[:values] for _, v in parts] or [np.zeros((values, 0))], 1)


def _summarise(alone: list[_Tokens], beside: list[_Tokens]) -> Quality:
    window, (nll, hit) = _join(beside + alone, 2)
    mean, se = clustered_mean(nll, window)
    interval = bootstrap(nll, window)
    return Quality(
        tokens=len(nll),
        windows=len(np.unique(window)),
        nll=mean,
        nll_se=se,
        perplexity=perplexity(mean),
        perplexity_se=None if se is None else perplexity(mean) * se,
        top1=float(hit.mean()),
        divergence=_divergence(*_join(beside, 6)) if beside else None,
        perplexity_interval=None if interval is None else (perplexity(interval[0]), perplexity(interval[1])),
    )


def _divergence(window: NDArray[np.int64], values: NDArray[np.float64]) -> Divergence:
    nll, hit, kl, base_nll, base_hit, same = values
    if not len(kl):
        raise CalibrationError("no token is scored in the windows that are compared with the base; increase kl_windows")
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
        interval=bootstrap(kl, window),
    )


def perplexity(nll: float) -> float:
    """Return exp(nll), limited to the largest float, so that the report of a broken model can be written."""
    return float(np.exp(min(nll, 709.0)))


def clustered_mean(values: NDArray[np.float64], cluster: NDArray[np.int64]) -> tuple[float, float | None]:
    """Return the mean of ``values`` and its standard error if values of one cluster are correlated.

    Args:
        values: float64 (n,).
        cluster: int64 (n,), cluster of each value.

    Returns:
        The mean, and the error by the equation in the module's docstring; None for a single cluster.
    """
    mean = float(values.mean())
    _, index = np.unique(cluster, return_inverse=True)
    residuals = np.bincount(index, weights=values - mean)
    count = len(residuals)
    if count < 2:
        return mean, None
    return mean, float(np.sqrt(count / (count - 1) * (residuals**2).sum()) / len(values))


def bootstrap(values: NDArray[np.float64], cluster: NDArray[np.int64], *, draws: int = 2000) -> tuple[float, float] | None:
    """Return the 95 % interval of the mean of ``values``, drawing whole clusters with repetition.

    Args:
        values: float64 (n,).
        cluster: int64 (n,), cluster of each value.
        draws: number of draws.

    Returns:
        The 2.5th and the 97.5th percentile; None for a single cluster.
    """
    _, index = np.unique(cluster, return_inverse=True)
    sums, sizes = np.bincount(index, weights=values), np.bincount(index)
    if len(sums) < 2:
        return None
    drawn = np.random.default_rng(0).integers(0, len(sums), (draws, len(sums)))
    means = sums[drawn].sum(1) / sizes[drawn].sum(1)
    low, high = np.quantile(means, (0.025, 0.975)).tolist()
    return low, high
