r"""Sampling parameters, and the choice of the next token from logits.

A language model returns one logit per vocabulary entry. Greedy decoding takes the largest. Sampling turns the logits into a
distribution and draws from it, in this order (that of transformers, so results can be compared):

1. bias: a number is added to the logits of chosen tokens;
2. repetition penalty: tokens of the prompt and the answer become less likely; 3. frequency and presence penalty: tokens of the
   answer become less likely by ``frequency * count + presence`` (these three are also applied in greedy decoding);
4. temperature ``t``: ``logits / t``;
5. top-k, 6. top-p (nucleus), 7. min-p: each sets the logits of unlikely tokens to -inf;
8. ``softmax``, then one draw.

Each stage is a pure function on ``(..., V)``; rows are independent, so a batch is processed at once, every row with its own
parameters. Each stage keeps at least the most likely token.

Draws use the Gumbel-max trick: with independent Gumbel noise :math:`g_i`, :math:`\arg\max_i \log p_i + g_i` is distributed as
p. The noise is a function of seed, position and token, so the answer of a request depends neither on the other requests of the
batch nor on drafts.

Paper: repetition penalty, Keskar et al. 2019 (arXiv 1909.05858); those of the filters are in
:mod:`quantkit.numerics.filters`.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

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
        frequency_penalty: subtracted from a token's logit once for each time that the answer has it, from -2 to 2.
        presence_penalty: subtracted once from the logit of every token that the answer has, from -2 to 2.
        logit_bias: token to a number that is added to its logit, from -100 (practically never) to 100 (practically always).

    Raises:
        QuantkitError: a value outside its range, or a filter together with temperature 0, where it has no effect.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    seed: int | None = None
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)

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
        for name in ("frequency_penalty", "presence_penalty"):
            value = getattr(self, name)
            _check(name, value, _is_number(value) and -2 <= value <= 2, "a number from -2 to 2; 0 has no effect")
        for token, bias in self.logit_bias.items():
            good = _is_int(token) and token >= 0 and _is_number(bias) and -100 <= bias <= 100
            _check("logit_bias", {token: bias}, good, "token ids with numbers from -100 to 100")
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

    @property
    def remembers(self) -> bool:
        """Whether the choice of a token depends on earlier ones, through a penalty."""
        return self.repetition_penalty != 1 or self.frequency_penalty != 0 or self.presence_penalty != 0

    @property
    def changes_logits(self) -> bool:
        """Whether logits are changed before temperature and filters."""
        return self.remembers or bool(self.logit_bias)


class History(NamedTuple):
    """The tokens before the one that is chosen.

    Attributes:
        ids: prompt and answer so far.
        prompt_tokens: how many of them are the prompt.
    """

    ids: Sequence[int]
    prompt_tokens: int = 0


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


def penalize_frequency(logits: Tensor, answer_ids: Sequence[int], frequency: float, presence: float) -> Tensor:
    """Subtract ``frequency`` for each time that a token occurred, and ``presence`` if it did.

    Args:
        logits: floating (V,).
        answer_ids: the answer so far, in [0, V).
        frequency: penalty per occurrence.
        presence: penalty for having occurred at all.

    Returns:
        A new tensor (V,).
    """
    counts = torch.bincount(torch.tensor(answer_ids, dtype=torch.int64), minlength=logits.shape[-1]).to(logits)
    return logits - counts * frequency - (counts > 0) * presence


def choose(
    logits: Tensor,
    samplings: Sequence[Sampling],
    seeds: Sequence[int],
    positions: Sequence[int],
    histories: Sequence[History] | None = None,
) -> list[int]:
    """Choose one token per row.

    Args:
        logits: floating (R, V).
        samplings: one per row.
        seeds: seed of the noise of each row; the seeds in ``samplings`` are not used.
        positions: position of each row in its sequence.
        histories: prompt and answer so far of each row; needed only for rows with a penalty.

    Returns:
        A token per row; -1 for a row whose logits contain NaN, +inf or only -inf.

    Raises:
        QuantkitError: a penalty without ``histories``.
    """
    return draw(penalize(logits, samplings, histories), samplings, seeds, positions)


def draw(logits: Tensor, samplings: Sequence[Sampling], seeds: Sequence[int], positions: Sequence[int]) -> list[int]:
    """Choose one token per row of logits that are penalized already; arguments and result as in :func:`choose`."""
    where = torch.tensor(positions, dtype=torch.int32, device=logits.device)
    chosen: list[int] = draw_tokens(logits, Draw.of(samplings, seeds, logits.device), where).tolist()
    return chosen  # one number per row from the device


def penalize(logits: Tensor, samplings: Sequence[Sampling], histories: Sequence[History] | None) -> Tensor:
    """Return the logits with biases and penalties applied to the rows that have some; arguments as in :func:`choose`."""
    changed = [(row, sampling) for row, sampling in enumerate(samplings) if sampling.changes_logits]
    if not changed:
        return logits
    shaped = logits.to(torch.float32, copy=True)
    for row, sampling in changed:
        if sampling.logit_bias:
            tokens = torch.tensor(list(sampling.logit_bias), device=logits.device)
            shaped[row, tokens] += torch.tensor(list(sampling.logit_bias.values()), device=logits.device)
        if not sampling.remembers:
            continue
        if histories is None:
            raise QuantkitError("penalties need histories: the tokens of the prompt and of the answer so far")
        ids, prompt_tokens = histories[row]
        if sampling.repetition_penalty != 1 and ids:
            shaped[row] = penalize_repetition(shaped[row], torch.tensor(ids, device=logits.device), sampling.repetition_penalty)
        if sampling.frequency_penalty or sampling.presence_penalty:
            answer = ids[prompt_tokens:]
            shaped[row] = penalize_frequency(shaped[row], answer, sampling.frequency_penalty, sampling.presence_penalty)
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
