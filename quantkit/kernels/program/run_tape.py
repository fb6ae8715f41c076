"""The definition of what a tape computes: float32, plain torch, one sequence, no memory of earlier calls.

Values are (T, width). Tapes with states run token by token, others all tokens at once.
"""

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional as F

from quantkit.kernels.program.reference import linear
from quantkit.kernels.program.tape import (
    POSITION,
    TOKEN,
    Attend,
    Compute,
    Join,
    Load,
    Lookup,
    Mixture,
    Product,
    Read,
    Step,
    Steps,
    Store,
    Tape,
)

MAPS: dict[str, Callable[..., Tensor]] = {
    "copy": lambda a: a,
    "neg": torch.neg,
    "abs": torch.abs,
    "exp": torch.exp,
    "log": torch.log,
    "sqrt": torch.sqrt,
    "rsqrt": torch.rsqrt,
    "reciprocal": torch.reciprocal,
    "square": torch.square,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda a: F.gelu(a, approximate="tanh"),
    "relu": F.relu,
    "softplus": F.softplus,
    "sin": torch.sin,
    "cos": torch.cos,
    "erf": torch.erf,
    "floor": torch.floor,
    "sign": torch.sign,
    "expm1": torch.expm1,
    "log1p": torch.log1p,
    "not": lambda a: (a == 0).float(),
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "div": torch.div,
    "pow": torch.pow,
    "max": torch.maximum,
    "min": torch.minimum,
    "lt": lambda a, b: (a < b).float(),
    "le": lambda a, b: (a <= b).float(),
    "gt": lambda a, b: (a > b).float(),
    "ge": lambda a, b: (a >= b).float(),
    "eq": lambda a, b: (a == b).float(),
    "ne": lambda a, b: (a != b).float(),
    "where": lambda c, a, b: torch.where(c != 0, a, b),
}
"""Elementwise operations. Backends number them in this order."""

ROWS = ("sum", "amax", "amin", "softmax", "cumsum", "topk", "gather", "scatter", "contract", "norm")
"""Operations along the last axis of their first operand (outer, n). Backends number them after the maps.

    sum, amax, amin     (outer,)
    softmax, cumsum     (outer, n)
    topk                the k largest, falling: their values (outer, k), then their indices (outer, k); numbers = (k,)
    gather              x (outer, n), indices (outer, m): (outer, m)
    scatter             x (outer, n), indices (outer, m), values (outer, m): x with the values in their places; added where
                        numbers = (1,)
    contract            a (b, m, k), c (b, n, k): (b, m, n), sums over k
    norm                x (outer, n), gain (n,), shift (n,): numbers = (eps, whether the mean is subtracted)
"""


def logits(tape: Tape, ids: Tensor, start: int = 0) -> Tensor:
    """Return float32 logits (T, vocabulary) for ids (T,) int64 at positions ``start`` and following.

    Attention sees these tokens only, and states are zero at first.
    """
    positions = torch.arange(start, start + len(ids), device=ids.device)
    with torch.inference_mode():
        run = _Run(tape, ids, positions)
        y = linear(run.result(), tape.head) * tape.logit_scale
        return y if tape.logit_softcap is None else tape.logit_softcap * torch.tanh(y / tape.logit_softcap)


