r"""From logits to the next token.

A language model returns one number per vocabulary entry. Greedy decoding takes the largest. Sampling reshapes the numbers
into a distribution and draws from it, in this order (the order of transformers, so results can be compared):

1. repetition penalty: tokens seen before become less likely (greedy decoding applies it too);
2. temperature ``t``: ``logits / t``;
3. top-k, 4. top-p (nucleus), 5. min-p: each sets the logits of unlikely tokens to -inf;
6. ``softmax``, then one draw.

Each step is a pure function on ``(..., V)``, and rows never look at each other, so a batch is shaped at once, every row with
its own parameters. Each step keeps at least the most likely token.

The draw is a race: with independent Gumbel noise :math:`g_i`, :math:`\arg\max_i \log p_i + g_i` is distributed as p. The noise
is a function of seed, position and token, so neither a request's neighbours in the batch nor drafts change its answer.

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
        temperature: 0 takes the most likely token; 1 samples from the model's own distribution; lower is sharper.
        top_k: sample among the k most likely tokens; None for all.
        top_p: sample among the smallest set of tokens whose probability reaches p, in (0, 1]; None for all.
        min_p: sample among tokens at least this fraction as likely as the most likely one, in [0, 1]; None for all.
        repetition_penalty: > 1 makes tokens of the prompt and of the answer less likely to come again; 1 does nothing.
        seed: the same seed gives the same tokens, as far as the logits are the same; None draws a fresh one.

    Raises:
        QuantkitError: a value outside its range, or a filter given with temperature 0, where it could do nothing.
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
        _check("repetition_penalty", penalty, _is_number(penalty) and penalty > 0, "a positive number; 1 does nothing")
        _check(
            "seed",
            self.seed,
            self.seed is None or (_is_int(self.seed) and 0 <= self.seed < 2**63),
            "an integer in [0, 2**63), or None",
        )
        unused = [name for name in ("top_k", "top_p", "min_p") if getattr(self, name) is not None]
        if self.greedy and unused:
            raise QuantkitError(
                f"{', '.join(unused)} cannot change greedy decoding (temperature=0); give a temperature above 0 to sample, "
                "or leave them out"
            )

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is taken."""
        return self.temperature == 0


def penalize_repetition(logits: Tensor, previous_ids: Tensor, penalty: float | Tensor) -> Tensor:
    """Divide positive logits, and multiply negative ones, of every token in ``previous_ids`` by ``penalty``, once each.

    Args:
        logits: (..., V).
        previous_ids: (..., T) int64 in [0, V), prompt and answer so far; repeats count once.
        penalty: one number, or one per row (..., 1), as are the parameters of the other filters.
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
        logits: (R, V) of any float dtype.
        samplings: one per row.
        seeds: one per row, of its noise, whatever the sampling's own is.
        positions: of the rows in their sequences.
        histories: the tokens of prompt and answer so far of each row; needed only where there is a repetition penalty.

    Returns:
        A token per row; -1 for one whose logits hold NaN, +inf or only -inf.
    """
    where = torch.tensor(positions, dtype=torch.int32, device=logits.device)
    tokens = draw_tokens(penalize(logits, samplings, histories), Draw.of(samplings, seeds, logits.device), where)
    chosen: list[int] = tokens.tolist()  # one word from the device
    return chosen


def penalize(logits: Tensor, samplings: Sequence[Sampling], histories: Sequence[Sequence[int]] | None) -> Tensor:
    """Apply the repetition penalties of rows that have one; see :func:`choose`."""
    rows = [i for i, s in enumerate(samplings) if s.repetition_penalty != 1]
    if not rows:
        return logits
    if histories is None:
        raise QuantkitError("repetition_penalty needs the histories: the tokens of the prompt and of the answer so far")
    shaped = logits.to(torch.float32, copy=True)
    longest = max(len(histories[i]) for i in rows)
    padded = [[*histories[i], *[histories[i][-1]] * (longest - len(histories[i]))] for i in rows]  # repeats count once
    penalty = torch.tensor([[samplings[i].repetition_penalty] for i in rows], device=logits.device)
    shaped[rows] = penalize_repetition(shaped[rows], torch.tensor(padded, device=logits.device), penalty)
    return shaped


def not_finite() -> QuantkitError:
    """Return the error for a row of logits from which nothing can be chosen."""
    return QuantkitError(
        "the model's logits are not numbers one can choose from: the largest is NaN or infinite, want finite; "
        "look for NaN or overflow in the weights, or run in float32 or bfloat16 instead of float16"
    )


def _check(name: str, value: object, good: bool, want: str) -> None:
    if not good:
        raise QuantkitError(f"{name}={value!r}: want {want}")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
