"""The CPU backend: run a decoder program (:mod:`quantkit.kernels.program`) with one native call per step."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from quantkit.engine.backend import Copy, Memory, Span
from quantkit.errors import QuantkitError
from quantkit.kernels.cpu.decoder import KV_DTYPES, PAGE_TOKENS, KvPages, NativeDecoder, Rows


class NativeBackend:
    """Run a program for many sequences, with keys and values in native pages.

    The logits of a row do not depend on the other rows of the step, bit for bit, so answers do not change with the batch, with
    drafts, or after a preemption. Several backends may share a decoder, as long as they run one after another.

    Args:
        decoder: the program, prepared for the CPU kernels; without LongRoPE, whose tables depend on the length of a sequence.
        kv: how keys and values are stored, a key of :data:`quantkit.kernels.cpu.decoder.KV_DTYPES`.
        exact: keep float activations; False rounds them to int8 in products with quantized weights.
        bfloat16: round activations to bfloat16 in products with other than float32 weights, where that is faster on this CPU.
        context_tokens: longest sequence that the model supports.

    Attributes:
        engine: name of the implementation, for reports.
    """

    notice = None
    device = torch.device("cpu")

    def __init__(
        self,
        decoder: NativeDecoder,
        *,
        kv: str = "float32",
        exact: bool = True,
        bfloat16: bool = False,
        context_tokens: int | None = None,
    ) -> None:
        self.decoder, self.exact, self.bfloat16, self.context_tokens = decoder, exact, bfloat16, context_tokens
        self.engine = "native" if exact else "native, int8 activations"
        # A state is that after the last token, and a page of keys and values alone does not bring back an earlier one.
        self.shares_pages = self.rewinds = not decoder.program.states
        self._dtype = kv
        self._kv: KvPages | None = None

    def reserve(self, memory: Memory) -> None:
        """Allocate the pages.

        Raises:
            QuantkitError: a page size other than the kernels'.
        """
        if memory.page_tokens != PAGE_TOKENS:
            raise QuantkitError(
                f"page_tokens={memory.page_tokens}: the native engine supports {PAGE_TOKENS} only; "
                "leave page_tokens out, or use engine='modules'"
            )
        self._kv = KvPages(self.decoder.program, memory.pages, dtype=self._dtype, slots=memory.slots)

    def bytes_for(self, memory: Memory) -> int:
        """Return the number of bytes that :meth:`reserve` allocates for ``memory``."""
        per_head = 4 if self._dtype == "int8" else 0  # a float32 scale
        size = KV_DTYPES[self._dtype].itemsize
        program = self.decoder.program
        per_token = sum(one.kv_heads * ((one.key_dim + one.value_dim) * size + 2 * per_head) for one in program.caches)
        states = 4 * sum(program.states) * memory.slots
        return memory.pages * memory.page_tokens * per_token + states

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values that are allocated now."""
        return 0 if self._kv is None else self._kv.nbytes

    def step(self, spans: Sequence[Span], copies: Sequence[Copy] = ()) -> Tensor:
        """Run ``spans``; see :class:`~quantkit.engine.backend.Backend`."""
        pages = self.pages
        for source, target, _ in copies:
            for stored in (*pages.keys, *pages.values, *pages.key_scales, *pages.value_scales):
                stored[target] = stored[source]
        for span in spans:
            if span.fresh:
                pages.clear(span.slot)
        return self.decoder.run(_rows(spans), pages, exact=self.exact, bfloat16=self.bfloat16)

    def prepare_drafts(self) -> bool:
        """Split 8-bit weights into planes; see :class:`~quantkit.engine.backend.SelfDraftingBackend`."""
        return self.decoder.split_planes()

    def draft(self, spans: Sequence[Span], *, argmax: bool = False) -> Tensor:
        """Run ``spans`` approximately: with the high planes of 8-bit weights only, and int8 activations.

        See :class:`~quantkit.engine.backend.SelfDraftingBackend`.
        """
        return self.decoder.run(_rows(spans), self.pages, exact=False, bfloat16=self.bfloat16, argmax=argmax, draft=True)

    @property
    def pages(self) -> KvPages:
        """The keys and values; :meth:`reserve` must have been called."""
        assert self._kv is not None, "call reserve first"
        return self._kv


def _rows(spans: Sequence[Span]) -> Rows:
    """Convert spans to the rows of one native call."""
    table = np.zeros((len(spans), max(len(span.table) for span in spans)), dtype=np.int32)
    tokens, positions, slots, logit_rows = list[int](), list[int](), list[int](), list[int]()
    for slot, span in enumerate(spans):
        table[slot, : len(span.table)] = span.table
        tokens += span.ids
        positions += range(span.start, span.start + len(span.ids))
        slots += [slot] * len(span.ids)
        logit_rows += range(len(tokens) - span.num_logits, len(tokens))
    return Rows(tokens, positions, slots, table, logit_rows, [span.slot for span in spans])
