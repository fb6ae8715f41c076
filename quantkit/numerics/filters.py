"""Which tokens may be drawn: filters on logits, of which each keeps at least the most likely token.

Pure functions on (..., V); rows never look at each other, and each may have a parameter of its own, (..., 1). Papers: top-k,
Fan et al. 2018 (arXiv 1805.04833); top-p, Holtzman et al. 2020 (arXiv 1904.09751); min-p, Nguyen et al. 2024 (arXiv
2407.01082).
"""

import math

import torch
from torch import Tensor


def keep_top_k(logits: Tensor, k: int | Tensor) -> Tensor:
    """Set logits below the k-th largest to -inf. Ties with the k-th stay, so more than k tokens can remain."""
    ranks = torch.as_tensor(k, device=logits.device).clamp(max=logits.shape[-1])
    ordered = logits.topk(int(ranks.max()), dim=-1).values
    threshold = ordered.gather(-1, (ranks - 1).expand(*logits.shape[:-1], 1))
    return logits.masked_fill(logits < threshold, -math.inf)


def keep_top_p(logits: Tensor, p: float | Tensor, *, stable: bool = False) -> Tensor:
    """Keep the smallest set of most likely tokens whose probabilities sum to at least ``p``; set the rest to -inf.

    Computed from the unlikely end: a token goes when it and all less likely ones together have probability <= 1 - p.
    Of equals at the edge some may go and some stay: with ``stable`` those with lower indices go, else it is up to the sort.
    """
    ascending, order = logits.sort(dim=-1, stable=stable)
    rest = 1 - p
    goes = ascending.softmax(-1).cumsum(-1) <= (rest.to(logits.dtype) if isinstance(rest, Tensor) else rest)
    goes[..., -1] = False
    return logits.masked_fill(goes.scatter(-1, order, goes), -math.inf)


def keep_min_p(logits: Tensor, min_p: float | Tensor) -> Tensor:
    """Set the logits of tokens less likely than ``min_p`` times the most likely token to -inf."""
    probabilities = logits.softmax(-1)
    largest = probabilities.amax(-1, keepdim=True)
    return logits.masked_fill((probabilities < min_p * largest) & (probabilities < largest), -math.inf)
