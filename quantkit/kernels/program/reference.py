"""The definition of what a decoder program computes: float32, plain torch, one sequence, no cache.

Backends are tested against it, and ``quantkit/hf/lowering/lower.py`` uses it to verify that a program agrees with its model.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from quantkit.kernels.program.definition import Attention, Experts, Layer, Linear, Mlp, Norm, Program

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
}
"""Activation name to function. Backends number activations in this order."""

_ROWS = 4096
"""Rows of a float weight that are converted to float32 at a time."""


def logits(program: Program, ids: Tensor) -> Tensor:
    """Return float32 logits (T, vocabulary) for ids (T,) int64 at positions 0 to T - 1."""
    with torch.inference_mode():
        x = embed(program, ids)
        tables = tables_of(program, len(ids), ids.device)
        for layer in program.layers:
            x = run_layer(program, layer, x, tables)
        return read_out(program, x)


def tables_of(program: Program, tokens: int, device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """Return cos and sin of every rotary embedding, for positions 0 to tokens - 1."""
    return [(cos.to(device), sin.to(device)) for cos, sin in (rotary.tables(tokens) for rotary in program.rotaries)]


def embed(program: Program, ids: Tensor) -> Tensor:
    """Return the residual stream before the first layer, float32 (T, hidden)."""
    return program.rows(ids) * program.embedding_scale


def read_out(program: Program, x: Tensor) -> Tensor:
    """Return logits (T, vocabulary) of the residual stream after the last layer."""
    y = linear(normalize(x, program.final_norm), program.head) * program.logit_scale
    return y if program.logit_softcap is None else program.logit_softcap * torch.tanh(y / program.logit_softcap)


def run_layer(program: Program, layer: Layer, x: Tensor, tables: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Return the residual stream (T, hidden) after ``layer``; ``tables`` are cos and sin of every rotary."""
    a = normalize(attend(program, layer.attention, normalize(x, layer.attention_in), tables), layer.attention_out)
    h = x + layer.attention_scale * a
    inner = normalize(x if layer.parallel else h, layer.mlp_in)
    m = mixture(layer.mlp, inner) if isinstance(layer.mlp, Experts) else feed_forward(layer.mlp, inner)
    return h + layer.mlp_scale * normalize(m, layer.mlp_out)


def linear(x: Tensor, weight: Linear) -> Tensor:
    """Return ``x @ w.T + bias`` in float32."""
    if isinstance(weight.weight, Tensor):
        parts = weight.weight.split(_ROWS)  # avoids a float32 copy of a whole output head
        y = torch.cat([F.linear(x, part.float()) for part in parts], -1)
        return y if weight.bias is None else y + weight.bias.float()
    if weight.expert is None:
        return cast(Tensor, weight.weight(x))  # a QuantLinear adds its own bias, the same tensor
    y = cast(Tensor, cast(Any, weight.weight).matmul(x, weight.expert))
    return y if weight.bias is None else y + weight.bias.float()


def normalize(x: Tensor, norm: Norm | None) -> Tensor:
    """Apply a norm over the last axis; None is the identity."""
    if norm is None:
        return x
    if norm.center:
        x = x - x.mean(-1, keepdim=True)
    y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.eps) * norm.gain
    return y if norm.shift is None else y + norm.shift


def rotate(x: Tensor, cos: Tensor, sin: Tensor, dim: int, interleaved: bool) -> Tensor:
    """Rotate x (T, heads, head_dim) by cos and sin (T, dim / 2); channels from ``dim`` on are not rotated."""
    cos, sin = cos[:, None], sin[:, None]
    if interleaved:
        a, b = x[..., 0:dim:2], x[..., 1:dim:2]
        rotated = torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)
    else:
        a, b = x[..., : dim // 2], x[..., dim // 2 : dim]
        rotated = torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
    return torch.cat([rotated, x[..., dim:]], -1)


def attend(program: Program, attention: Attention, x: Tensor, tables: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Return the output (T, hidden) of attention for its input (T, hidden)."""
    tokens, size = len(x), attention.head_dim
    widths = [attention.heads * size, attention.kv_heads * size, attention.kv_heads * size]
    q, k, v = torch.cat([linear(x, part) for part in attention.qkv], -1).split(widths, -1)
    q = _by_head(q, attention.q_norm, size)
    k = _by_head(k, attention.k_norm, size)
    v = v.view(tokens, -1, size)
    if attention.rotary is not None:
        rotary, (cos, sin) = program.rotaries[attention.rotary], tables[attention.rotary]
        q, k = (rotate(part, cos, sin, rotary.dim, rotary.interleaved) for part in (q, k))
    repeats = attention.heads // attention.kv_heads
    k, v = (part.repeat_interleave(repeats, 1) for part in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) * attention.scale
    if attention.softcap is not None:
        scores = attention.softcap * torch.tanh(scores / attention.softcap)
    places = torch.arange(tokens, device=x.device)
    age = places[:, None] - places
    hidden = age < 0 if attention.window is None else (age < 0) | (age >= attention.window)
    scores = scores.masked_fill(hidden, -torch.inf)
    return linear(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).flatten(1), attention.out)


def feed_forward(mlp: Mlp, x: Tensor) -> Tensor:
    """Return the output (T, hidden) of a feed-forward network for its input (T, hidden)."""
    inner = torch.cat([linear(x, part) for part in mlp.up], -1)
    activate = ACTIVATIONS[mlp.activation]
    if not mlp.gated:
        return linear(activate(inner), mlp.down)
    gate, up = inner.chunk(2, -1)
    return linear(activate(gate) * up, mlp.down)


def mixture(moe: Experts, x: Tensor) -> Tensor:
    """Return the weighted sum of the chosen experts (T, hidden) for their input (T, hidden)."""
    weights, chosen = linear(x, moe.router).softmax(-1).topk(moe.top_k, -1)
    if moe.normalize:
        weights = weights / weights.sum(-1, keepdim=True)
    y = torch.zeros_like(x)
    for index in chosen.unique().tolist():
        rows, slot = (chosen == index).nonzero(as_tuple=True)
        y[rows] += feed_forward(moe.experts[index], x[rows]) * (weights[rows, slot] * moe.scale)[:, None]
    return y


def _by_head(x: Tensor, norm: Norm | None, head_dim: int) -> Tensor:
    """Split (T, heads * head_dim) into heads, normalized per head or over the full width."""
    heads = (len(x), -1, head_dim)
    if norm is not None and norm.gain.shape[0] != head_dim:
        return normalize(x, norm).view(heads)
    return normalize(x.view(heads), norm)
