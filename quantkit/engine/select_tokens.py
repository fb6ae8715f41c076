"""Choosing the token after each row of logits on the host, where the backend does not sample by itself."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from quantkit.engine.backend import RowSampling
from quantkit.engine.constraint import forbid
from quantkit.engine.request import Logprob, Request
from quantkit.engine.sampling import History, draw, penalize


class TokenRequest(NamedTuple):
    """The request that one row of logits belongs to.

    Attributes:
        request: the request.
        offset: number of draft tokens between the newest token of the answer and this row: the row predicts token
            ``request.answered + offset`` of the answer, counted from 0.
    """

    request: Request
    offset: int

    @property
    def delays_stop_tokens(self) -> bool:
        """Whether stop tokens must not be chosen yet, because of ``min_new_tokens``."""
        return self.request.answered + self.offset < self.request.min_new_tokens

    @property
    def row_sampling(self) -> RowSampling | None:
        """How a backend would sample this row; None if the logits must be changed on the host first."""
        sampling = self.request.sampling
        on_host = self.delays_stop_tokens or sampling.changes_logits or self.request.constraint is not None
        return None if on_host else RowSampling(sampling, self.request.seed)


def row_samplings(rows: Sequence[TokenRequest]) -> list[RowSampling] | None:
    """Return how a backend samples all rows, or None if it cannot sample one of them."""
    found = [sampling for row in rows if (sampling := row.row_sampling)]
    return found if len(found) == len(rows) else None


@torch.inference_mode()
def choose_tokens(rows: Sequence[TokenRequest], logits: Tensor) -> list[int]:
    """Choose a token for each row of ``logits``.

    Args:
        rows: the request of each row.
        logits: floating (R, V).

    Returns:
        R token ids; -1 for a row whose largest logit is NaN or infinite.
    """
    if not rows:
        return []
    delayed = [
        (index, token)
        for index, row in enumerate(rows)
        if row.delays_stop_tokens
        for token in row.request.stop_tokens
        if 0 <= token < logits.shape[-1]
    ]
    if delayed:
        logits = logits.clone()
        logits[[index for index, _ in delayed], [token for _, token in delayed]] = float("-inf")
    histories = [
        History([*request.sequence.ids, *request.sequence.drafts[:offset]] if request.sampling.remembers else (), prompt)
        for request, offset in rows
        for prompt in (len(request.prompt),)
    ]
    samplings = [request.sampling for request, _ in rows]
    return draw(
        _constrain(rows, penalize(logits, samplings, histories)),
        samplings,
        [request.seed for request, _ in rows],
        [len(request.sequence.ids) + offset - 1 for request, offset in rows],
    )


def _constrain(rows: Sequence[TokenRequest], logits: Tensor) -> Tensor:
    """Set the logits of tokens that a request's constraint forbids to -inf."""
    places: dict[Request, list[int]] = {}
    for index, (request, _) in enumerate(rows):
        if request.constraint is not None:
            places.setdefault(request, []).append(index)
    if not places:
        return logits
    bits = []
    for request, indices in places.items():
        assert request.constraint is not None
        bits.append(request.constraint.allowed(request.sequence.drafts[: len(indices) - 1]))
    where = [index for indices in places.values() for index in indices]
    logits = logits.clone()
    logits[where] = forbid(logits[where], np.concatenate(bits))
    return logits


def logprobs_of(rows: Sequence[TokenRequest], logits: Tensor, chosen: Sequence[int]) -> dict[int, Logprob]:
    """Return log probabilities under the model's own distribution, for the rows whose request asked for them.

    Args:
        rows: the request of each row.
        logits: floating (R, V).
        chosen: the token chosen in each row; -1 for none.

    Returns:
        Row index to log probabilities.
    """
    counts = [row.request.logprobs for row in rows]
    selected = [i for i, count in enumerate(counts) if count is not None and chosen[i] >= 0]
    if not selected:
        return {}
    logs = logits[selected].float().log_softmax(-1)
    most = min(max(counts[i] or 0 for i in selected), logs.shape[-1])
    top = torch.topk(logs, most, dim=-1)
    values, ids = top.values.tolist(), top.indices.tolist()
    of_chosen = logs.gather(-1, torch.tensor([[chosen[i]] for i in selected], device=logs.device))[:, 0].tolist()
    return {i: Logprob(of_chosen[n], list(zip(ids[n], values[n], strict=True))[: counts[i]]) for n, i in enumerate(selected)}
