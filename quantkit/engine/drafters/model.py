"""Draft with a smaller model of the same vocabulary, one token at a time, for all sequences together.

The draft model reads the tokens that a sequence has gained since its last request, and then generates ``count`` tokens, each
chosen as the engine would choose it: greedily, or with the same parameters and noise (see the package's docstring). Its
key/value memory has a fixed row of pages for every slot. Keys and values of accepted drafts are kept; others are overwritten.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from quantkit.engine.backend import Backend, Memory, Span
from quantkit.engine.drafters.base import DRAFTERS, MODEL_DRAFTER, DrafterContext, DraftRequest, choose_drafts
from quantkit.errors import QuantkitError


@dataclass(slots=True)
class _Slot:
    """The tokens that the draft model has read in one slot, and the number of their sequence."""

    number: int | None = None
    ids: list[int] = field(default_factory=list)


@DRAFTERS.register(MODEL_DRAFTER)
class ModelDrafter:
    """Draft with a smaller model.

    Args:
        backend: the draft model; its key/value memory is allocated here.
        slots: sequences that run at the same time in the engine.
        context_tokens: longest sequence.
        step_tokens: tokens that the draft model reads per step.
        vocabulary: number of token ids of the draft model and of the target; None if they are equal. Models of one family
            often pad their vocabularies differently.

    Raises:
        QuantkitError: a backend that cannot run a position twice.
    """

    needs_model: ClassVar[bool] = True
    shares_memory = False
    PAGE_TOKENS = 32

    def __init__(
        self,
        backend: Backend,
        slots: int,
        context_tokens: int,
        step_tokens: int = 512,
        vocabulary: tuple[int, int] | None = None,
    ) -> None:
        if not backend.rewinds:
            why = backend.notice or "it has a state that is that of the last token"
            raise QuantkitError(f"the draft model cannot go back to an earlier token: {why}")
        self._backend, self._step_tokens = backend, step_tokens
        self._own_vocabulary, self._target_vocabulary = vocabulary or (0, 0)
        self._context = min(context_tokens, backend.context_tokens or context_tokens)
        self._pages = -(-self._context // self.PAGE_TOKENS)
        self._slots = [_Slot() for _ in range(slots)]
        backend.reserve(Memory(self._pages * slots, self.PAGE_TOKENS, slots))

    @classmethod
    def make(cls, context: DrafterContext) -> "ModelDrafter":
        """Return a drafter that runs ``context.draft_model``."""
        model, longest = context.draft_model, context.limits.context_tokens
        assert model is not None
        assert longest is not None
        return cls(model.backend, context.limits.running, longest, vocabulary=(model.vocabulary, context.vocabulary))

    @torch.inference_mode()
    def propose(self, requests: Sequence[DraftRequest]) -> list[list[int]]:
        """See :class:`~quantkit.engine.drafters.base.Drafter`."""
        able = [request for request in requests if len(request.ids) < self._context and self._knows(request.ids)]
        written: dict[int, list[int]] = {request.number: [] for request in requests}
        active = able
        for i in range(max((request.count for request in able), default=0)):
            active = [request for request in active if i < request.count and len(request.ids) + i < self._context]
            if not active:
                break
            for request, token in zip(active, self._next(active, written), strict=True):
                if token is not None:
                    written[request.number].append(token)
            active = [request for request in active if len(written[request.number]) == i + 1]
        return [written[request.number] for request in requests]

    def forget(self, number: int) -> None:
        """See :class:`~quantkit.engine.drafters.base.Drafter`."""
        for slot in self._slots:
            if slot.number == number:
                slot.number, slot.ids = None, []

    def _next(self, requests: Sequence[DraftRequest], written: dict[int, list[int]]) -> list[int | None]:
        """Read the new tokens and choose one more draft per request; None where the logits cannot be used."""
        spans = [self._span(request, [*request.ids, *written[request.number]]) for request in requests]
        logits = self._read(spans)
        target = self._target_vocabulary
        if target and logits.shape[-1] != target:  # the noise of the target has this length
            logits = F.pad(logits[:, :target], (0, max(target - logits.shape[-1], 0)), value=-math.inf)
        return choose_drafts(requests, written, logits)

    def _knows(self, ids: Sequence[int]) -> bool:
        return self._own_vocabulary >= self._target_vocabulary or max(ids) < self._own_vocabulary

    def _span(self, request: DraftRequest, ids: list[int]) -> Span:
        slot = self._slots[request.slot]
        fresh = slot.number != request.number
        if fresh:
            slot.number, slot.ids = request.number, []
        known = min(len(slot.ids), len(ids) - 1)
        while slot.ids[:known] != ids[:known]:  # rejected drafts are at the end
            known -= 1
        slot.ids = ids
        first = request.slot * self._pages
        return Span(request.slot, known, ids[known:], range(first, first + self._pages), 1, fresh)

    def _read(self, spans: list[Span]) -> Tensor:
        """Run ``spans``, splitting long ones into chunks, and return the logits after each span."""
        last = []
        for span in spans:
            start, ids, fresh = span.start, list(span.ids), span.fresh
            while len(ids) > self._step_tokens:
                self._backend.step([Span(span.slot, start, ids[: self._step_tokens], span.table, 0, fresh)])
                start, ids, fresh = start + self._step_tokens, ids[self._step_tokens :], False
            last.append(Span(span.slot, start, ids, span.table, 1, fresh))
        return self._backend.step(last)
