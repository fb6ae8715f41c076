"""The tokens after the rows of a step: by the backend where it can, else here, from its logits."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from quantkit.engine.backend import Pick
from quantkit.engine.request import Logprob, Request
from quantkit.engine.sampling import choose


class Owner(NamedTuple):
    """Whose row it is, and how many tokens after the next one of its answer."""

    request: Request
    ahead: int

    @property
    def held_back(self) -> bool:
        """Whether stop tokens may not be chosen yet."""
        return self.request.answered + self.ahead < self.request.min_new_tokens

    @property
    def pick(self) -> Pick | None:
        """How a backend would choose; None where logits must be changed before."""
        sampling = self.request.sampling
        return None if self.held_back or sampling.repetition_penalty != 1 else Pick(sampling, self.request.seed)


def picks_of(owners: Sequence[Owner]) -> list[Pick] | None:
    """Return how a backend chooses for all rows; None if it cannot for one."""
    picks = [pick for owner in owners if (pick := owner.pick)]
    return picks if len(picks) == len(owners) else None


@torch.inference_mode()
def choose_tokens(owners: Sequence[Owner], logits: Tensor) -> list[int]:
    """Choose a token for each row (R, V); -1 where there is none to choose."""
    if not owners:
        return []
    stops = [
        (row, token)
        for row, owner in enumerate(owners)
        if owner.held_back
        for token in owner.request.stop_tokens
        if 0 <= token < logits.shape[-1]
    ]
    if stops:
        logits = logits.clone()
        logits[[row for row, _ in stops], [token for _, token in stops]] = float("-inf")
    texts = [
        [*request.sequence.ids, *request.sequence.drafts[:ahead]] if request.sampling.repetition_penalty != 1 else []
        for request, ahead in owners
    ]
    return choose(
        logits,
        [request.sampling for request, _ in owners],
        [request.seed for request, _ in owners],
        [len(request.sequence.ids) + ahead - 1 for request, ahead in owners],
        texts,
    )


def logprobs_of(owners: Sequence[Owner], logits: Tensor, chosen: Sequence[int]) -> dict[int, Logprob]:
    """Return the log probabilities of the rows that want them, under the model's own distribution."""
    wanted = [owner.request.logprobs for owner in owners]
    rows = [i for i, count in enumerate(wanted) if count is not None and chosen[i] >= 0]
    if not rows:
        return {}
    logs = logits[rows].float().log_softmax(-1)
    most = min(max(wanted[i] or 0 for i in rows), logs.shape[-1])
    top = torch.topk(logs, most, dim=-1)
    values, ids = top.values.tolist(), top.indices.tolist()
    of_chosen = logs.gather(-1, torch.tensor([[chosen[i]] for i in rows], device=logs.device))[:, 0].tolist()
    return {i: Logprob(of_chosen[n], list(zip(ids[n], values[n], strict=True))[: wanted[i]]) for n, i in enumerate(rows)}
