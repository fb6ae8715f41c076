"""A decoder program on the CPU as a :class:`quantkit.engine.engine.Step`: one native call per step."""

import numpy as np
from torch import Tensor

from quantkit.errors import QuantkitError
from quantkit.kernels.decoder import PAGE_TOKENS, KvPages, NativeDecoder, Rows

PREFILL_ROWS = 512
"""Tokens of a prompt that one native call reads; more would only need more memory."""


class NativeStep:
    """Run a program for one sequence, keys and values in pages that grow with it.

    Several steps may share a decoder, one at a time.

    Args:
        decoder: the program, laid out.
        kv: how keys and values are stored, a key of :data:`quantkit.kernels.decoder.KV_DTYPES`.
        exact: float activations; False rounds them to int8 where they meet quantized weights.

    Attributes:
        engine: what runs a step, for reports.
    """

    def __init__(self, decoder: NativeDecoder, *, kv: str = "float32", exact: bool = True) -> None:
        self.decoder, self.exact = decoder, exact
        self.engine = "native" if exact else "native, int8 activations"
        self._kv = KvPages(decoder.program, 1, dtype=kv)
        self.reset()

    def reset(self) -> None:
        """Forget everything read; the pages stay for the next sequence."""
        self._seen: list[int] = []
        self._long = False

    @property
    def kv_bytes(self) -> int:
        """Bytes of the pages of keys and values."""
        return self._kv.nbytes

    def __call__(self, ids: Tensor, position: int) -> Tensor:
        """Read ``ids`` (1, T) int64 standing at ``position``; return float32 logits (1, V) after the last."""
        return self._read(ids, position, argmax=False)

    def most_likely(self, ids: Tensor, position: int) -> int:
        """Read like a call, and return the most likely next token; its logit is finite."""
        return int(self._read(ids, position, argmax=True))

    def _read(self, ids: Tensor, position: int, *, argmax: bool) -> Tensor:
        if ids.ndim != 2 or ids.shape[0] != 1 or not ids.shape[1]:
            raise QuantkitError(f"ids: shape {tuple(ids.shape)}, want (1, T) with T >= 1; this step holds one sequence")
        if position != len(self._seen):
            raise QuantkitError(f"position {position}, but {len(self._seen)} tokens have been read; call reset() to start over")
        tokens, start, switch = ids[0].tolist(), position, self.decoder.program.rope_switch
        total = position + len(tokens)
        if switch is not None and total > switch and not self._long:  # other frequencies: all keys are made again, once
            tokens, start, self._long = self._seen + tokens, 0, True
        self.decoder.set_long(self._long)
        pages = -(-total // PAGE_TOKENS)
        if pages > self._kv.pages:
            self._kv.grow(max(pages, 2 * self._kv.pages))
        table = np.arange(self._kv.pages, dtype=np.int32)[None]
        for first in range(0, len(tokens), PREFILL_ROWS):
            some = tokens[first : first + PREFILL_ROWS]
            where = range(start + first, start + first + len(some))
            last = [len(some) - 1] if first + len(some) == len(tokens) else []
            rows = Rows(some, list(where), [0] * len(some), table, last)
            logits = self.decoder.run(rows, self._kv, exact=self.exact, argmax=argmax)
        self._seen += tokens[len(self._seen) - start :]
        return logits
