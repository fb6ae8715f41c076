"""Sampling the next token of each row of logits, with temperature, top-k, top-p and min-p.

:func:`draw_plain` is the definition in plain torch. On a CPU with a compiler, :func:`draw_tokens` does the same natively
without sorting: a draw then costs about as much as reading the logits, whereas the plain version can take as long as a whole
step of a small model. CUDA has its own kernel, :mod:`quantkit.kernels.cuda.sampling`.

Thresholds are found exactly. Only the sums of probabilities that top-p compares are rounded differently, which can matter where
they equal ``1 - p`` to about six digits. The noise is a function of a row's seed, its position in the sequence and the token
(:mod:`quantkit.numerics.noise`), so a draw depends neither on the batch nor on how often a position is computed, and equal
seeds draw equal tokens on every device, as long as the logits are equal.
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
_COLDEST, _HOTTEST = 1e-20, 1e20  # beyond these, logits divided by a temperature leave the range of float32


class SamplingParameters(Protocol):
    """How tokens are sampled; :class:`quantkit.engine.sampling.Sampling` documents each parameter."""

    @property
    def temperature(self) -> float:
        """Divisor of the logits; 0 takes the most likely token."""
        ...

    @property
    def top_k(self) -> int | None:
        """Number of most likely tokens to sample from; None for all."""
        ...

    @property
    def top_p(self) -> float | None:
        """Total probability of the most likely tokens to sample from; None for all."""
        ...

    @property
    def min_p(self) -> float | None:
        """Smallest probability relative to the most likely token; None for all."""
        ...

    @property
    def changes_logits(self) -> bool:
        """Must be False here: penalties need the earlier tokens, and are applied to the logits by the engine."""
        ...

    @property
    def seed(self) -> int | None:
        """Seed of the noise; None for a random one."""
        ...


class Draw(NamedTuple):
    """Sampling parameters of several rows, as tensors.

    Attributes:
        temperature: float32 (rows,); 0 takes the most likely token, the first one of equals.
        top_k: int32 (rows,); the size of the vocabulary or more keeps all tokens.
        rest: float32 (rows,), ``1 - top_p``; 0 keeps all tokens.
        min_p: float32 (rows,); 0 keeps all tokens.
        seed: int64 (rows,).
    """

    temperature: Tensor
    top_k: Tensor
    rest: Tensor
    min_p: Tensor
    seed: Tensor

    @classmethod
    def greedy(cls, rows: int, device: torch.device | str) -> "Draw":
        """Return the parameters of greedy decoding for every row."""
        temperature, rest, min_p = (torch.zeros(rows, device=device) for _ in range(3))
        top_k = torch.full((rows,), _ALL, dtype=torch.int32, device=device)
        return cls(temperature, top_k, rest, min_p, torch.zeros(rows, dtype=torch.int64, device=device))

    @classmethod
    def of(cls, samplings: Sequence[SamplingParameters], seeds: Sequence[int | None], device: torch.device | str) -> "Draw":
        """Return sampling parameters as tensors. Penalties and biases are ignored; the engine applies them to the logits.

        Args:
            samplings: one per row.
            seeds: one per row, used instead of the seeds in ``samplings``; None takes a random one.
            device: device of the tensors.
        """
        values: tuple[tuple[list[float], torch.dtype], ...] = (
            ([_clamped(sampling.temperature) for sampling in samplings], torch.float32),
            ([_ALL if sampling.top_k is None else min(sampling.top_k, _ALL) for sampling in samplings], torch.int32),
            ([0.0 if sampling.top_p is None else 1 - sampling.top_p for sampling in samplings], torch.float32),
            ([sampling.min_p or 0.0 for sampling in samplings], torch.float32),
            ([secrets.randbits(63) if seed is None else seed for seed in seeds], torch.int64),
        )
        made = [torch.tensor(numbers, dtype=dtype) for numbers, dtype in values]
        return cls(*(made if str(device) == "cpu" else (part.to(device, non_blocking=True) for part in made)))

    def set(self, samplings: Sequence[SamplingParameters]) -> None:
        """Overwrite the parameters in place. A row without a seed gets a random one.

        Raises:
            KernelError: not one sampling per row, or a penalty, which needs the earlier tokens, or a bias.
        """
        if len(samplings) != len(self.seed):
            raise KernelError(f"{len(samplings)} samplings for {len(self.seed)} rows; want one per row")
        if any(sampling.changes_logits for sampling in samplings):
            raise KernelError(
                "penalties and biases cannot be applied on the device; leave them out, or apply them to the logits before"
            )
        for tensor, numbers in zip(self, Draw.of(samplings, [sampling.seed for sampling in samplings], "cpu"), strict=True):
            tensor.copy_(numbers)


def _clamped(temperature: float) -> float:
    """Return a temperature within the range where it makes a difference."""
    return min(max(temperature, _COLDEST), _HOTTEST) if temperature else 0.0


def draw_tokens(logits: Tensor, draw: Draw, positions: Tensor) -> Tensor:
    """Sample a token for each row.

    Args:
        logits: floating (rows, V).
        draw: sampling parameters, on the same device.
        positions: int32 (rows,), position of each row in its sequence.

    Returns:
        int32 (rows,); -1 where the largest logit is not finite.
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
    """Compute :func:`draw_tokens` in plain torch, on any device; this is its definition."""
    shaped = shape(logits, draw)
    largest, tokens = shaped.max(-1)  # torch orders NaN above all numbers, so the maximum reveals it
    drawn = draw.temperature > 0
    if drawn.any():
        noise = gumbel(logits.shape[-1], draw.seed, positions)
        tokens = torch.where(drawn, (shaped + noise).argmax(-1), shaped.argmax(-1))
    return torch.where(largest.isfinite(), tokens, -1).to(torch.int32)


def shape(logits: Tensor, draw: Draw) -> Tensor:
    """Divide the sampled rows by their temperature and apply top-k, top-p and min-p, in this order.

    Among tokens of equal probability at the threshold of top-p, only as many as needed are kept: those with the highest ids.

    Args:
        logits: floating (rows, V).
        draw: sampling parameters, on the same device.

    Returns:
        float32 (rows, V). The softmax of a row is the distribution to draw from; its maximum is the greedy token.
    """
    drawn, shaped = draw.temperature > 0, logits.float()
    if not drawn.any():
        return shaped
    shaped = shaped / torch.where(drawn, draw.temperature, 1.0)[:, None]
    filters = (
        (keep_top_k, draw.top_k < logits.shape[-1], draw.top_k.long()),
        (
            functools.partial(keep_top_p, stable=True),
            draw.rest > 0,
            1 - draw.rest.double(),
        ),  # float64: as exact as a Python number
        (keep_min_p, draw.min_p > 0, draw.min_p),
    )
    for keep, active, parameter in filters:
        rows = drawn & active
        if rows.any():
            shaped[rows] = keep(shaped[rows], parameter[rows][:, None])
    return shaped
