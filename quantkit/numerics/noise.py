"""Random numbers that are a function of where they are needed: seed, position in a sequence, and token.

So nothing is drawn ahead or kept, no batch, draft or device changes what a request draws, and every token's noise can be made
alone. Philox-4x32-10: Salmon, Moraes, Dror, Shaw: Parallel random numbers: as easy as 1, 2, 3 (SC 2011).
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_MULTIPLIERS, _WEYL = (0xD2511F53, 0xCD9E8D57), (0x9E3779B9, 0xBB67AE85)
_WORD = (1 << 32) - 1
_BELOW_ONE = 1 - 2.0**-24


def gumbel(size: int, seed: Tensor, positions: Tensor) -> Tensor:
    """Return the noise of the tokens 0 to ``size`` - 1 at some positions: float32 (rows, size).

    It is ``-log(e)`` of exponential noise ``e = -log(1 - u)``, u = (word + 1/2) / 2^32 of the token's word of Philox: token t
    has word ``t % 4`` of counter (t // 4, position, 0, 0) under the seed as the key.

    Args:
        size: of the vocabulary.
        seed: int64 (rows,).
        positions: integers (rows,).
    """
    count, positions = math.ceil(size / 4), positions.long()
    quads = torch.arange(count, device=seed.device).expand(len(seed), count)
    zeros = torch.zeros_like(quads)
    counter = (quads, (positions & _WORD)[:, None].expand_as(quads), zeros, zeros)
    words = torch.stack(philox(counter, (seed & _WORD, seed >> 32 & _WORD)), -1).flatten(1)[:, :size]
    return -torch.log(-torch.log1p(-((words.float() + 0.5) * 2.0**-32).clamp(max=_BELOW_ONE)))


def philox(counter: Sequence[Tensor], key: Sequence[Tensor]) -> list[Tensor]:
    """Return four random words of Philox-4x32-10 for each counter.

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
