"""Factors that cost nothing: powers of two."""

import torch
from torch import Tensor

_LARGEST = 12
"""Largest exponent: 2^12 either way is far beyond any outlier, and far from float16's limits for weights."""


def powers_of_two(factors: Tensor) -> Tensor:
    """Return the nearest powers of two (in the logarithm), of magnitude 2^-12 to 2^12; ``factors`` are positive."""
    return torch.exp2(factors.log2().round().clamp(-_LARGEST, _LARGEST))
