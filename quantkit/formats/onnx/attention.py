"""Attention in operators of ONNX alone, for programs that do not know ONNX Runtime's ``GroupQueryAttention``.

With queries q of S new tokens, keys k and values v of all T tokens, H heads of which H / K share one of K key/value heads:

    q, k <- rotated by the cosines and sines of their positions, which are the last S of T
    scores = q k' * scale, and -inf where a key is later than its query, outside its window, or masked
    y = softmax(scores) v

Heads that share keys are rows of one matrix, (batch, K, H / K * S, channels), so that no key is repeated in memory.
"""

from typing import Any, NamedTuple

import torch

LOWEST = -3.4e38
"""What a score is where it does not count."""


class Shared(NamedTuple):
    """Names of what every layer reads: cosines and sines (S, channels / 2), and what is added to scores (batch, 1, S, T)."""

    cosines: str
    sines: str
    mask: str


def shared(graph: Any, cosines: str, sines: str, window: int) -> Shared:
    """Add what every layer reads.

    Args:
        graph: nodes are added to it.
        cosines, sines: tables of all positions, float32 (positions, channels / 2).
        window: tokens that a query sees, itself included; -1 for all.
    """
    zero, one = (graph.constant(f"scalar.{n}", torch.tensor(n)) for n in (0, 1))
    total = graph.node("Squeeze", graph.node("Shape", "attention_mask", start=1, end=2))
    new = graph.node("Squeeze", graph.node("Shape", "input_ids", start=1, end=2))
    queries = graph.node("Range", graph.node("Sub", total, new), total, one)
    keys = graph.node("Range", zero, total, one)
    rows = graph.node("Unsqueeze", queries, graph.constant("axis.1", torch.tensor([1])))
    seen = graph.node("LessOrEqual", keys, rows)
    if window > 0:
        first = graph.node("Sub", rows, graph.constant("window", torch.tensor(window)))
        seen = graph.node("And", seen, graph.node("Greater", keys, first))
    middle = graph.constant("axes.12", torch.tensor([1, 2]))
    wanted = graph.node("Unsqueeze", graph.node("Cast", "attention_mask", to=9), middle)
    seen = graph.node("And", seen, wanted)
    low, none = (graph.constant(f"float.{name}", torch.tensor(value)) for name, value in (("low", LOWEST), ("none", 0.0)))
    cosine, sine = (graph.node("Gather", table, queries) for table in (cosines, sines))
    return Shared(cosine, sine, graph.node("Where", seen, none, low))


def attend(
    graph: Any,
    inputs: tuple[str, str, str],
    past: list[str],
    present: tuple[str, str],
    heads: tuple[int, int, int],
    shared: Shared,
) -> str:
    """Add the attention of one layer.

    Args:
        graph: nodes are added to it.
        inputs: queries, keys and values (batch, S, channels of all heads).
        past: keys and values (batch, K, past, channels).
        present: names of the outputs with the new ones after them.
        heads: H, K, channels of a head.
        shared: see :func:`shared`.

    Returns:
        Name of the output (batch, S, channels of all heads).
    """
    count, groups, size = heads
    query, key, value = (_apart(graph, name, n, size) for name, n in zip(inputs, (count, groups, groups), strict=True))
    query, key = (_rotated(graph, name, size, shared) for name in (query, key))
    key, value = (
        graph.node("Concat", before, new, output=name, axis=2)
        for before, new, name in zip(past, (key, value), present, strict=True)
    )
    rows = graph.node("Reshape", query, graph.constant("rows", torch.tensor([0, groups, -1, size])))
    turned = graph.node("Transpose", key, perm=[0, 1, 3, 2])
    scale = graph.constant("scale", torch.tensor(size**-0.5))
    scores = graph.node("MatMul", graph.node("Mul", rows, scale), turned)
    total = graph.node("Shape", "attention_mask", start=1, end=2)
    every, each = (graph.constant(f"split.{n}", torch.tensor([0, n])) for n in (count, groups))
    new = graph.node("Shape", "input_ids", start=1, end=2)
    by_head = graph.node("Concat", every, new, total, axis=0)
    scores = graph.node("Add", graph.node("Reshape", scores, by_head), shared.mask)
    shares = graph.node("Softmax", scores, axis=-1)
    minus = graph.constant("minus", torch.tensor([-1]))
    shares = graph.node("Reshape", shares, graph.node("Concat", each, minus, total, axis=0))
    found = graph.node("MatMul", shares, value)
    found = graph.node("Reshape", found, graph.constant(f"heads.first.{count}", torch.tensor([0, count, -1, size])))
    found = graph.node("Transpose", found, perm=[0, 2, 1, 3])
    return str(graph.node("Reshape", found, graph.constant(f"channels.{count}", torch.tensor([0, 0, count * size]))))


def _apart(graph: Any, name: str, count: int, size: int) -> str:
    """Return (batch, S, count * size) as (batch, count, S, size)."""
    shape = graph.constant(f"heads.{count}", torch.tensor([0, 0, count, size]))
    return str(graph.node("Transpose", graph.node("Reshape", name, shape), perm=[0, 2, 1, 3]))


def _rotated(graph: Any, name: str, size: int, shared: Shared) -> str:
    """Return (batch, heads, S, size) with number i and i + size / 2 of every head turned by the angle of their position."""
    halves = graph.constant("halves", torch.tensor([size // 2, size // 2]))
    second = f"{name}.second"
    first = graph.node("Split", name, halves, outputs=(second,), axis=-1)
    cosine, sine = shared.cosines, shared.sines
    left = graph.node("Sub", graph.node("Mul", first, cosine), graph.node("Mul", second, sine))
    right = graph.node("Add", graph.node("Mul", second, cosine), graph.node("Mul", first, sine))
    return str(graph.node("Concat", left, right, axis=-1))
