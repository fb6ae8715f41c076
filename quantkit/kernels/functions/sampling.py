"""The next token of each row of logits: the most likely one, or a draw from what temperature, top-k, top-p and min-p leave.

:func:`draw_plain` defines it. On a CPU with a compiler :func:`draw_tokens` does the same natively, without sorting a row: a
draw costs about what reading the logits costs, where the plain one takes as long as a small model's whole step. Decoding on
CUDA has a kernel of its own, :mod:`quantkit.kernels.cuda.sampling`.

Thresholds are found exactly; only the sums of probabilities that top-p compares are rounded another way, which matters where
they meet ``1 - p`` to about the sixth digit. Noise is a function of a row's seed, its position in the sequence, and the token
(:mod:`quantkit.numerics.noise`): neither the batch nor how often a position is tried changes a draw, and one seed draws the
same tokens on every device, as far as the logits are the same.
"""

import functools
import secrets
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from quantkit.errors import KernelError
from quantkit.kernels import build
from quantkit.kernels.build import compiled
from quantkit.numerics.filters import keep_min_p, keep_top_k, keep_top_p
from quantkit.numerics.noise import gumbel

_ALL = (1 << 31) - 1


class Wish(Protocol):
    """How somebody wants tokens chosen; :class:`quantkit.engine.sampling.Sampling` says what each means."""

    @property
    def temperature(self) -> float:
        """0 takes the most likely token."""
        ...

    @property
    def top_k(self) -> int | None:
        """So many most likely tokens; None for all."""
        ...

    @property
    def top_p(self) -> float | None:
        """The most likely tokens that reach this probability; None for all."""
        ...

    @property
    def min_p(self) -> float | None:
        """Tokens at least this fraction as likely as the most likely one; None for all."""
        ...

    @property
    def repetition_penalty(self) -> float:
        """1, or it is refused: who knows the tokens before applies it."""
        ...

    @property
    def seed(self) -> int | None:
        """Of the noise; None for a fresh one."""
        ...


class Draw(NamedTuple):
    """How each of some rows is drawn.

    Attributes:
        temperature: float32 (rows,); 0 takes the first of the most likely tokens.
        top_k: int32 (rows,); the vocabulary's size or more keeps all.
        rest: float32 (rows,), ``1 - top_p``; 0 keeps all.
        min_p: float32 (rows,); 0 keeps all.
        seed: int64 (rows,).
    """

    temperature: Tensor
    top_k: Tensor
    rest: Tensor
    min_p: Tensor
    seed: Tensor

    @classmethod
    def greedy(cls, rows: int, device: torch.device | str) -> "Draw":
        """Return what takes the most likely token of every row."""
        temperature, rest, min_p = (torch.zeros(rows, device=device) for _ in range(3))
        top_k = torch.full((rows,), _ALL, dtype=torch.int32, device=device)
        return cls(temperature, top_k, rest, min_p, torch.zeros(rows, dtype=torch.int64, device=device))

    @classmethod
    def of(cls, wishes: Sequence[Wish], seeds: Sequence[int | None], device: torch.device | str) -> "Draw":
        """Return how one row per wish is drawn; a repetition penalty is somebody else's business.

        Args:
            wishes: one per row.
            seeds: one per row instead of the wish's own; None draws a fresh one.
            device: where the numbers go.
        """
        values: tuple[tuple[list[float], torch.dtype], ...] = (
            ([wish.temperature for wish in wishes], torch.float32),
            ([_ALL if wish.top_k is None else min(wish.top_k, _ALL) for wish in wishes], torch.int32),
            ([0.0 if wish.top_p is None else 1 - wish.top_p for wish in wishes], torch.float32),
            ([wish.min_p or 0.0 for wish in wishes], torch.float32),
            ([secrets.randbits(63) if seed is None else seed for seed in seeds], torch.int64),
        )
        made = [torch.tensor(numbers, dtype=dtype) for numbers, dtype in values]
        return cls(*(made if str(device) == "cpu" else (part.to(device, non_blocking=True) for part in made)))

    def set(self, wishes: Sequence[Wish]) -> None:
        """Write down, in place, how the rows are drawn from now on; a row without a seed gets a fresh one.

        Raises:
            KernelError: not one per row, or a repetition penalty, which wants to know the tokens before.
        """
        if len(wishes) != len(self.seed):
            raise KernelError(f"{len(wishes)} ways to choose a token for {len(self.seed)} rows")
        if any(wish.repetition_penalty != 1 for wish in wishes):
            raise KernelError("a repetition penalty is not applied on the device; the engine applies it")
        for tensor, numbers in zip(self, Draw.of(wishes, [wish.seed for wish in wishes], "cpu"), strict=True):
            tensor.copy_(numbers)


def draw_tokens(logits: Tensor, draw: Draw, positions: Tensor) -> Tensor:
    """Return the chosen token of each row, int32 (rows,); -1 where the largest logit is not a finite number.

    Args:
        logits: floating (rows, vocabulary).
        draw: how, on the same device.
        positions: int32 (rows,), of the rows in their sequences.
    """
    if logits.device.type != "cpu" or logits.dtype not in build.DTYPE_CODES or not compiled("sampling"):
        return draw_plain(logits, draw, positions)
    logits, (rows, size) = logits.contiguous(), logits.shape
    chosen = torch.empty(rows, dtype=torch.int32)
    scratch = torch.empty(rows * build.library().qk_draw_scratch(size))
    pointers = (part.data_ptr() for part in (logits, *draw, positions, chosen, scratch))
    build.library().qk_draw(*pointers, rows, size, build.DTYPE_CODES[logits.dtype], torch.get_num_threads())
    return chosen


def draw_plain(logits: Tensor, draw: Draw, positions: Tensor) -> Tensor:
    """Define :func:`draw_tokens` in plain torch, for any device."""
    shaped = shape(logits, draw)
    largest, tokens = shaped.max(-1)  # NaN counts as larger than every number, so one look at the maximum finds it
    drawn = draw.temperature > 0
    if drawn.any():
        noise = gumbel(logits.shape[-1], draw.seed, positions)
        tokens = torch.where(drawn, (shaped + noise).argmax(-1), shaped.argmax(-1))
    return torch.where(largest.isfinite(), tokens, -1).to(torch.int32)


def shape(logits: Tensor, draw: Draw) -> Tensor:
    """Divide rows that are drawn by their temperature, and set what top-k, top-p and min-p drop, in this order, to -inf.

    Of equals at the edge of top-p as many stay as are needed: the ones with the highest ids.

    Returns:
        Float32 (rows, vocabulary): the softmax of a row is the distribution drawn from; its maximum is the greedy token.
    """
    drawn, shaped = draw.temperature > 0, logits.float()
    if not drawn.any():
        return shaped
    shaped = shaped / torch.where(drawn, draw.temperature, 1.0)[:, None]
    filters = (
        (keep_top_k, draw.top_k < logits.shape[-1], draw.top_k.long()),
        (functools.partial(keep_top_p, stable=True), draw.rest > 0, 1 - draw.rest.double()),  # as exact as a plain number
        (keep_min_p, draw.min_p > 0, draw.min_p),
    )
    for keep, wanted, parameter in filters:
        rows = drawn & wanted
        if rows.any():
            shaped[rows] = keep(shaped[rows], parameter[rows][:, None])
    return shaped
