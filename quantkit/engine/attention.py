r"""Attention of packed rows over paged keys and values, in plain torch. Sequences with the same number of queries form a batch.

For a query at position :math:`p` and keys at positions :math:`t \le p` (and :math:`t > p - w` with a sliding window w):

.. math:: o = \sum_t \mathrm{softmax}_t(c \tanh(s\, q \cdot k_t / c))\, v_t

with a scale s, optionally a soft cap c, and optionally *sinks*: one additional logit per head in the denominator of the
softmax, without a value. Query heads that share a key/value head are stacked along the query axis, so keys and values are not
repeated.

The layout of a step (:class:`Layout`) is computed once for all layers, which differ only in their window.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from quantkit.engine.backend import Span
from quantkit.engine.kvstore import Pool, Reading, RowPlacement


@dataclass(frozen=True, slots=True)
class Group:
    """Spans of equal length, which attend as one batch.

    Attributes:
        first, last: range of their rows, ``last`` excluded.
        reading: the pages that they read.
        mask: bool (S, 1, length, keys), True where a query sees a key.
    """

    first: int
    last: int
    reading: Reading
    mask: Tensor


class Layout:
    """Where the rows of one step are written, and what they read.

    Args:
        spans: sorted by length, see :func:`by_length`.
        page_tokens: tokens per page.
        device: device of the index tensors.
    """

    def __init__(self, spans: Sequence[Span], page_tokens: int, device: torch.device) -> None:
        self.rows = RowPlacement.of(spans, page_tokens, device)
        self._spans, self._page_tokens, self._device = spans, page_tokens, device
        self._groups: dict[int | None, list[Group]] = {}

    def groups(self, window: int | None) -> list[Group]:
        """Return the batches for a layer whose queries see the last ``window`` tokens, their own included; None sees all."""
        if window not in self._groups:
            self._groups[window] = list(self._make(window))
        return self._groups[window]

    def _make(self, window: int | None) -> list[Group]:
        groups, row, members = [], 0, list[Span]()
        for i, span in enumerate(self._spans):
            members.append(span)
            if i + 1 == len(self._spans) or len(self._spans[i + 1].ids) != len(span.ids):
                rows = len(members) * len(span.ids)
                groups.append(self._group(row, row + rows, members, window))
                row, members = row + rows, []
        return groups

    def _group(self, first: int, last: int, spans: list[Span], window: int | None) -> Group:
        size, length = self._page_tokens, len(spans[0].ids)
        tables, base = [], []
        for span in spans:
            start = 0 if window is None else max(span.start - window + 1, 0) // size
            tables.append(list(span.table[start : -(-(span.start + length) // size)]))
            base.append(start * size)
        count = max(len(table) for table in tables)
        own = [table + table[:1] * (count - len(table)) for table in tables]
        run = own[0][0] if len(own) == 1 and own[0] == list(range(own[0][0], own[0][0] + count)) else None
        starts = torch.tensor([span.start for span in spans], device=self._device)
        bases = torch.tensor(base, device=self._device)
        queries = starts[:, None] + torch.arange(length, device=self._device)  # (S, length)
        keys = bases[:, None] + torch.arange(count * size, device=self._device)  # (S, keys)
        seen = keys[:, None] <= queries[:, :, None]
        if window is not None:
            seen &= keys[:, None] > queries[:, :, None] - window
        slots = torch.tensor([span.slot for span in spans], device=self._device)
        reading = Reading(torch.tensor(own, device=self._device), bases, slots, run)
        return Group(first, last, reading, seen[:, None])


def by_length(spans: Sequence[Span]) -> list[int]:
    """Return the indices of ``spans`` sorted by length, so that spans of equal length are neighbours."""
    return sorted(range(len(spans)), key=lambda i: len(spans[i].ids))


def attend(
    query: Tensor,
    keys: Pool,
    values: Pool,
    layout: Layout,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    chosen: Sequence[Tensor] | None = None,
) -> Tensor:
    """Return the attention of packed rows over the keys and values of their sequences, which are in memory already.

    Args:
        query: floating (M, heads, dim).
        keys: pool of (kv_heads, dim) vectors; kv_heads divides heads.
        values: pool of (kv_heads, value_dim) vectors.
        layout: layout of this step.
        scale: factor of the scores.
        window: see :meth:`Layout.groups`.
        softcap: the c of the module's docstring; None for no cap.
        sinks: floating (heads,), logits without a value; None for none.
        chosen: the keys that a query may see, for each of the groups without a window: bool (S, 1, length, keys); None for all.

    Returns:
        (M, heads, value_dim) in the query's dtype.
    """
    if keys.rotation is not None:
        query = query @ keys.rotation.to(query.dtype)
    pieces = []
    for i, group in enumerate(layout.groups(window)):
        key, value = keys.read(group.reading).to(query.dtype), values.read(group.reading).to(query.dtype)
        (sequences, _, shared, _), heads = key.shape, query.shape[1]
        length, stacked = (group.last - group.first) // sequences, heads // shared
        grouped = query[group.first : group.last].reshape(sequences, length, shared, stacked, -1)
        grouped = grouped.permute(0, 2, 3, 1, 4).flatten(2, 3)  # (S, kv_heads, stacked * length, dim)
        seen = group.mask if chosen is None else group.mask & chosen[i]
        mask = seen if length == 1 else seen.repeat(1, 1, stacked, 1)
        key, value = key.transpose(1, 2), value.transpose(1, 2)  # (S, kv_heads, keys, dim)
        if softcap is None and sinks is None:
            out = scaled_dot_product_attention(grouped, key, value, mask, scale=scale)
        else:
            extra = None if sinks is None else sinks.view(shared, stacked).repeat_interleave(length, 1)[..., None]
            out = _attend_explicitly(grouped, key, value, mask, scale, softcap, extra)
        pieces.append(out.unflatten(2, (stacked, length)).permute(0, 3, 1, 2, 4).flatten(2, 3).flatten(0, 1))
    attended = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
    return attended if values.rotation is None else attended @ values.rotation.to(attended.dtype)


def _attend_explicitly(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float, softcap: float | None, sinks: Tensor | None
) -> Tensor:
    """Return attention with a soft cap or sinks (kv_heads, queries, 1), which torch's function lacks; softmax in float32."""
    scores = query @ key.transpose(-1, -2) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.masked_fill(~mask, float("-inf")).float()
    if sinks is not None:
        scores = torch.cat([scores, sinks.float().expand(*scores.shape[:1], -1, -1, -1)], -1)
    weights = scores.softmax(-1).to(query.dtype)
    return weights[..., : key.shape[2]] @ value
