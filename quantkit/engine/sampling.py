"""From logits to the next token.

A language model returns one number per vocabulary entry. Greedy decoding takes the largest. Sampling reshapes the numbers
into a distribution and draws from it, in this order (the order of transformers, so results can be compared):

1. repetition penalty: tokens seen before become less likely (greedy decoding applies it too);
2. temperature ``t``: ``logits / t``;
3. top-k, 4. top-p (nucleus), 5. min-p: each sets the logits of unlikely tokens to -inf;
6. ``softmax``, then one draw.

Each step is a pure function on ``(..., V)``, and rows never look at each other. Each keeps at least the most likely token.

Papers: repetition penalty, Keskar et al. 2019 (arXiv 1909.05858); top-k, Fan et al. 2018 (arXiv 1805.04833); top-p,
Holtzman et al. 2020 (arXiv 1904.09751); min-p, Nguyen et al. 2024 (arXiv 2407.01082).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.errors import QuantkitError


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen. The default is greedy.

    Attributes:
        temperature: 0 takes the most likely token; 1 samples from the model's own distribution; lower is sharper.
        top_k: sample among the k most likely tokens; None for all.
        top_p: sample among the smallest set of tokens whose probability reaches p, in (0, 1]; None for all.
        min_p: sample among tokens at least this fraction as likely as the most likely one, in [0, 1]; None for all.
        repetition_penalty: > 1 makes tokens of the prompt and of the answer less likely to come again; 1 does nothing.
        seed: the same seed gives the same tokens on the same machine; None draws a fresh one.

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

    def generator(self, device: torch.device | str = "cpu") -> torch.Generator:
        """Return a fresh random generator on ``device``, seeded with :attr:`seed` or with entropy of the machine."""
        generator = torch.Generator(device)
        if self.seed is None:
            generator.seed()
        else:
            generator.manual_seed(self.seed)
        return generator


def penalize_repetition(logits: Tensor, previous_ids: Tensor, penalty: float) -> Tensor:
    """Divide positive logits, and multiply negative ones, of every token in ``previous_ids`` by ``penalty``, once each.

    Args:
        logits: (..., V).
        previous_ids: (..., T) int64 in [0, V), prompt and answer so far; repeats count once.
    """
    seen = logits.gather(-1, previous_ids)
    return logits.scatter(-1, previous_ids, torch.where(seen < 0, seen * penalty, seen / penalty))


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Set logits below the k-th largest to -inf. Ties with the k-th stay, so more than k tokens can remain."""
    if k >= logits.shape[-1]:
        return logits
    threshold = logits.topk(k, dim=-1).values[..., -1:]
    return logits.masked_fill(logits < threshold, -math.inf)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Keep the smallest set of most likely tokens whose probabilities sum to at least ``p``; set the rest to -inf.

    Computed from the unlikely end: a token goes when it and all less likely ones together have probability <= 1 - p.
    """
    ascending, order = logits.sort(dim=-1)
    goes = ascending.softmax(-1).cumsum(-1) <= 1 - p
    goes[..., -1] = False
    return logits.masked_fill(goes.scatter(-1, order, goes), -math.inf)


def keep_min_p(logits: Tensor, min_p: float) -> Tensor:
    """Set the logits of tokens less likely than ``min_p`` times the most likely token to -inf."""
    probabilities = logits.softmax(-1)
    largest = probabilities.amax(-1, keepdim=True)
    return logits.masked_fill((probabilities < min_p * largest) & (probabilities < largest), -math.inf)


def shape_logits(logits: Tensor, sampling: Sampling, previous_ids: Tensor | None = None) -> Tensor:
    """Apply everything :class:`Sampling` asks for, in the module's order, short of the draw.

    Args:
        logits: (..., V) of any float dtype.
        previous_ids: (..., T) int64; needed only when there is a repetition penalty.

    Returns:
        Float32 (..., V): the softmax of it is the distribution drawn from; its maximum is the greedy token.
    """
    logits = logits.float()
    if sampling.repetition_penalty != 1:
        if previous_ids is None:
            raise QuantkitError("repetition_penalty needs previous_ids: the tokens of the prompt and of the answer so far")
        logits = penalize_repetition(logits, previous_ids, sampling.repetition_penalty)
    if sampling.greedy:
        return logits
    logits = logits / sampling.temperature
    if sampling.top_k is not None:
        logits = keep_top_k(logits, sampling.top_k)
    if sampling.top_p is not None and sampling.top_p < 1:
        logits = keep_top_p(logits, sampling.top_p)
    if sampling.min_p is not None:
        logits = keep_min_p(logits, sampling.min_p)
    return logits


def sample(
    logits: Tensor, sampling: Sampling, generator: torch.Generator | None = None, previous_ids: Tensor | None = None
) -> Tensor:
    """Choose one token per row.

    Args:
        logits: (B, V) of any float dtype.
        sampling: how to choose.
        generator: source of randomness on the logits' device; unused when greedy. None is torch's global one.
        previous_ids: (B, T) int64; needed only when there is a repetition penalty.

    Returns:
        int64 (B,).

    Raises:
        QuantkitError: a row holds NaN, +inf or only -inf, so it has no most likely token.
    """
    logits = shape_logits(logits, sampling, previous_ids)
    largest, token = logits.max(-1)  # NaN counts as larger than every number, so one look at the maximum finds it
    if not torch.isfinite(largest).all():
        raise QuantkitError(
            f"the model's logits are not numbers one can choose from: largest {largest.tolist()}, want finite; "
            "look for NaN or overflow in the weights, or run in float32 or bfloat16 instead of float16"
        )
    if sampling.greedy:
        return token
    return torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(-1)


def _check(name: str, value: object, good: bool, want: str) -> None:
    if not good:
        raise QuantkitError(f"{name}={value!r}: want {want}")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
