"""Logits of a model as in generation: tokens read earlier keys and values from the key/value memory.

A plain forward pass over a window does not use the memory, so it cannot show the effect of quantized keys and values. Here, a
window is run on the engine's backend in small chunks, so that only keys and values of the current chunk are recent ones.
"""

from typing import Any

import torch
from torch import Tensor, nn

from quantkit.engine.backend import Backend, Memory, Span
from quantkit.spec import KVScheme
from quantkit.system.compute import evaluation_mode


class ThroughCache:
    """A function from ids (B, T) to logits (B, T, V), for :func:`~quantkit.evaluation.quality.score`.

    Args:
        model: a causal language model of transformers.
        kv: how keys and values are stored.
        chunk: tokens per step; 1 is exactly what decoding does, but slow.
        engine: see :func:`quantkit.hf.backend.make_backend`.

    Raises:
        QuantkitError: ``kv`` is quantized, and the model cannot run on pages.
    """

    PAGE_TOKENS = 32

    def __init__(self, model: nn.Module, kv: str | KVScheme, *, chunk: int = 16, engine: str = "auto") -> None:
        from quantkit.hf.backend import make_backend  # imports transformers, which is slow and not needed for plain scoring

        self._model, self._chunk = model, chunk
        with evaluation_mode(model):
            self._backend: Backend = make_backend(model, kv, engine=engine)  # type: ignore[arg-type]

    def __call__(self, ids: Tensor) -> Tensor:
        """Return the logits (B, T, V) for int64 ``ids`` (B, T)."""
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
