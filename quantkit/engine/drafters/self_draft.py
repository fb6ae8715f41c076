"""Draft with half of the model's own weights: 8-bit codes are stored as two planes of 4 bits, of which drafts read one.

A code is ``c = 16 h + l``. The model multiplies with ``(16 h + l - zero_point) * scale``; a draft multiplies with ``(16 h + 8 -
zero_point) * scale``, which needs half of the bytes, and decoding is limited by the bytes read from memory. No second model is
stored: the planes replace the codes (:func:`quantkit.kernels.cpu.layout.split`), and products with both planes are bit for bit
the same as before.

Drafts read the target's own keys and values of all accepted tokens. Their own keys and values are written beyond the accepted
tokens, to the positions that the verification then overwrites with the exact ones.
"""

from collections.abc import Sequence
from typing import ClassVar

import torch

from quantkit.engine.backend import Backend, SelfDraftingBackend, Span
from quantkit.engine.drafters.base import DRAFTERS, DrafterContext, DraftRequest, choose_drafts
from quantkit.errors import QuantkitError


@DRAFTERS.register("self")
class SelfDrafter:
    """Draft with the high planes of the target's own weights.

    Args:
        backend: the target; its 8-bit weights are split into planes, in place.

    Raises:
        QuantkitError: the backend cannot run drafts, or the model has no 8-bit weights.
    """

    needs_model: ClassVar[bool] = False
    shares_memory = True

    def __init__(self, backend: Backend) -> None:
        if not isinstance(backend, SelfDraftingBackend):
            raise QuantkitError(
                f"drafter='self' needs the native CPU engine, and this model runs on {backend.engine}; "
                "use drafter='ngram' or a smaller model"
            )
        if not backend.prepare_drafts():
            raise QuantkitError(
                "drafter='self' needs 8-bit integer weights, and the model has none; quantize it to w8a16, or use "
                "drafter='ngram' or a smaller model"
            )
        self._backend: SelfDraftingBackend = backend

    @classmethod
    def make(cls, context: DrafterContext) -> "SelfDrafter":
        """Return a drafter for the target's backend."""
        return cls(context.backend)

    @torch.inference_mode()
    def propose(self, requests: Sequence[DraftRequest]) -> list[list[int]]:
        """See :class:`~quantkit.engine.drafters.base.Drafter`."""
        written: dict[int, list[int]] = {request.number: [] for request in requests}
        greedy = all(request.sampling.greedy and not request.sampling.changes_logits for request in requests)
        active = list(requests)
        while active:
            spans = [self._span(request, written[request.number]) for request in active]
            found = self._backend.draft(spans, argmax=greedy)
            tokens = found.tolist() if greedy else choose_drafts(active, written, found)
            for request, token in zip(active, tokens, strict=True):
                if token is not None and token >= 0:
                    written[request.number].append(token)
            length = max(map(len, written.values()))
            active = [request for request in active if len(written[request.number]) == length < request.count]
        return [written[request.number] for request in requests]

    def forget(self, number: int) -> None:
        """See :class:`~quantkit.engine.drafters.base.Drafter`. No state is kept."""

    @staticmethod
    def _span(request: DraftRequest, written: list[int]) -> Span:
        start = len(request.ids) - 1 + len(written)
        return Span(request.slot, start, [written[-1] if written else request.ids[-1]], request.table, 1)
