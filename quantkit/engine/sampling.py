r"""From logits to the next token.

A language model returns one number per vocabulary entry. Greedy decoding takes the largest. Sampling reshapes the numbers
into a distribution and draws from it, in this order (the order of transformers, so results can be compared):

1. repetition penalty: tokens seen before become less likely (greedy decoding applies it too);
2. temperature ``t``: ``logits / t``;
3. top-k, 4. top-p (nucleus), 5. min-p: each sets the logits of unlikely tokens to -inf;
6. ``softmax``, then one draw.

Each step is a pure function on ``(..., V)``, and rows never look at each other, so a batch is shaped at once, every row with
its own parameters. Each step keeps at least the most likely token.

The draw is a race: with independent exponential noise :math:`e_i`, :math:`\arg\max_i p_i / e_i` is distributed as p (the
same draw, from the same random numbers, as ``torch.multinomial``). A request takes one row of noise per token from a generator
of its own, so neither its neighbours in the batch nor drafts change its answer.

Paper: repetition penalty, Keskar et al. 2019 (arXiv 1909.05858); those of the filters are in
:mod:`quantkit.numerics.filters`.
"""

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.errors import QuantkitError
from quantkit.numerics.filters import keep_min_p, keep_top_k, keep_top_p


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


def penalize_repetition(logits: Tensor, previous_ids: Tensor, penalty: float | Tensor) -> Tensor:
    """Divide positive logits, and multiply negative ones, of every token in ``previous_ids`` by ``penalty``, once each.

    Args:
        logits: (..., V).
        previous_ids: (..., T) int64 in [0, V), prompt and answer so far; repeats count once.
        penalty: one number, or one per row (..., 1), as are the parameters of the other filters.
    """
    seen = logits.gather(-1, previous_ids)
    return logits.scatter(-1, previous_ids, torch.where(seen < 0, seen * penalty, seen / penalty))


def shape_logits(
    logits: Tensor, samplings: Sequence[Sampling], histories: Sequence[Sequence[int]] | None = None, *, copy: bool = True
) -> Tensor:
    """Apply everything :class:`Sampling` asks for, in the module's order, short of the draw.

    Args:
        logits: (R, V) of any float dtype.
        samplings: one per row.
        histories: the tokens of prompt and answer so far of each row; needed only where there is a repetition penalty.
        copy: leave ``logits`` as they are; False may overwrite float32 ones.

    Returns:
        Float32 (R, V): the softmax of a row is the distribution drawn from; its maximum is the greedy token.
    """
    shaped = logits.to(torch.float32, copy=copy)
    rows = [i for i, s in enumerate(samplings) if s.repetition_penalty != 1]
    if rows:
        if histories is None:
            raise QuantkitError("repetition_penalty needs the histories: the tokens of the prompt and of the answer so far")
        longest = max(len(histories[i]) for i in rows)
        padded = [[*histories[i], *[histories[i][-1]] * (longest - len(histories[i]))] for i in rows]  # repeats count once
        previous = torch.tensor(padded, device=logits.device)
        penalty = _column(logits, [samplings[i].repetition_penalty for i in rows])
        shaped[rows] = penalize_repetition(shaped[rows], previous, penalty)
    rows = [i for i, s in enumerate(samplings) if not s.greedy]
    if rows:
        shaped[rows] = shaped[rows] / _column(logits, [samplings[i].temperature for i in rows])
    rows = [i for i, s in enumerate(samplings) if s.top_k is not None]
    if rows:
        ranks = torch.tensor([[samplings[i].top_k] for i in rows], device=logits.device)
        shaped[rows] = keep_top_k(shaped[rows], ranks)
    rows = [i for i, s in enumerate(samplings) if s.top_p is not None and s.top_p < 1]
    if rows:
        mass = _column(logits, [samplings[i].top_p or 0 for i in rows], torch.float64)  # as exact as a plain number
        shaped[rows] = keep_top_p(shaped[rows], mass)
    rows = [i for i, s in enumerate(samplings) if s.min_p is not None]
    if rows:
        shaped[rows] = keep_min_p(shaped[rows], _column(logits, [samplings[i].min_p or 0 for i in rows]))
    return shaped


def choose(shaped: Tensor, noise: Sequence[Tensor | None]) -> tuple[Tensor, Tensor]:
    """Choose one token per row of shaped logits.

    Args:
        shaped: float32 (R, V) of :func:`shape_logits`.
        noise: per row, exponential noise (V,) of :class:`Noise`, or None to take the most likely token.

    Returns:
        Tokens int64 (R,), and bool (R,): whether the row is usable at all. One that holds NaN, +inf or only -inf is not.
    """
    largest, tokens = shaped.max(-1)  # NaN counts as larger than every number, so one look at the maximum finds it
    usable = torch.isfinite(largest)
    rows = [i for i, row in enumerate(noise) if row is not None]
    if rows:
        tokens = tokens.clone()
        race = torch.stack([row for row in noise if row is not None])
        tokens[rows] = (shaped[rows].softmax(-1) / race).argmax(-1)
    return tokens, usable


class Noise:
    """The random numbers of one request, in order: one row of exponential noise per token, drawn ahead where drafts want it.

    Args:
        sampling: its seed starts the generator; greedy sampling has no noise.
        device: where rows are drawn; other devices draw other numbers.
    """

    def __init__(self, sampling: Sampling, device: torch.device | str = "cpu") -> None:
        self._generator = None if sampling.greedy else sampling.generator(device)
        self._device = device
        self._ahead: deque[Tensor] = deque()

    def row(self, ahead: int, vocabulary: int) -> Tensor | None:
        """Return the noise (vocabulary,) of the token ``ahead`` tokens after the next one; None when greedy."""
        if self._generator is None:
            return None
        while len(self._ahead) <= ahead:
            row = torch.empty(vocabulary, device=self._device)
            self._ahead.append(row.exponential_(generator=self._generator))
        return self._ahead[ahead]

    def use(self) -> None:
        """Go on to the next token."""
        if self._ahead:
            self._ahead.popleft()


def not_finite(shaped: Tensor) -> QuantkitError:
    """Return the error for a row (V,) of logits from which nothing can be chosen."""
    return QuantkitError(
        f"the model's logits are not numbers one can choose from: largest {shaped.max().item()}, want finite; "
        "look for NaN or overflow in the weights, or run in float32 or bfloat16 instead of float16"
    )


def _column(like: Tensor, values: Sequence[float], dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.tensor(values, dtype=dtype, device=like.device)[:, None]


def _check(name: str, value: object, good: bool, want: str) -> None:
    if not good:
        raise QuantkitError(f"{name}={value!r}: want {want}")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
