"""A decoder program on the CPU as a :class:`quantkit.engine.backend.Backend`: one native call per step, whatever its rows."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from quantkit.engine.backend import Copy, Memory, Span
from quantkit.errors import QuantkitError
from quantkit.kernels.cpu.decoder import KV_DTYPES, PAGE_TOKENS, KvPages, NativeDecoder, Rows


class NativeBackend:
    """Run a program for many sequences, keys and values in native pages.

    A row's logits do not depend, to the last bit, on the rows beside it: answers do not change with the batch, with drafts, or
    with preemption. Several backends may share a decoder, one at a time.

    Args:
        decoder: the program, laid out; without LongRoPE's second set of tables, which depends on the length of a sequence.
        kv: how keys and values are stored, a key of :data:`quantkit.kernels.cpu.decoder.KV_DTYPES`.
        exact: float activations; False rounds them to int8 where they meet quantized weights.
        bfloat16: round them to bfloat16 where they meet bfloat16 weights, if that is faster.
        context_tokens: longest sequence the model reads.

    Attributes:
        engine: what runs a step, for reports.
    """

    shares_pages = rewinds = True
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
        self._dtype = kv
        self._kv: KvPages | None = None

    def reserve(self, memory: Memory) -> None:
        """Allocate pages; the kernels know one size of them."""
        if memory.page_tokens != PAGE_TOKENS:
            raise QuantkitError(
                f"pages of {memory.page_tokens} tokens: the native engine has pages of {PAGE_TOKENS}; "
                "leave page_tokens out, or take engine='modules'"
            )
        self._kv = KvPages(self.decoder.program, memory.pages, dtype=self._dtype)

    def bytes_for(self, memory: Memory) -> int:
        """Return the bytes that :meth:`reserve` allocates for ``memory``."""
        per_head = 4 if self._dtype == "int8" else 0  # a scale
        heads = [(layer.attention.kv_heads, layer.attention.head_dim) for layer in self.decoder.program.layers]
        per_token = sum(2 * count * (dim * KV_DTYPES[self._dtype].itemsize + per_head) for count, dim in heads)
        return memory.pages * memory.page_tokens * per_token

    @property
    def nbytes(self) -> int:
        """Bytes allocated now."""
        return 0 if self._kv is None else self._kv.nbytes

    def step(self, spans: Sequence[Span], copies: Sequence[Copy] = ()) -> Tensor:
        """Run ``spans``; see :class:`~quantkit.engine.backend.Backend`."""
        pages = self._pages
        for source, target, _ in copies:
            for stored in (*pages.keys, *pages.values, *pages.key_scales, *pages.value_scales):
                stored[target] = stored[source]
        return self.decoder.run(_rows(spans), pages, exact=self.exact, bfloat16=self.bfloat16)

    def draft(self, spans: Sequence[Span], *, argmax: bool = False) -> Tensor:
        """Run ``spans`` roughly: with the high planes of weights alone, and int8 activations, whatever steps do.

        Returns:
            Logits of each row, or the most likely tokens (int32).
        """
        return self.decoder.run(_rows(spans), self._pages, exact=False, bfloat16=self.bfloat16, argmax=argmax, draft=True)

    @property
    def _pages(self) -> KvPages:
        assert self._kv is not None, "reserve comes first"
        return self._kv


def _rows(spans: Sequence[Span]) -> Rows:
    """Lay out spans for one call."""
    table = np.zeros((len(spans), max(len(span.table) for span in spans)), dtype=np.int32)
    tokens, positions, slots, wanted = list[int](), list[int](), list[int](), list[int]()
    for slot, span in enumerate(spans):
        table[slot, : len(span.table)] = span.table
        tokens += span.ids
        positions += range(span.start, span.start + len(span.ids))
        slots += [slot] * len(span.ids)
        wanted += range(len(tokens) - span.wanted, len(tokens))
    return Rows(tokens, positions, slots, table, wanted)
