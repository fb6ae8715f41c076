"""Reconstruct one decoder layer from its trace: the norms, linear layers and activations between its input and output."""

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quantkit.hf.experts import expert_parameters, uses_experts_interface
from quantkit.hf.lowering import facts
from quantkit.hf.lowering.trace import AttentionCall, Call, CannotWatch, LayerTrace, flat
from quantkit.kernels.program.definition import Attention, Experts, Layer, Linear, Mlp, Norm, Rotary
from quantkit.kernels.program.reference import ACTIVATIONS, linear, mixture
from quantkit.nn.linear import QuantWeight


def linear_of(call: Call) -> Linear:
    """Return the linear layer of a call for which :func:`facts.matrix` finds a weight."""
    bias = getattr(call.module, "bias", None)
    shape = (call.y.shape[-1], call.x.shape[-1])
    weight: Any = facts.matrix(call)
    return Linear(weight, shape, None if bias is None else bias.detach())


class Rotaries:
    """The rotary embeddings that were called, and those of them that layers use."""

    def __init__(self, calls: list[Call]) -> None:
        self._known = [reading for call in calls for reading in facts.rotary_readings(call)]
        self._used: list[facts.RotaryReading] = []

    @property
    def used(self) -> list[Rotary]:
        """The embeddings that :meth:`index` has returned, in the order of their indices."""
        return [Rotary(reading.dim, reading.interleaved, reading.tables) for reading in self._used]

    def index(self, pairs: list[tuple[Tensor, Tensor]]) -> int | None:
        """Return the index of the embedding that rotates each ``before`` to its ``after``; None if nothing was rotated.

        Raises:
            CannotWatch: no known embedding does.
        """
        if all(facts.same(before, after) for before, after in pairs):
            return None
        for reading in self._known:
            if all(reading.explains(before, after) for before, after in pairs):
                if reading not in self._used:
                    self._used.append(reading)
                return self._used.index(reading)
        raise CannotWatch("queries and keys are not rotated by a known kind of rotary embedding")


