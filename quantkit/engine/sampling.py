r"""Sampling parameters, and the choice of the next token from logits.

A language model returns one logit per vocabulary entry. Greedy decoding takes the largest. Sampling turns the logits into a
distribution and draws from it, in this order (that of transformers, so results can be compared):

1. repetition penalty: tokens that occurred before become less likely (also applied in greedy decoding);
2. temperature ``t``: ``logits / t``;
3. top-k, 4. top-p (nucleus), 5. min-p: each sets the logits of unlikely tokens to -inf;
6. ``softmax``, then one draw.

Each stage is a pure function on ``(..., V)``; rows are independent, so a batch is processed at once, every row with its own
parameters. Each stage keeps at least the most likely token.

Draws use the Gumbel-max trick: with independent Gumbel noise :math:`g_i`, :math:`\arg\max_i \log p_i + g_i` is distributed as
p. The noise is a function of seed, position and token, so the answer of a request depends neither on the other requests of the
batch nor on drafts.

Paper: repetition penalty, Keskar et al. 2019 (arXiv 1909.05858); those of the filters are in
:mod:`quantkit.numerics.filters`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.errors import QuantkitError
from quantkit.kernels.functions.sampling import Draw, draw_tokens


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen. The default is greedy.

    Attributes:
        temperature: 0 takes the most likely token; 1 samples from the model's own distribution; lower values sharpen it. Below
            1e-20 it is 1e-20, and above 1e20 it is 1e20, which draw the same tokens.
        top_k: sample from the k most likely tokens; None for all.
        top_p: sample from the smallest set of tokens whose total probability reaches p, in (0, 1]; None for all.
        min_p: sample from the tokens that are at least this fraction as likely as the most likely one, in [0, 1]; None for all.
        repetition_penalty: values above 1 make tokens of the prompt and the answer less likely to be repeated; 1 has no effect.
            From 0.01 to 100.
        seed: equal seeds give equal tokens, as long as the logits are equal; None takes a random seed.

    Raises:
        QuantkitError: a value outside its range, or a filter together with temperature 0, where it has no effect.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        _check(
            "temperature",
            self.temperature,
            _is_number(self.temperature) and self.temperature >= 0,
            "0 (greedy) or a positive number",
        )
        _check(
            "top_k",
            self.top_k,
            self.top_k is None or (_is_int(self.top_k) and self.top_k >= 1),
            "a positive integer, or None for all tokens",
        )
        _check(
            "top_p",
            self.top_p,
            self.top_p is None or (_is_number(self.top_p) and 0 < self.top_p <= 1),
            "a number in (0, 1], or None for all tokens",
        )
        _check(
            "min_p",
            self.min_p,
            self.min_p is None or (_is_number(self.min_p) and 0 <= self.min_p <= 1),
            "a number in [0, 1], or None for all tokens",
        )
        penalty = self.repetition_penalty
        _check(
            "repetition_penalty",
            penalty,
            _is_number(penalty) and 0.01 <= penalty <= 100,
            "a number from 0.01 to 100; 1 has no effect",
        )
        _check(
            "seed",
            self.seed,
            self.seed is None or (_is_int(self.seed) and 0 <= self.seed < 2**63),
            "an integer in [0, 2**63), or None",
        )
        unused = [name for name in ("top_k", "top_p", "min_p") if getattr(self, name) is not None]
        if self.greedy and unused:
            raise QuantkitError(
                f"{', '.join(unused)}: no effect on greedy decoding (temperature=0); give a temperature above 0 to sample, or "
                "leave it out"
            )

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return self.temperature == 0


def penalize_repetition(logits: Tensor, previous_ids: Tensor, penalty: float | Tensor) -> Tensor:
    """Divide the positive logits of every token in ``previous_ids`` by ``penalty``, and multiply the negative ones by it.

    Args:
        logits: floating (..., V).
        previous_ids: int64 (..., T) in [0, V), prompt and answer so far; a repeated token counts once.
        penalty: one number, or one per row (..., 1).

    Returns:
        A new tensor (..., V).
    """
    seen = logits.gather(-1, previous_ids)
    return logits.scatter(-1, previous_ids, torch.where(seen < 0, seen * penalty, seen / penalty))


def choose(
    logits: Tensor,
    samplings: Sequence[Sampling],
    seeds: Sequence[int],
    positions: Sequence[int],
    histories: Sequence[Sequence[int]] | None = None,
) -> list[int]:
    """Choose one token per row.

    Args:
        logits: floating (R, V).
        samplings: one per row.
        seeds: seed of the noise of each row; the seeds in ``samplings`` are not used.
        positions: position of each row in its sequence.
        histories: prompt and answer so far of each row; needed only for rows with a repetition penalty.

    Returns:
        A token per row; -1 for a row whose logits contain NaN, +inf or only -inf.

    Raises:
        QuantkitError: a repetition penalty without ``histories``.
    """
    where = torch.tensor(positions, dtype=torch.int32, device=logits.device)
    tokens = draw_tokens(penalize(logits, samplings, histories), Draw.of(samplings, seeds, logits.device), where)
    chosen: list[int] = tokens.tolist()  # one number per row from the device
    return chosen


def penalize(logits: Tensor, samplings: Sequence[Sampling], histories: Sequence[Sequence[int]] | None) -> Tensor:
    """Return the logits with repetition penalties applied to the rows that have one; arguments as in :func:`choose`."""
    rows = [i for i, s in enumerate(samplings) if s.repetition_penalty != 1]
    if not rows:
        return logits
    if histories is None:
        raise QuantkitError("repetition_penalty needs histories: the tokens of the prompt and of the answer so far")
    shaped = logits.to(torch.float32, copy=True)
    longest = max(len(histories[i]) for i in rows)
    padded = [[*histories[i], *[histories[i][-1]] * (longest - len(histories[i]))] for i in rows]  # repeats count once
    penalty = torch.tensor([[samplings[i].repetition_penalty] for i in rows], device=logits.device)
    shaped[rows] = penalize_repetition(shaped[rows], torch.tensor(padded, device=logits.device), penalty)
    return shaped


def not_finite() -> QuantkitError:
    """Return the error for a row of logits whose largest value is NaN or infinite."""
    return QuantkitError(
        "no token can be chosen: the model's largest logit is NaN or infinite, want finite logits; "
        "look for NaN or overflow in the weights, or run in float32 or bfloat16 instead of float16"
    )


def _check(name: str, value: object, good: bool, want: str) -> None:
    if not good:
        raise QuantkitError(f"{name}={value!r}: want {want}")


def _is_number(value: object) -> bool:
    if isinstance(value, int) and not isinstance(value, bool):
        return abs(value) < 2**1023  # larger ones do not fit a float
    return isinstance(value, float) and math.isfinite(value)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
