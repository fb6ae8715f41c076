"""Indexed attention on pages: the keys by which a layer chooses the tokens that a query attends to.

In DeepSeek's sparse attention (DeepSeek-V3.2, 2025, arXiv 2512.02556) a small *indexer* scores every earlier token for every
query, and attention sees the ``index_topk`` tokens of highest score. transformers' indexers keep one key per token in the cache
of the model and score queries against all that the cache returns, under a mask.

A batch of packed rows gets such a cache from here: it stores the keys on pages and returns those of all sequences of the step,
one after the other, with a mask under which a row sees the earlier tokens of its own sequence. So the chosen indices are places
in that list. A step's scores take rows x tokens of all its sequences, in float32, for each head of the indexer.

Scores are sums of rectified products. Tokens whose score is exactly 0 are equal, and which of them are chosen is open, in
transformers as here.
"""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from quantkit.engine.attention import Layout
from quantkit.engine.backend import Copy, Memory
from quantkit.engine.kvstore import Pool, make_pool, pool_bytes
from quantkit.spec import KVScheme

INDEXED = "indexed_attention"
"""transformers' name of the kind of such a layer."""


class IndexKeys:
    """Indexer keys of one sequence of ``tokens`` that is run at once: nothing is stored, the channels of keys are recorded."""

    def __init__(self, tokens: int, device: torch.device) -> None:
        self.mask = torch.ones(tokens, tokens, dtype=torch.bool, device=device).tril()[None, None]  # (1, 1, rows, keys)
        self._dim = 0

    def update(self, keys: Tensor) -> Tensor:
        """Take the keys (1, rows, dim) of one layer's rows; return those to score against, (1, keys, dim)."""
        self._dim = keys.shape[-1]
        return keys

    def take_dim(self) -> int:
        """Return the channels of the keys since the last call, 0 if there were none."""
        dim, self._dim = self._dim, 0
        return dim


class IndexPages(IndexKeys):
    """Indexer keys of all layers on pages.

    Args:
        dims: channels of each layer's keys; 0 for a layer without an indexer.
    """

    def __init__(self, dims: Sequence[int]) -> None:
        super().__init__(0, torch.device("cpu"))
        self._dims = [dim for dim in dims if dim]
        self._pools: list[Pool] = []
        self._layout: Layout | None = None
        self._layer = 0

    def reserve(self, memory: Memory, dtype: torch.dtype, device: torch.device) -> None:
        """Allocate the pages; keys are stored as they are."""
        scheme = KVScheme()
        self._pools = [make_pool(memory, (1, dim), dtype, device, scheme.key, scheme) for dim in self._dims]

    def bytes_for(self, memory: Memory, dtype: torch.dtype) -> int:
        """Return the number of bytes that :meth:`reserve` allocates."""
        scheme = KVScheme()
        return sum(pool_bytes(memory, (1, dim), dtype, scheme.key, scheme.recent) for dim in self._dims)

    @property
    def nbytes(self) -> int:
        """Bytes that are allocated now."""
        return sum(pool.nbytes for pool in self._pools)

    def start(self, layout: Layout, copies: Sequence[Copy]) -> None:
        """Start a step, after the ``copies`` of pages that it asks for."""
        for pool in self._pools:
            pool.copy(copies)
        self._layout, self._layer = layout, 0
        groups = layout.groups(None)
        blocks = []
        for group in groups:
            sequences, _, length, keys = group.mask.shape
            own = torch.eye(sequences, dtype=torch.bool, device=group.mask.device)[:, None, :, None]  # of a row: its sequence
            seen = group.mask[:, 0, :, None] & own  # (S, length, S, keys)
            blocks.append(seen.reshape(sequences * length, sequences * keys))
        self.mask = torch.block_diag(*blocks).bool()[None, None]

    def update(self, keys: Tensor) -> Tensor:
        """Store the keys (1, M, dim) of one layer's rows; return those of all sequences, (1, keys, dim)."""
        assert self._layout is not None
        pool = self._pools[self._layer]
        self._layer += 1
        pool.write(self._layout.rows, keys[0][:, None])
        return torch.cat([pool.read(group.reading).flatten(0, 1)[:, 0] for group in self._layout.groups(None)])[None].to(
            keys.dtype
        )

    def chosen(self, indices: Tensor) -> list[Tensor]:
        """Return what indices (M, top_k) into the keys of :meth:`update` choose, for each group bool (S, 1, length, keys)."""
        assert self._layout is not None
        everything = torch.zeros(self.mask.shape[-2:], dtype=torch.bool, device=indices.device)
        everything.scatter_(1, indices.long(), True)
        result, column = [], 0
        for group in self._layout.groups(None):
            sequences, _, length, keys = group.mask.shape
            block = everything[group.first : group.last, column : column + sequences * keys]
            column += sequences * keys
            of_all = block.reshape(sequences, length, sequences, keys)
            own = torch.arange(sequences, device=indices.device)
            result.append(of_all[own, :, own][:, None])
        return result


class _PassingCache(Cache):
    """What the model takes for its cache: keys and values pass through, an indexer's keys go to ``index``."""

    def __init__(self, index: IndexKeys) -> None:
        super().__init__(layers=[])
        self._index = index

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        return key_states, value_states

    def update_indexer(self, indexer_key_states: Tensor, *_: Any, **__: Any) -> Tensor:
        return self._index.update(indexer_key_states)


def model_options(model: PreTrainedModel, index: IndexKeys) -> dict[str, Any]:
    """Return the arguments with which the model's indexers read their keys from ``index``; other layers get no mask."""
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    kinds = model.config.get_text_config(decoder=True).layer_types
    return {name: _PassingCache(index), "attention_mask": {kind: index.mask if kind == INDEXED else None for kind in kinds}}