class LayerReader:
    """Reconstruct one layer.

    Args:
        trace: recorded pass of the layer.
        config: config of the decoder; only suggests values of scalars.
        rotaries: the model's rotary embeddings; records those that the layer uses.

    Raises:
        CannotWatch: the layer does not call attention exactly once, or returns nothing.
    """

    def __init__(self, trace: LayerTrace, config: Any, rotaries: Rotaries) -> None:
        if len(trace.attention) != 1 or trace.y is None:
            raise CannotWatch(f"attention is called {len(trace.attention)} times, want once")
        self.trace, self.config, self.rotaries = trace, config, rotaries
        self.seen: AttentionCall = trace.attention[0]
        self.norms = [(call, norm) for call in trace.calls if (norm := facts.as_norm(call)) is not None]
        self.linears = [call for call in trace.calls if facts.matrix(call) is not None]
        self.earlier = [call for call in trace.calls[: self.seen.order] if facts.matrix(call) is not None]

    def read(self) -> Layer:
        """Return the layer.

        Raises:
            CannotWatch: naming the part that is not understood.
        """
        attention, reads, a = self._attention()
        mlp, mlp_reads, m = self._mixture() or self._mlp()
        x, y = self.trace.x, self.trace.y
        assert y is not None
        attention_out, a = self._after(a)
        mlp_out, m = self._after(m)
        attention_in, source = self._before(reads)
        if not facts.same(source, x):
            raise CannotWatch("attention does not read the layer's input or a norm of it")
        mlp_in, middle = self._before(mlp_reads)
        parallel = facts.same(middle, x)
        attention_scale = self._factor(middle - x, a) if not parallel else None
        rest = y - middle
        if parallel:
            rest = y - x - a
            attention_scale = 1.0
        if attention_scale is None:
            raise CannotWatch("the feed-forward network does not read the layer's input plus the attention's output")
        mlp_scale = self._factor(rest, m)
        if mlp_scale is None:
            raise CannotWatch("the layer's output is not its residual stream plus the feed-forward network's output")
        return Layer(attention, mlp, attention_in, attention_out, mlp_in, mlp_out, parallel, attention_scale, mlp_scale)

    def _factor(self, difference: Tensor, part: Tensor) -> float | None:
        """Return s with ``difference == s * part``, or None; the difference has the rounding error of the residual stream."""
        largest = float(self.trace.x.float().abs().max()) / max(float(part.float().abs().max()), 1e-30)
        return facts.factor(difference, part, self.config, slack=max(1.0, largest))

    def _before(self, x: Tensor) -> tuple[Norm | None, Tensor]:
        """Return the norm whose output is ``x``, and its input; None and ``x`` if there is no such norm."""
        for call, norm in self.norms:
            if facts.same(call.y, x):
                return norm, flat(call.x)
        return None, x

    def _after(self, y: Tensor) -> tuple[Norm | None, Tensor]:
        """Return the norm whose input is ``y``, and its output; None and ``y`` if there is no such norm."""
        for call, norm in self.norms:
            if facts.same(call.x, y):
                return norm, flat(call.y)
        return None, y

    def _attention(self) -> tuple[Attention, Tensor, Tensor]:
        """Return the attention, its input and its output."""
        seen = self.seen
        unknown = set(seen.options) - {"softcap"}
        if unknown:
            raise CannotWatch(f"attention has unknown options: {', '.join(sorted(unknown))}")
        qkv, parts = self._projections()
        heads, size = seen.q.shape[1:]
        (q_norm, q), (k_norm, k) = (self._head_norm(part, size) for part in parts)
        rotary = self.rotaries.index([(q, seen.q), (k, seen.k)])
        out = next(facts.find(self.linears, x=seen.y), None)
        if out is None:
            raise CannotWatch("attention's output is not the input of a linear layer (is it gated?)")
        attention = Attention(
            qkv=tuple(linear_of(call) for call in qkv),
            out=linear_of(out),
            heads=heads,
            kv_heads=seen.k.shape[1],
            head_dim=size,
            scale=seen.scale,
            rotary=rotary,
            q_norm=q_norm,
            k_norm=k_norm,
            window=seen.window,
            softcap=seen.options.get("softcap"),
        )
        self.used = {id(call) for call in (*qkv, out)}
        return attention, flat(qkv[0].x), flat(out.y)

    def _projections(self) -> tuple[list[Call], tuple[Tensor, Tensor]]:
        """Return the calls whose concatenated outputs are [q | k | v], and q and k before norm and rotation."""
        seen = self.seen
        wide, narrow = seen.q[0].numel(), seen.k[0].numel()
        v = flat(seen.v)
        for call in self.earlier:  # fused
            y = flat(call.y)
            if y.shape[1] == wide + 2 * narrow and torch.equal(y[:, wide + narrow :], v):
                return [call], (y[:, :wide], y[:, wide : wide + narrow])
        values = next((call for call in self.earlier if facts.same(call.y, v)), None)
        if values is None:
            raise CannotWatch("the values are not the output, or the last part of the output, of a linear layer")
        others = [call for call in facts.find(self.earlier, x=values.x) if call is not values]
        for q, k in itertools.permutations(others, 2):
            if q.y.shape[-1] == wide and k.y.shape[-1] == narrow and self._fits(q, k):
                return [q, k, values], (flat(q.y), flat(k.y))
        raise CannotWatch("queries and keys are not the outputs of linear layers with the same input as that of the values")

    def _fits(self, q: Call, k: Call) -> bool:
        """Return whether the calls can be q and k, for the case that both have the same width."""
        size = self.seen.q.shape[-1]
        try:
            pairs = [(self._head_norm(flat(call.y), size)[1], after) for call, after in ((q, self.seen.q), (k, self.seen.k))]
            self.rotaries.index(pairs)
        except CannotWatch:
            return q.y.shape[-1] != k.y.shape[-1]  # the caller finds a clearer reason
        return True

    def _head_norm(self, x: Tensor, size: int) -> tuple[Norm | None, Tensor]:
        """Return the norm, per head or over the full width, with input ``x`` (T, heads * size), and its output by heads."""
        for call, norm in self.norms:
            if call.x.numel() == x.numel() and torch.equal(_by_token(call.x, len(x), size), x):
                return norm, _by_token(call.y, len(x), size).view(len(x), -1, size)
        return None, x.view(len(x), -1, size)

    def _rest(self) -> Iterator[Call]:
        return (call for call in self.linears if id(call) not in self.used)

    def _mlp(self) -> tuple[Mlp, Tensor, Tensor]:
        """Return the feed-forward network, its input and its output."""
        calls = list(self._rest())
        if not 2 <= len(calls) <= 3:
            raise CannotWatch(
                f"{len(calls)} linear layers besides those of attention, want the two or three of a feed-forward network"
            )
        *first, down = calls
        if len(first) == 2 and not facts.same(first[0].x, first[1].x):
            raise CannotWatch("the first two linear layers of the feed-forward network have different inputs")
        want, ys = flat(down.x), [flat(call.y) for call in first]
        orders = [(first, ys)] if len(first) == 1 else [(first, ys), (first[::-1], ys[::-1])]
        for order, values in orders:
            joined = torch.cat(values, -1)
            gated = joined.shape[1] == 2 * want.shape[1]
            gate, up = joined.chunk(2, -1) if gated else (joined, None)
            if gate.shape == want.shape and (name := facts.as_activation(gate, up, want)) is not None:
                mlp = Mlp(tuple(linear_of(call) for call in order), linear_of(down), name, gated)
                return mlp, flat(first[0].x), flat(down.y)
        raise CannotWatch(f"the activation of the feed-forward network is not one of {', '.join(ACTIVATIONS)}")

    def _mixture(self) -> tuple[Experts, Tensor, Tensor] | None:
        """Return the mixture of experts, its input and its output; None for a layer without experts."""
        call = experts_call(self.trace)
        if call is None:
            return None
        x, y = flat(call.x), flat(call.y)
        index, weights = _choice(call)
        router = self._router(x, call.module)
        rule = None
        for probabilities in _probabilities(x, router):
            top = probabilities.gather(-1, index)
            if not torch.equal(probabilities.topk(index.shape[1], -1).indices.sort(-1).values, index.sort(-1).values):
                continue
            ratios = [(True, top / top.sum(-1, keepdim=True)), (False, top)]
            rule = rule or next(
                ((n, s) for n, t in ratios if (s := facts.factor(weights, t.to(weights.dtype), self.config))), None
            )
        if rule is None:
            raise CannotWatch("the chosen experts and their weights are not the top k of a softmax and its probabilities")
        clear = clear_rows(self.trace, router)
        for name in ACTIVATIONS:
            moe = Experts(router, tuple(_experts(call.module, name)), index.shape[1], rule[0], rule[1])
            if facts.agrees(mixture(moe, x.float()).to(y.dtype)[clear], y[clear]):
                return moe, x, y
        raise CannotWatch("the experts are not feed-forward networks with a known activation")

    def _router(self, x: Tensor, experts: Any) -> Linear:
        count = getattr(experts, expert_parameters(experts)[0]).shape[0]
        for call in self.trace.calls:
            weight = getattr(call.module, "weight", None)
            if isinstance(weight, Tensor) and weight.shape == (count, x.shape[1]) and facts.same(call.x, x):
                bias = getattr(call.module, "bias", None)
                if bias is None:
                    return Linear(weight.detach(), (count, x.shape[1]))
        raise CannotWatch("no router with one output per expert has the same input as the experts")


