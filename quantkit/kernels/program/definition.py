"""A decoder as a frozen program: what a standard causal language model computes, independent of its model class.

For tokens ``t`` at positions ``p``, with ``N`` a norm (or nothing), ``A`` attention and ``F`` a feed-forward network:

    x = embedding[t] * embedding_scale
    for each layer, sequential:   x = x + attention_scale * N_ao(A(N_ai(x)));   x = x + mlp_scale * N_mo(F(N_mi(x)))
    or parallel:                  x = x + attention_scale * N_ao(A(N_ai(x))) + mlp_scale * N_mo(F(N_mi(x)))
    logits = cap * tanh(head(N(x)) * logit_scale / cap), or without the tanh

One description covers many families: llama (norms before), gemma (norms before and after), olmo2 (norms after) and cohere
(parallel blocks) differ only in which norms exist. :mod:`quantkit.kernels.program.reference` defines the result in plain torch;
backends such as :mod:`quantkit.kernels.cpu.decoder` run a program in one call. ``quantkit/hf/lowering/lower.py`` derives
programs from models and verifies them.

Weights are referenced, not copied: a weight is a float tensor (out, in) or the model's quantized module.
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
        expert: index of the matrix in a stack; None for a single matrix.
    """

    weight: Tensor | nn.Module
    shape: tuple[int, int]
    bias: Tensor | None = None
    expert: int | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Norm:
    """``(x - mean) / sqrt(variance + eps) * gain + shift`` over the last axis; an RMS norm does not subtract the mean.

    Attributes:
        center: whether the mean is subtracted (LayerNorm) or not (RMSNorm).
        gain: float32 (n,), including the 1 of gemma's ``1 + weight``.
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
        dim: number of rotated channels, even.
        interleaved: whether the pairs are (0, 1), (2, 3), ... instead of (0, dim/2), (1, dim/2 + 1), ...
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
        qkv: linears whose concatenated outputs are [queries | keys | values]: one if the model fuses them, else three.
        out: output projection.
        heads, kv_heads, head_dim: sizes; keys and values have ``kv_heads * head_dim`` channels.
        scale: factor of the scores ``q . k``.
        rotary: index into :attr:`Program.rotaries`; None for a layer without position embedding.
        q_norm, k_norm: norms before the rotation, per head if their gain has ``head_dim`` elements, else over all heads.
        window: a token sees itself and the ``window - 1`` tokens before it; None for all tokens before it.
        softcap: scores become ``softcap * tanh(score / softcap)``; None for no cap.
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
        up: linears whose concatenated outputs are [gate | up] (or [up]); one if the model fuses them.
        down: output projection.
        activation: a key of :data:`quantkit.kernels.program.reference.ACTIVATIONS`.
    """

    up: tuple[Linear, ...]
    down: Linear
    activation: str
    gated: bool = True


@dataclass(frozen=True, slots=True, eq=False)
class Experts:
    """A mixture of experts: ``sum_e weight_e * experts[e](x)`` over the ``top_k`` most probable experts.

    ``weight`` is the softmax over all experts, divided by its sum over the chosen ones if ``normalize``, times ``scale``.
    """

    router: Linear
    experts: tuple[Mlp, ...]
    top_k: int
    normalize: bool
    scale: float = 1.0


@dataclass(frozen=True, slots=True, eq=False)
class Layer:
    """One decoder layer; the module's docstring defines norms and scales."""

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
class Cache:
    """What one attention keeps per token: ``kv_heads`` keys of ``key_dim`` channels and as many values of ``value_dim``."""

    kv_heads: int
    key_dim: int
    value_dim: int


@dataclass(frozen=True, slots=True, eq=False)
class Program:
    """A whole decoder.

    Attributes:
        name: class name of the model, for messages.
        embedding: float (vocabulary, hidden), or a module that looks up rows of a quantized table.
        embedding_scale: factor of the embedding rows.
        layers: decoder layers in order.
        rotaries: the rotary embeddings that layers refer to.
        final_norm: norm before the head.
        head: output head (vocabulary, hidden); it shares the embedding's tensor if the two are tied.
        logit_scale, logit_softcap: see the module's docstring.
        rope_switch: length beyond which the rotary tables of a sequence change (LongRoPE); None if they never do.
        max_tokens: longest sequence that the program describes; None for no limit.
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
        """Number of channels of the residual stream."""
        return int(self.embedding.shape[1])  # type: ignore[index, arg-type]

    @property
    def caches(self) -> tuple[Cache, ...]:
        """What the attention of every layer keeps."""
        parts = (layer.attention for layer in self.layers)
        return tuple(Cache(part.kv_heads, part.head_dim, part.head_dim) for part in parts)

    @property
    def extent(self) -> str:
        """How much it is, for messages."""
        return f"{len(self.layers)} layers"

    @property
    def states(self) -> tuple[int, ...]:
        """Sizes of what a sequence hands on besides keys and values: nothing."""
        return ()

    def rows(self, ids: Tensor) -> Tensor:
        """Return the embedding rows of int64 ``ids`` (...), float32 (..., hidden), without ``embedding_scale``."""
        return self.embedding[ids].float() if isinstance(self.embedding, Tensor) else self.embedding(ids).float()

    @property
    def tokens(self) -> int:
        """Number of rows of the embedding."""
        return int(self.embedding.shape[0])  # type: ignore[index, arg-type]

    @property
    def vocabulary(self) -> int:
        """Number of logits."""
        return self.head.shape[0]

    def linears(self) -> Iterator[Linear]:
        """Yield all linears in the order in which they run; the head is the last one."""
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
