"""A decoder program on the CPU as a :class:`quantkit.engine.engine.Step`: one native call per step."""

import dataclasses

import numpy as np
from torch import Tensor

from quantkit.errors import QuantkitError
from quantkit.kernels.decoder import PAGE_TOKENS, KvPages, NativeDecoder, Rows
from quantkit.kernels.program import Linear, Program
from quantkit.nn.linear import QuantLinear
from quantkit.numerics import grid
from quantkit.qtensor import QTensor
from quantkit.spec import QuantSpec

PREFILL_ROWS = 512
"""Tokens of a prompt that one native call reads; more would only need more memory."""


HEAD_SPEC = QuantSpec("int8", (1, 64))
"""Grid of a head that is quantized on the way: 8.25 bits a weight."""


def quantize_head(program: Program) -> Program:
    """Return the program with its head rounded to nearest on :data:`HEAD_SPEC`; one that is quantized already stays.

    The head is read whole for every token: of a small model with a large vocabulary it is most of what decoding reads. A tied
    embedding stays as it is.

    Raises:
        QuantkitError: if the hidden size does not fit the grid.
    """
    head = program.head
    if not isinstance(head.weight, Tensor):
        return program
    if head.shape[1] % HEAD_SPEC.block[1]:
        raise QuantkitError(
            f"{program.name}: a hidden size of {head.shape[1]} is no multiple of {HEAD_SPEC.block[1]}; head='float'"
        )
    weight = head.weight.float()
    scale, zero = grid.choose_qparams(weight, HEAD_SPEC)
    qtensor = QTensor.from_codes(grid.quantize(weight, scale, zero, HEAD_SPEC), scale, zero, HEAD_SPEC)
    return dataclasses.replace(program, head=Linear(QuantLinear(qtensor, head.bias), head.shape, head.bias))


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
        head = decoder.program.head.weight
        rounded = [] if exact else ["int8 activations"]
        rounded += [f"{head.spec.describe()} head"] if isinstance(head, QuantLinear) else []
        self.engine = ", ".join(["native", *rounded])
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