def experts_call(trace: LayerTrace) -> Call | None:
    """Return the call of a layer's experts; None for a layer without experts."""
    return next((call for call in trace.calls if uses_experts_interface(call.module)), None)


def clear_rows(trace: LayerTrace, router: Linear) -> Tensor:
    """Return which rows of a mixture of experts can be compared with the same mixture in float32.

    In 16 bits, rounding can change the choice between two experts of similar probability, and then the row is entirely
    different. Only the half of the rows is used in which the margin between the last chosen expert and the next one is largest.

    Returns:
        bool (T,); all True in float32.
    """
    call = experts_call(trace)
    assert call is not None
    x, chosen = flat(call.x), _choice(call)[0].shape[1]
    scores = linear(x.float(), router)
    if x.dtype == torch.float32 or chosen == scores.shape[1]:
        return torch.ones(len(x), dtype=torch.bool, device=x.device)
    ordered = scores.topk(chosen + 1, -1).values
    ahead = ordered[:, -2] - ordered[:, -1]
    return ahead >= ahead.median()


def _choice(call: Call) -> tuple[Tensor, Tensor]:
    """Return the chosen experts (T, k) and their weights (T, k)."""
    args, kwargs = call.arguments
    index, weights = [*args, *kwargs.values()][1:3]
    return index, weights


def _probabilities(x: Tensor, router: Linear) -> Iterator[Tensor]:
    """Yield a router's softmax (T, experts), computed in float32 and in the dtype of ``x``."""
    yield linear(x.float(), router).softmax(-1)
    if isinstance(router.weight, Tensor) and x.dtype != torch.float32:
        yield F.linear(x, router.weight.to(x.dtype)).float().softmax(-1)


def _by_token(x: Tensor, tokens: int, size: int) -> Tensor:
    """Reshape (1, T, n), (1, T, heads, size) or (1, heads, T, size) to (T, heads * size)."""
    if x.ndim == 4 and x.shape[1] != tokens and x.shape[2] == tokens:
        x = x.transpose(1, 2)
    return x.reshape(tokens, -1)


def _experts(module: nn.Module, activation: str) -> Iterator[Mlp]:
    """Yield every expert of a module as a feed-forward network."""
    owner: Any = module
    names = expert_parameters(owner)
    stacks = [getattr(owner, name) for name in names]
    if owner.has_bias or getattr(owner, "has_post_expert_norm", False):
        raise CannotWatch("the experts have biases or norms")
    for expert in range(stacks[0].shape[0]):
        parts = []
        for stack in stacks:
            if isinstance(stack, QuantWeight):
                parts.append(Linear(stack, (stack.shape[1], stack.shape[2]), expert=expert))
            else:
                weight = stack.detach()[expert]
                weight = weight.T if owner.is_transposed else weight
                parts.append(Linear(weight, (weight.shape[0], weight.shape[1])))
        yield Mlp((parts[0],), parts[1], activation, bool(owner.has_gate))
