"""Guess with a smaller model of the same vocabulary, a token at a time, for all sequences at once.

The small model reads what the sequence has gained since it was last asked, then writes ``count`` tokens, each chosen as the
engine would choose it: greedily, or with the same noise under the same sampling (see the package's docstring). Its memory is a
row of pages for every slot; what it wrote of its own guesses stays if they were right and is overwritten if not.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from quantkit.engine.backend import Backend, Memory, Span
from quantkit.engine.drafters.base import DRAFTERS, Ask, choose_drafts
from quantkit.errors import QuantkitError


@dataclass(slots=True)
class _Slot:
    """What the small model has read in one slot, and for whom."""

    owner: int | None = None
    ids: list[int] = field(default_factory=list)


@DRAFTERS.register("model")
class ModelDrafter:
    """A smaller model.

    Args:
        backend: the small model; this object reserves its memory.
        slots: sequences that run at once in the engine.
        context_tokens: longest sequence.
        step_tokens: tokens it reads per step.
        vocabulary: how many ids it knows, and how many the target; None: the same. Models of one family pad theirs differently.

    Raises:
        QuantkitError: a backend that cannot step a position twice.
    """

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
            raise QuantkitError(f"the drafter's model cannot go back to an earlier token: {backend.notice}")
        self._backend, self._step_tokens = backend, step_tokens
        self._known, self._wanted = vocabulary or (0, 0)
        self._context = min(context_tokens, backend.context_tokens or context_tokens)
        self._pages = -(-self._context // self.PAGE_TOKENS)
        self._slots = [_Slot() for _ in range(slots)]
        backend.reserve(Memory(self._pages * slots, self.PAGE_TOKENS, slots))

    @torch.inference_mode()
    def propose(self, asks: Sequence[Ask]) -> list[list[int]]:
        """See :class:`~quantkit.engine.drafters.base.Drafter`."""
        able = [ask for ask in asks if len(ask.ids) < self._context and self._knows(ask.ids)]
        written: dict[int, list[int]] = {ask.number: [] for ask in asks}
        active = able
        for i in range(max((ask.count for ask in able), default=0)):
            active = [ask for ask in active if i < ask.count and len(ask.ids) + i < self._context]
            if not active:
                break
            for ask, token in zip(active, self._next(active, written), strict=True):
                if token is not None:
                    written[ask.number].append(token)
            active = [ask for ask in active if len(written[ask.number]) == i + 1]
        return [written[ask.number] for ask in asks]

    def forget(self, number: int) -> None:
        """See :class:`~quantkit.engine.drafters.base.Drafter`."""
        for slot in self._slots:
            if slot.owner == number:
                slot.owner, slot.ids = None, []

    def _next(self, asks: Sequence[Ask], written: dict[int, list[int]]) -> list[int | None]:
        """Read what is new and choose one more token for each ask; None where the small model has no usable logits."""
        spans = [self._span(ask, [*ask.ids, *written[ask.number]]) for ask in asks]
        logits = self._read(spans)
        if self._wanted and logits.shape[-1] != self._wanted:  # the target's noise is of this length
            missing = max(self._wanted - logits.shape[-1], 0)
            logits = F.pad(logits[:, : self._wanted], (0, missing), value=-math.inf)
        return choose_drafts(asks, written, logits)

    def _knows(self, ids: Sequence[int]) -> bool:
        return self._known >= self._wanted or max(ids) < self._known

    def _span(self, ask: Ask, ids: list[int]) -> Span:
        slot = self._slots[ask.slot]
        fresh = slot.owner != ask.number
        if fresh:
            slot.owner, slot.ids = ask.number, []
        known = min(len(slot.ids), len(ids) - 1)
        while slot.ids[:known] != ids[:known]:  # wrong guesses are at the end
            known -= 1
        slot.ids = ids
        first = ask.slot * self._pages
        return Span(ask.slot, known, ids[known:], range(first, first + self._pages), 1, fresh)

    def _read(self, spans: list[Span]) -> Tensor:
        """Step ``spans``, long ones in chunks before, and return the logits after each."""
        last = []
        for span in spans:
            start, ids, fresh = span.start, list(span.ids), span.fresh
            while len(ids) > self._step_tokens:
                self._backend.step([Span(span.slot, start, ids[: self._step_tokens], span.table, 0, fresh)])
                start, ids, fresh = start + self._step_tokens, ids[self._step_tokens :], False
            last.append(Span(span.slot, start, ids, span.table, 1, fresh))
        return self._backend.step(last)
