"""A model's logits as generation sees them: every token reads the keys and values before it from the key/value memory.

One forward over a window never reads a memory, so it cannot show what storing keys and values in few bits costs. Here a window
goes through the engine's backend in small chunks; only keys and values of the chunk itself are as new as in generation.
"""

from typing import Any

import torch
from torch import Tensor, nn

from quantkit.engine.backend import Backend, Memory, Span
from quantkit.spec import KVScheme
from quantkit.system.compute import evaluation_mode


class ThroughCache:
    """A function from ids (B, T) to logits (B, T, vocabulary), for :func:`~quantkit.evaluation.quality.score`.

    Args:
        model: a causal language model of transformers that runs on pages.
        kv: how keys and values are stored.
        chunk: tokens per step; 1 is exactly what decoding does, and slow.
        engine: see :func:`quantkit.hf.backend.make_backend`.

    Raises:
        QuantkitError: the model cannot run on pages and ``kv`` is quantized.
    """

    PAGE_TOKENS = 32

    def __init__(self, model: nn.Module, kv: str | KVScheme, *, chunk: int = 16, engine: str = "auto") -> None:
        from quantkit.hf.backend import make_backend  # transformers is slow to import, and plain scoring needs none of it

        self._model, self._chunk = model, chunk
        with evaluation_mode(model):
            self._backend: Backend = make_backend(model, kv, engine=engine)  # type: ignore[arg-type]

    def __call__(self, ids: Tensor) -> Tensor:
        """Return logits (B, T, vocabulary) for int64 ``ids`` (B, T)."""
        count, length = ids.shape
        pages = -(-length // self.PAGE_TOKENS)
        self._backend.reserve(Memory(count * pages, self.PAGE_TOKENS, count))
        tokens: list[list[int]] = ids.tolist()
        found: list[Any] = []
        with evaluation_mode(self._model):
            for start in range(0, length, self._chunk):
                new = min(self._chunk, length - start)
                tables = [range(i * pages, (i + 1) * pages) for i in range(count)]
                spans = [Span(i, start, tokens[i][start : start + new], tables[i], new, start == 0) for i in range(count)]
                found.append(self._backend.step(spans).unflatten(0, (count, -1)))
        return torch.cat(found, 1)
