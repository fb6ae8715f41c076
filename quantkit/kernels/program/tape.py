"""A decoder as a tape: the steps that one token takes, for models that are not made of the layers of ``definition.py``.

Where a :class:`~quantkit.kernels.program.definition.Program` names the parts of a standard layer, a tape is the computation
itself. A *value* is a vector of floats that every token has; a step makes a value of others:

    Compute   arithmetic on a token's own values: elementwise, reductions, choices, small products
    Product   a linear layer
    Lookup    rows of a table, by token or position
    Attend    attention over the tokens before, whose keys and values are kept
    Mixture   the chosen ones of many feed-forward networks
    Load, Store   read and write a state, a vector that a sequence hands on from token to token

The result of token t depends on tokens before it only through what attention keeps and through states. Integers and truth
values are floats, exact up to 2^24. :mod:`quantkit.kernels.program.run_tape` defines the result in plain torch;
``quantkit/hf/lowering/record.py`` writes tapes of models that it watches.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import Tensor, nn

from quantkit.kernels.program.definition import Cache, Linear

TOKEN, POSITION = 0, 1
"""Numbers of the values that a token has at first: its id and its position."""


@dataclass(frozen=True, slots=True, eq=False)
class Read:
    """An array that a step reads: element (i, j, ...) is ``source[offset + i * strides[0] + j * strides[1] + ...]``.

    Attributes:
        source: number of a value, or a constant, float32 and one-dimensional.
        offset: index of the first element.
        shape, strides: at most :data:`MOST_AXES` axes.
    """

    source: int | Tensor
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def is_run(self) -> bool:
        """Whether the elements are neighbours in a value, in order."""
        return isinstance(self.source, int) and len(self.shape) == 1 and (self.shape[0] == 1 or self.strides == (1,))


MOST_AXES = 6


@dataclass(frozen=True, slots=True, eq=False)
class Compute:
    """Arithmetic on a token's own values.

    Attributes:
        op: a key of :data:`quantkit.kernels.program.run_tape.MAPS` or one of its ``ROWS``.
        reads: the operands. Those of a map have the same shape, which is that of the result.
        out: number of the result.
        numbers: parameters of the operation.
    """

    op: str
    reads: tuple[Read, ...]
    out: int
    numbers: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class Place:
    """Where a piece of a :class:`Join` goes: as in :class:`Read`, in the result."""

    offset: int
    strides: tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Join:
    """Copy pieces into one value."""

    reads: tuple[Read, ...]
    places: tuple[Place, ...]
    out: int


@dataclass(frozen=True, slots=True, eq=False)
class Product:
    """``out = linear(x)``; ``x`` is a run."""

    linear: Linear
    reads: tuple[Read]
    out: int


@dataclass(frozen=True, slots=True, eq=False)
class Lookup:
    """``out = table[i]``; the table is (rows, n), float or quantized, and the index one element."""

    table: Tensor | nn.Module
    reads: tuple[Read]
    out: int


@dataclass(frozen=True, slots=True, eq=False)
class Attend:
    """Attention: query head h reads key and value head ``h // (heads // kv_heads)``.

    Attributes:
        reads: queries (heads * key_dim), keys (kv_heads * key_dim), values (kv_heads * value_dim), each a run.
        cache: number of the keys and values that are kept.
        append: whether the token's own are added first; False where an earlier step has done it.
        window: a token sees itself and the ``window - 1`` tokens before it; None for all.
        chunk: a token sees those of its own chunk of so many positions; None for no chunks.
        sinks: float32 (heads,), a logit per head in the softmax that has no value; None for none.
        slopes: float32 (heads,): scores grow by this much per position (ALiBi, Press et al. 2022, arXiv:2108.12409).
    """

    reads: tuple[Read, Read, Read]
    out: int
    heads: int
    kv_heads: int
    key_dim: int
    value_dim: int
    cache: int
    append: bool
    scale: float
    window: int | None = None
    chunk: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None
    slopes: Tensor | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Expert:
    """One of many feed-forward networks: ``down(inner(up(x)))``."""

    up: Linear
    down: Linear


@dataclass(frozen=True, slots=True, eq=False)
class Mixture:
    """``out = sum_i weight_i * outer(down_e(inner(up_e(x))))`` with ``e = index_i``; an index of no expert adds nothing.

    Attributes:
        reads: x, the indices (k,) and their weights (k,), each a run.
        inner: what is computed between the two products; its value 0 is the output of ``up``.
        outer: what is computed after the second; None for nothing.
    """

    experts: tuple[Expert, ...]
    reads: tuple[Read, Read, Read]
    out: int
    inner: "Steps"
    outer: "Steps | None" = None


@dataclass(frozen=True, slots=True, eq=False)
class Load:
    """``out = state``; zeros for a sequence's first token."""

    state: int
    out: int
    reads: tuple[Read, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class Store:
    """``state = x``, a run, for the next token of the sequence."""

    state: int
    reads: tuple[Read]
    out: int = -1


Step = Compute | Join | Product | Lookup | Attend | Mixture | Load | Store


@dataclass(frozen=True, slots=True, eq=False)
class Steps:
    """Some steps, their values' widths, and the read of the result."""

    steps: tuple[Step, ...]
    widths: dict[int, int]
    result: Read


@dataclass(frozen=True, slots=True, eq=False)
class Tape:
    """A whole decoder.

    Attributes:
        name: class name of the model, for messages.
        body: the steps; their result is what the head reads, a run.
        head: output head (vocabulary, hidden).
        caches: what attention keeps per token.
        states: number of floats of each state.
        tokens: number of known token ids.
        vocabulary: number of logits; the head may have more rows.
        logit_scale, logit_softcap: as in ``definition.py``.
        max_tokens: longest sequence that the tape describes; None for no limit.
    """

    name: str
    body: Steps
    head: Linear
    caches: tuple[Cache, ...]
    states: tuple[int, ...]
    tokens: int
    logit_scale: float = 1.0
    logit_softcap: float | None = None
    max_tokens: int | None = None
    rope_switch: None = field(default=None, init=False)

    @property
    def vocabulary(self) -> int:
        """Number of logits."""
        return self.head.shape[0]

    @property
    def extent(self) -> str:
        """How much it is, for messages."""
        return f"{len(self.body.steps)} recorded steps"

    def linears(self) -> Iterator[Linear]:
        """Yield all linears; the head is the last one."""
        for step in self.body.steps:
            if isinstance(step, Product):
                yield step.linear
            elif isinstance(step, Mixture):
                for expert in step.experts:
                    yield from (expert.up, expert.down)
        yield self.head
