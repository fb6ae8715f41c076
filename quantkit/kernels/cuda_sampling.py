"""The next token of each row, chosen on the device: one kernel reads the logits, and nothing waits for the host.

How a row is drawn stands in device memory (:class:`Draw`): a recorded step follows it without being recorded again. The order
is that of :func:`quantkit.engine.sampling.shape_logits`: temperature, top-k, top-p, min-p. Its thresholds are found exactly;
only the sums of probabilities that top-p compares are rounded another way, which matters where they meet ``1 - p`` to about
the sixth digit. Of equals at the edge of top-p as many stay as there, and here they are the ones with the highest ids.

Noise is a function of a row's seed, its position in the sequence, and the token: neither the batch nor how often a position is
tried changes a draw. It is not the noise of the engine's generators, so the same seed gives other tokens there.
"""

import math
import secrets
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from quantkit.errors import KernelError
from quantkit.kernels.build import DTYPE_CODES
from quantkit.kernels.cuda_calls import launch, pointer, struct
from quantkit.numerics.filters import keep_min_p, keep_top_k, keep_top_p

SampleStruct = struct("SampleStruct", "logits temperature top_k rest min_p seed position chosen", "rows n dtype")

_ALL = (1 << 31) - 1
_MULTIPLIERS, _WEYL = (0xD2511F53, 0xCD9E8D57), (0x9E3779B9, 0xBB67AE85)
_WORD = (1 << 32) - 1


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
        """1, or it is refused."""
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

    def set(self, wishes: Sequence[Wish]) -> None:
        """Write down, in place, how the rows are drawn from now on; a row without a seed gets a fresh one.

        Raises:
            KernelError: not one per row, or a repetition penalty, which wants to know the tokens before.
        """
        if len(wishes) != len(self.seed):
            raise KernelError(f"{len(wishes)} ways to choose a token for {len(self.seed)} rows")
        if any(wish.repetition_penalty != 1 for wish in wishes):
            raise KernelError("a repetition penalty is not applied on the device; the engine applies it")
        values: tuple[list[float], ...] = (
            [wish.temperature for wish in wishes],
            [_ALL if wish.top_k is None else min(wish.top_k, _ALL) for wish in wishes],
            [0.0 if wish.top_p is None else 1 - wish.top_p for wish in wishes],
            [wish.min_p or 0.0 for wish in wishes],
            [secrets.randbits(63) if wish.seed is None else wish.seed for wish in wishes],
        )
        for tensor, numbers in zip(self, values, strict=True):
            tensor.copy_(torch.tensor(numbers, dtype=tensor.dtype))


def sample(logits: Tensor, draw: Draw, positions: Tensor) -> Tensor:
    """Return the chosen token of each row, int32 (rows,).

    A row without a finite number gets some token.

    Args:
        logits: float16 or bfloat16 (rows, vocabulary), contiguous.
        draw: how.
        positions: int32 (rows,), of the rows in their sequences.
    """
    chosen = torch.empty(len(logits), dtype=torch.int32, device=logits.device)
    filled = SampleStruct(*map(pointer, (logits, *draw, positions, chosen)), *logits.shape, DTYPE_CODES[logits.dtype])
    launch("qk_sample", filled, logits.device)
    return chosen


def sample_plain(logits: Tensor, draw: Draw, positions: Tensor) -> Tensor:
    """Define :func:`sample` in plain torch, for logits of any float dtype."""
    drawn, size = draw.temperature > 0, logits.shape[-1]
    shaped = logits.float()
    if not drawn.any():
        return shaped.argmax(-1).to(torch.int32)
    shaped = shaped / torch.where(drawn, draw.temperature, 1.0)[:, None]
    shaped = keep_top_k(shaped, draw.top_k.long().clamp(max=size)[:, None])
    cut = draw.rest > 0
    if cut.any():
        shaped[cut] = keep_top_p(shaped[cut], 1 - draw.rest[cut].double()[:, None], stable=True)
    shaped = keep_min_p(shaped, draw.min_p[:, None])
    noise = gumbel(size, draw.seed, positions)
    return torch.where(drawn, (shaped + noise).argmax(-1), shaped.argmax(-1)).to(torch.int32)


def gumbel(size: int, seed: Tensor, positions: Tensor) -> Tensor:
    """Return the noise of the tokens 0 to ``size`` - 1 at some positions: float32 (rows, size).

    It is ``-log(e)`` of exponential noise ``e = -log(1 - w)``, w = (word + 1/2) / 2^32 of the token's word of Philox: token t
    has word ``t % 4`` of counter (t // 4, position, 0, 0) under the seed as the key.
    """
    count, positions = math.ceil(size / 4), positions.long()
    quads = torch.arange(count, device=seed.device).expand(len(seed), count)
    zeros = torch.zeros_like(quads)
    counter = (quads, (positions & _WORD)[:, None].expand_as(quads), zeros, zeros)
    words = torch.stack(philox(counter, (seed & _WORD, seed >> 32 & _WORD)), -1).flatten(1)[:, :size]
    return -torch.log(-torch.log1p(-(words.float() + 0.5) * 2.0**-32))


def philox(counter: Sequence[Tensor], key: Sequence[Tensor]) -> list[Tensor]:
    """Return four random words of Philox-4x32-10 for each counter.

    Salmon, Moraes, Dror, Shaw: Parallel random numbers: as easy as 1, 2, 3 (SC 2011).

    Args:
        counter: four int64 (rows, n) of 32-bit numbers.
        key: two int64 (rows,) of them.
    """
    c, (key0, key1) = list(counter), key
    for _ in range(10):
        (high0, low0), (high1, low1) = (_product(c[at], by) for at, by in zip((0, 2), _MULTIPLIERS, strict=True))
        c = [high1 ^ c[1] ^ key0[:, None], low1, high0 ^ c[3] ^ key1[:, None], low0]
        key0, key1 = key0 + _WEYL[0] & _WORD, key1 + _WEYL[1] & _WORD
    return c


def _product(values: Tensor, by: int) -> tuple[Tensor, Tensor]:
    """Return the upper and the lower word of a product of two 32-bit numbers, which 63 bits do not hold."""
    low = (values & 0xFFFF) * by
    high = (values >> 16) * by + (low >> 16)
    return high >> 16, (high & 0xFFFF) << 16 | low & 0xFFFF
