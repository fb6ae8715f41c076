r"""Orthogonal matrices that spread any single number over all channels: Hadamard matrices of many sizes, scaled.

:math:`H H^T = n I` with entries :math:`\pm 1`, so every entry of :math:`H / \sqrt n` has the same size and an outlier in one
channel becomes a small number in all. Sizes are built as a product:

- powers of two by Sylvester's doubling;
- q + 1 for a prime q = 3 mod 4, and 2 (q + 1) for a prime q = 1 mod 4, from the quadratic residues mod q (Paley 1933,
  constructions I and II): 12, 20, 28, 36 ...;
- what is left (an odd factor without such a matrix) by a random orthogonal matrix, which spreads almost as evenly.

So 576 = 36 x 16 and 1536 = 12 x 128 have true Hadamard matrices. Everything is float64 and made from a seed.

What is applied at run time (:func:`hadamard_transform`) must be the same matrix for ever, so it uses neither signs nor anything
random: where no Hadamard matrix is known, channels are mixed within blocks of the largest power of two that divides their
number.
"""

import functools
import math

import torch
from torch import Tensor


def random_hadamard(size: int, seed: int = 0) -> Tensor:
    """Return an orthogonal float64 (size, size): a Hadamard matrix over sqrt(size) whose rows have random signs.

    Signs keep the average of a vector, which is often large, from ending up in one channel. A ``size`` of which no Hadamard
    matrix is known here gets the product of one with a random orthogonal matrix.
    """
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (size, 1), generator=generator).double() * 2 - 1
    return signs * _orthogonal(size, seed)


def hadamard_transform(x: Tensor, *, back: bool = False) -> Tensor:
    """Return ``x @ h.T`` for one orthogonal matrix h (n, n) per n; with ``back``, ``x @ h``, which undoes it.

    ``hadamard_transform(w) @ hadamard_transform(x)`` is ``w @ x``. h is the Kronecker product of two small matrices, so a row
    costs n (a + b) products with n = a b, for example 1536 x (12 + 128).

    Args:
        x: floating (..., n); n is at least 1.
        back: undo it.

    Returns:
        A tensor of x's shape and dtype, computed in float32 at least.
    """
    wide = x if x.dtype == torch.float64 else x.float()
    mixing, doubling = (part.to(wide) for part in rotation_factors(x.shape[-1]))
    parts = wide.reshape(-1, len(mixing), len(doubling))
    turned = ((mixing.T if back else mixing) @ parts) @ doubling  # Sylvester's matrix is its own transpose
    return turned.view(x.shape).to(x.dtype)


@functools.lru_cache(maxsize=16)
def rotation_factors(size: int) -> tuple[Tensor, Tensor]:
    """Return (a, a) and (b, b), orthogonal, a b = ``size``: a Hadamard matrix (or the identity) and Sylvester's."""
    small = size // (size & -size)
    while size % small == 0:
        found = sylvester(1) if small == 1 else paley(small)
        if found is not None:
            return found / math.sqrt(small), sylvester(size // small) / math.sqrt(size // small)
        small *= 2
    power = size & -size
    return torch.eye(size // power, dtype=torch.float64), sylvester(power) / math.sqrt(power)


def sylvester(size: int) -> Tensor:
    """Return the Hadamard matrix (size, size) of ``size``, a power of two: float64, entries 1 and -1."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while matrix.shape[0] < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix


def paley(size: int) -> Tensor | None:
    """Return a Hadamard matrix (size, size) by one of Paley's constructions over a prime, or None if neither gives one."""
    if _is_prime(size - 1) and (size - 1) % 4 == 3:
        skew = _conference(size - 1, -1.0)
        return skew + torch.eye(size, dtype=torch.float64)
    half = size // 2
    if size % 2 == 0 and _is_prime(half - 1) and (half - 1) % 4 == 1:
        plus, minus = torch.tensor([[1.0, 1.0], [1.0, -1.0]]).double(), torch.tensor([[1.0, -1.0], [-1.0, -1.0]]).double()
        return torch.kron(_conference(half - 1, 1.0), plus) + torch.kron(torch.eye(half, dtype=torch.float64), minus)
    return None


@functools.lru_cache(maxsize=8)
def _orthogonal(size: int, seed: int) -> Tensor:
    doubling = size & -size
    small = size // doubling
    if small == 1:
        return sylvester(size) / math.sqrt(size)
    while small <= size:
        found = paley(small)
        if found is not None:
            return torch.kron(found, sylvester(size // small)) / math.sqrt(size)
        if size % (2 * small):
            break
        small *= 2
    small = size // doubling
    generator = torch.Generator().manual_seed(seed)
    any_matrix = torch.linalg.qr(torch.randn(small, small, generator=generator, dtype=torch.float64))[0]
    return torch.kron(any_matrix.contiguous(), sylvester(doubling)) / math.sqrt(doubling)


def _conference(prime: int, corner: float) -> Tensor:
    """Return the bordered matrix (prime + 1, prime + 1) of quadratic characters of differences; ``corner`` signs its column."""
    residues = {(i * i) % prime for i in range(1, prime)}
    character = torch.tensor([0.0] + [1.0 if i in residues else -1.0 for i in range(1, prime)], dtype=torch.float64)
    index = torch.arange(prime)
    matrix = torch.zeros(prime + 1, prime + 1, dtype=torch.float64)
    matrix[0, 1:], matrix[1:, 0] = 1.0, corner
    matrix[1:, 1:] = character[(index.unsqueeze(1) - index) % prime]
    return matrix


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % factor for factor in range(2, math.isqrt(number) + 1))