class _Run:
    def __init__(self, tape: Tape, ids: Tensor, positions: Tensor) -> None:
        self.tape, self.ids, self.positions = tape, ids, positions
        device = ids.device
        self.states = [torch.zeros(1, size, device=device) for size in tape.states]
        self.kept: dict[int, list[tuple[Tensor, Tensor]]] = {}

    def result(self) -> Tensor:
        if not self.tape.states:
            return self._some(self.ids, self.positions)
        pairs = zip(self.ids.split(1), self.positions.split(1), strict=True)
        return torch.cat([self._some(token, position) for token, position in pairs])

    def _some(self, ids: Tensor, positions: Tensor) -> Tensor:
        values = {TOKEN: ids.float()[:, None], POSITION: positions.float()[:, None]}
        self.now = positions
        return self.run(self.tape.body, values)

    def run(self, steps: Steps, values: dict[int, Tensor]) -> Tensor:
        for step in steps.steps:
            if isinstance(step, Store):
                self.states[step.state] = read(step.reads[0], values).flatten(1)
            else:
                values[step.out] = self._step(step, values)
        return read(steps.result, values).flatten(1)

    def _step(self, step: Step, values: dict[int, Tensor]) -> Tensor:
        parts = [read(one, values) for one in step.reads]
        match step:
            case Compute():
                return compute(step, parts)
            case Join():
                return join(step, parts)
            case Product():
                return linear(parts[0].flatten(1), step.linear)
            case Lookup():
                index = parts[0].flatten().long()
                return cast(Tensor, step.table[index] if isinstance(step.table, Tensor) else step.table(index)).float()
            case Attend():
                return self._attend(step, *parts)
            case Mixture():
                return self._mix(step, *parts)
            case Load():
                return self.states[step.state]
        raise AssertionError(step)

    def _attend(self, step: Attend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        tokens = len(q)
        if step.append:
            self.kept.setdefault(step.cache, []).append((k, v))
        k, v = (torch.cat(parts) for parts in zip(*self.kept[step.cache], strict=True))
        q = q.view(tokens, step.heads, step.key_dim)
        k, v = k.view(len(k), step.kv_heads, -1), v.view(len(v), step.kv_heads, -1)
        k, v = (part.repeat_interleave(step.heads // step.kv_heads, 1) for part in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) * step.scale
        if step.softcap is not None:
            scores = step.softcap * torch.tanh(scores / step.softcap)
        now = self.now[:, None]
        keys = self.positions[: len(k)]
        hidden = keys > now
        if step.slopes is not None:
            scores = scores + step.slopes.to(scores.device)[:, None, None] * (keys - now)
        if step.window is not None:
            hidden = hidden | (keys <= now - step.window)
        if step.chunk is not None:
            hidden = hidden | (keys < now // step.chunk * step.chunk)
        scores = scores.masked_fill(hidden, -torch.inf)
        if step.sinks is not None:
            sinks = step.sinks.to(scores.device)[:, None, None].expand(-1, tokens, 1)
            weights = torch.cat([scores, sinks], -1).softmax(-1)[..., :-1]
        else:
            weights = scores.softmax(-1)
        return torch.einsum("hqk,khd->qhd", weights, v).flatten(1)

    def _mix(self, step: Mixture, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        y = torch.zeros(len(x), step.experts[0].down.shape[0], device=x.device)
        index = index.long()
        for e in index.unique().tolist():
            if not 0 <= e < len(step.experts):
                continue
            rows, slot = (index == e).nonzero(as_tuple=True)
            expert = step.experts[e]
            part = linear(self.run(step.inner, {0: linear(x[rows], expert.up)}), expert.down)
            if step.outer is not None:
                part = self.run(step.outer, {0: part})
            y.index_add_(0, rows, part * weights[rows, slot][:, None])
        return y


def read(one: Read, values: dict[int, Tensor]) -> Tensor:
    """Return the elements of a read (T, *shape)."""
    if isinstance(one.source, Tensor):
        tokens, device = len(next(iter(values.values()))), next(iter(values.values())).device
        return one.source.to(device).as_strided(one.shape, one.strides, one.offset).expand(tokens, *one.shape)
    x = values[one.source].contiguous()
    return x.as_strided((len(x), *one.shape), (x.shape[1], *one.strides), one.offset)


def join(step: Join, parts: list[Tensor]) -> Tensor:
    """Return pieces (T, *shape) in one value (T, width)."""
    width = sum(one.size for one in step.reads)
    out = parts[0].new_empty(len(parts[0]), width)
    for part, place in zip(parts, step.places, strict=True):
        out.as_strided(part.shape, (width, *place.strides), place.offset).copy_(part)
    return out


def compute(step: Compute, parts: list[Tensor]) -> Tensor:
    """Return the result (T, width) of arithmetic on operands (T, *shape)."""
    if (act := MAPS.get(step.op)) is not None:
        return act(*parts).flatten(1)
    x = parts[0]
    match step.op:
        case "sum" | "softmax" | "cumsum":
            along: Callable[..., Tensor] = getattr(torch, step.op)
            return along(x, -1).flatten(1)
        case "amax" | "amin":
            return (x.amax(-1) if step.op == "amax" else x.amin(-1)).flatten(1)
        case "topk":
            values, indices = x.topk(int(step.numbers[0]), -1)
            return torch.cat([values.flatten(1), indices.flatten(1).float()], 1)
        case "gather":
            return x.gather(-1, parts[1].long()).flatten(1)
        case "scatter":
            put = x.scatter_add if step.numbers[0] else x.scatter
            return put(-1, parts[1].long(), parts[2]).flatten(1)
        case "contract":
            return (x @ parts[1].transpose(-1, -2)).flatten(1)
        case "norm":
            eps, center = step.numbers
            x = x - x.mean(-1, keepdim=True) if center else x
            scaled = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
            return (scaled * parts[1][:, None] + parts[2][:, None]).flatten(1)
    raise AssertionError(step.op)
