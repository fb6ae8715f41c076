"""A decoder as a frozen program: what a standard causal language model computes, with no model class left in it.

For tokens ``t`` at positions ``p``, with ``N`` a norm (or nothing), ``A`` attention and ``F`` a feed-forward network:

    x = embedding[t] * embedding_scale
    for each layer, sequential:   x = x + attention_scale * N_ao(A(N_ai(x)));   x = x + mlp_scale * N_mo(F(N_mi(x)))
    or parallel:                  x = x + attention_scale * N_ao(A(N_ai(x))) + mlp_scale * N_mo(F(N_mi(x)))
    logits = cap * tanh(head(N(x)) * logit_scale / cap), or without the tanh

One description serves every family: a pre-norm llama, gemma's sandwich, olmo2's post-norm and cohere's parallel block differ
only in which norms are there. :mod:`quantkit.kernels.program.reference` is the definition in plain torch, a backend (the CPU's
is :mod:`quantkit.kernels.cpu.decoder`) runs the same program in one call. ``quantkit/hf/lowering/lower.py`` writes programs and
proves them.

Weights are held, never copied: a float tensor (out, in), or the quantized module that stands in the model.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True, slots=True, eq=False)
class Linear:
    """``y = x @ w.T + bias``.

    Attributes:
        weight: float (out, in), or a module with a quantized weight (``QuantLinear``, or ``QuantWeight`` and ``expert``).
        shape: (out, in).
        bias: (out,) or None.
        expert: which matrix of a stack ``weight`` is; None for a plain one.
    """

    weight: Tensor | nn.Module
    shape: tuple[int, int]
    bias: Tensor | None = None
    expert: int | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Norm:
    """``(x - mean) / sqrt(variance + eps) * gain + shift`` over the last axis; an RMS norm has no mean.

    Attributes:
        center: subtract the mean (LayerNorm) or not (RMSNorm).
        gain: float32 (n,); gemma's ``1 + weight`` is already added.
        shift: float32 (n,) or None.
        eps: added to the variance.
    """

    center: bool
    gain: Tensor
    shift: Tensor | None
    eps: float


@dataclass(frozen=True, slots=True, eq=False)
class Rotary:
    """Rotary position embedding of the first ``dim`` channels of a head (Su et al. 2021, arXiv:2104.09864).

    Attributes:
        dim: rotated channels, even.
        interleaved: pairs are (0, 1), (2, 3), ... instead of (0, dim/2), (1, dim/2 + 1), ...
        tables: ``tables(n)`` returns cos and sin, float32 (n, dim / 2), for positions 0 to n - 1, as the model itself
            computes them for a sequence of n tokens (frequencies, long-context scaling and attention factor included).
    """

    dim: int
    interleaved: bool
    tables: Callable[[int], tuple[Tensor, Tensor]]


@dataclass(frozen=True, slots=True, eq=False)
class Attention:
    """Grouped-query attention: query head h reads key/value head ``h // (heads // kv_heads)``.

    Attributes:
        qkv: linears whose outputs, side by side, are [queries | keys | values]; one if fused in the model, three if not.
        out: output projection.
        heads, kv_heads, head_dim: sizes; keys and values are ``kv_heads * head_dim`` wide.
        scale: what ``q . k`` is multiplied by.
        rotary: index into :attr:`Program.rotaries`, or None for a layer without positions.
        q_norm, k_norm: applied before the rotation, per head if ``head_dim`` wide, else over all heads together.
        window: a token sees itself and the ``window - 1`` tokens before it; None sees all.
        softcap: scores become ``softcap * tanh(score / softcap)``; None leaves them.
    """

    qkv: tuple[Linear, ...]
    out: Linear
    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    rotary: int | None = None
    q_norm: Norm | None = None
    k_norm: Norm | None = None
    window: int | None = None
    softcap: float | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Mlp:
    """``down(act(gate(x)) * up(x))``, or ``down(act(up(x)))`` where ``gated`` is False.

    Attributes:
        up: linears whose outputs, side by side, are [gate | up] (or [up]); one if fused in the model.
        down: output projection.
        activation: a key of :data:`quantkit.kernels.program.reference.ACTIVATIONS`.
    """

    up: tuple[Linear, ...]
    down: Linear
    activation: str
    gated: bool = True


@dataclass(frozen=True, slots=True, eq=False)
class Experts:
    """A mixture of experts: the ``top_k`` most probable of them, ``sum_e weight_e * experts[e](x)``.

    ``weight`` is the softmax over all experts, divided by the sum over the chosen if ``normalize``, times ``scale``.
    """

    router: Linear
    experts: tuple[Mlp, ...]
    top_k: int
    normalize: bool
    scale: float = 1.0


@dataclass(frozen=True, slots=True, eq=False)
class Layer:
    """One decoder layer; see the module for what the norms and scales do."""

    attention: Attention
    mlp: Mlp | Experts
    attention_in: Norm | None = None
    attention_out: Norm | None = None
    mlp_in: Norm | None = None
    mlp_out: Norm | None = None
    parallel: bool = False
    attention_scale: float = 1.0
    mlp_scale: float = 1.0


@dataclass(frozen=True, slots=True, eq=False)
class Program:
    """A whole decoder.

    Attributes:
        name: class of the model, for messages.
        embedding: (vocabulary, hidden) float, or a module that looks rows up in a quantized table.
        embedding_scale: what a row is multiplied by.
        layers: in order.
        rotaries: the rotary embeddings that layers point at.
        final_norm: before the head.
        head: (vocabulary, hidden); shares the embedding's tensor where the two are tied.
        logit_scale, logit_softcap: see the module.
        rope_switch: rotary tables differ for sequences longer than this (LongRoPE); None where they never do.
        max_tokens: longest sequence the program describes; None if the model sets no limit.
    """

    name: str
    embedding: Tensor | nn.Module
    layers: tuple[Layer, ...]
    head: Linear
    final_norm: Norm | None = None
    rotaries: tuple[Rotary, ...] = ()
    embedding_scale: float = 1.0
    logit_scale: float = 1.0
    logit_softcap: float | None = None
    rope_switch: int | None = None
    max_tokens: int | None = None

    @property
    def hidden(self) -> int:
        """Width of the residual stream."""
        return int(self.embedding.shape[1])  # type: ignore[index, arg-type]

    def rows(self, ids: Tensor) -> Tensor:
        """Return the embedding's rows of int64 ``ids`` (...), float32 (..., hidden), not yet scaled."""
        return self.embedding[ids].float() if isinstance(self.embedding, Tensor) else self.embedding(ids).float()

    @property
    def tokens(self) -> int:
        """Number of tokens that the embedding knows."""
        return int(self.embedding.shape[0])  # type: ignore[index, arg-type]

    @property
    def vocabulary(self) -> int:
        """Number of logits."""
        return self.head.shape[0]

    def linears(self) -> Iterator[Linear]:
        """Yield every linear, in the order they run; the head is last."""
        for layer in self.layers:
            yield from layer.attention.qkv
            yield layer.attention.out
            mixture = layer.mlp
            if isinstance(mixture, Experts):
                yield mixture.router
            for mlp in mixture.experts if isinstance(mixture, Experts) else (mixture,):
                yield from mlp.up
                yield mlp.down
        yield self.head
