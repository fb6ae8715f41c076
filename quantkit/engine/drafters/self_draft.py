"""Guess with the model's own upper half: an int8 weight is two planes of 4 bits, and a draft reads only the high one.

A code is ``c = 16 h + l``; the model multiplies with ``(16 h + l - zero_point) * scale``, its *twin* with ``(16 h + 8 -
zero_point) * scale``, for which half of the bytes have to come from memory, and bytes are what decoding waits for. No second
model is stored: the planes replace the codes (:func:`quantkit.kernels.cpu.layout.split`), and products of both together are
what they were, to the last bit.

The twin reads the keys and values of the target itself for everything that is settled. Those of its own guesses it writes
where the verification will write the true ones a moment later, past the end of what anybody relies on.
"""

from collections.abc import Sequence

import torch

from quantkit.engine.backend import Backend, Span
from quantkit.engine.drafters.base import DRAFTERS, Ask, choose_drafts
from quantkit.engine.native import NativeBackend
from quantkit.errors import QuantkitError


@DRAFTERS.register("self")
class SelfDrafter:
    """The high planes of the target's own weights.

    Args:
        backend: the target; its 8-bit weights are put into planes, in place.

    Raises:
        QuantkitError: the model does not run natively, or has no 8-bit weights.
    """

    shares_memory = True

    def __init__(self, backend: Backend) -> None:
        if not isinstance(backend, NativeBackend):
            raise QuantkitError(
                f"drafter='twin' reads half of the native engine's weights; this model is run by {backend.engine}; "
                "take drafter='ngram', or a smaller model"
            )
        if not backend.decoder.split_planes():
            raise QuantkitError(
                f"drafter='twin' reads half of 8-bit weights, and {backend.decoder.program.name} has none; quantize it to "
                "w8a16, or take drafter='ngram'"
            )
        self._backend = backend

    @torch.inference_mode()
    def propose(self, asks: Sequence[Ask]) -> list[list[int]]:
        """See :class:`~quantkit.engine.drafters.base.Drafter`."""
        written: dict[int, list[int]] = {ask.number: [] for ask in asks}
        greedy = all(ask.sampling.greedy and ask.sampling.repetition_penalty == 1 for ask in asks)
        active = list(asks)
        while active:
            spans = [self._span(ask, written[ask.number]) for ask in active]
            found = self._backend.draft(spans, argmax=greedy)
            tokens = found.tolist() if greedy else choose_drafts(active, written, found)
            for ask, token in zip(active, tokens, strict=True):
                if token is not None and token >= 0:
                    written[ask.number].append(token)
            length = max(map(len, written.values()))
            active = [ask for ask in active if len(written[ask.number]) == length < ask.count]
        return [written[ask.number] for ask in asks]

    def forget(self, number: int) -> None:
        """See :class:`~quantkit.engine.drafters.base.Drafter`; nothing is remembered."""

    @staticmethod
    def _span(ask: Ask, written: list[int]) -> Span:
        start = len(ask.ids) - 1 + len(written)
        return Span(ask.slot, start, [written[-1] if written else ask.ids[-1]], ask.table, 1)
