"""A step between its planning and the delivery of its tokens."""

from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from quantkit.engine.backend import Backend, LaunchedStep, SamplingBackend
from quantkit.engine.request import Request
from quantkit.engine.scheduler import Sequence, Step
from quantkit.engine.select_tokens import TokenRequest, choose_tokens, logprobs_of, row_samplings

SCORED_ROWS = 64
"""Rows of a prompt that are compared with its tokens at a time; each needs a few vectors of the vocabulary's length."""


class ScoredRow(NamedTuple):
    """A row of logits inside a prompt, which is compared with the token that follows.

    Attributes:
        row: number of the row in the step.
        request: the request.
        position: position of the token that follows.
    """

    row: int
    request: Request
    position: int


@dataclass(slots=True)
class PendingStep:
    """A step that is planned, and then launched.

    Attributes:
        plan: the tokens that run.
        rows: the request of every row of logits after which a token is chosen.
        drafting_s: seconds spent on its drafts.
        scored: the other rows of logits.
        chosen_rows: numbers of the rows that ``rows`` stands for; None if these are all.
        launched: its logits, or the asynchronous step of a :class:`SamplingBackend`; None before the launch.
        started_s: time of the launch.
    """

    plan: Step
    rows: list[TokenRequest]
    drafting_s: float
    scored: list[ScoredRow] = field(default_factory=list)
    chosen_rows: list[int] | None = None
    launched: Tensor | LaunchedStep | None = None
    started_s: float = 0.0

    @classmethod
    def of(cls, plan: Step, requests: dict[Sequence, Request], drafting_s: float) -> "PendingStep":
        """Return the step that carries out a plan."""
        rows, scored, chosen, index = list[TokenRequest](), list[ScoredRow](), list[int](), 0
        for span, sequence in zip(plan.spans, plan.sequences, strict=True):
            request, start = requests[sequence], span.start + len(span.ids) - span.num_logits
            scored += (ScoredRow(index + i, request, start + i + 1) for i in range(span.scored))
            rows += (TokenRequest(request, offset) for offset in range(span.choices))
            chosen += range(index + span.scored, index + span.num_logits)
            index += span.num_logits
        return cls(plan, rows, drafting_s, scored, chosen if scored else None)

    def launch(self, backend: Backend, sampling: SamplingBackend | None) -> None:
        """Start the step, with sampling on the device where that is possible."""
        samplings = None if self.scored else row_samplings(self.rows)
        if sampling is not None and samplings:
            self.launched = sampling.launch(self.plan.spans, self.plan.copies, samplings)
        else:
            self.launched = backend.step(self.plan.spans, self.plan.copies)

    def outcome(self) -> tuple[list[int], Tensor | None]:
        """Wait for the step; return the token of each of ``rows``, and their logits if a request asked for log probabilities.

        The log probabilities of prompts are added to their requests.
        """
        assert self.launched is not None
        if isinstance(self.launched, Tensor):
            logits = self.launched
            for first in range(0, len(self.scored), SCORED_ROWS):
                self._score(self.scored[first : first + SCORED_ROWS], logits)
            logits = logits if self.chosen_rows is None else logits[self.chosen_rows]
            return choose_tokens(self.rows, logits), logits
        asked = any(row.request.logprobs is not None for row in self.rows)
        return self.launched.tokens(), self.launched.logits() if asked else None

    @staticmethod
    def _score(scored: list[ScoredRow], logits: Tensor) -> None:
        following = [row.request.sequence.ids[row.position] for row in scored]
        found = logprobs_of([TokenRequest(row.request, 0) for row in scored], logits[[row.row for row in scored]], following)
        for number, row in enumerate(scored):
            known = row.request.prompt_logprob
            if len(known) == row.position - 1 and row.position < len(row.request.prompt):  # else computed again
                known.append(found[number])
