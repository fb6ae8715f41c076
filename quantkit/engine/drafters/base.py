"""What a drafter is asked and answers, and how many tokens it is asked for."""

from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Protocol

from torch import Tensor

from quantkit.engine.sampling import Noise, Sampling, choose, shape_logits
from quantkit.registry import Registry


@dataclass(frozen=True, slots=True)
class Ask:
    """A request for drafts of one sequence.

    Attributes:
        number: names the sequence, for as long as it lives.
        slot: its place among the running, taken by others after it.
        ids: prompt and answer so far.
        count: at most so many tokens are useful, >= 1.
        sampling: how the engine chooses.
        noise: what the engine will choose its next tokens with.
        table: pages of the target, for a drafter that :attr:`~Drafter.shares_memory`: room for ``count`` tokens from the last
            one of ``ids`` on, which is not read yet.
    """

    number: int
    slot: int
    ids: Sequence[int]
    count: int
    sampling: Sampling
    noise: Noise
    table: Sequence[int] = ()


class Drafter(Protocol):
    """Guesses tokens.

    Attributes:
        shares_memory: it reads the target's keys and values and writes to where the verification will write after it.
    """

    shares_memory: bool

    def propose(self, asks: Sequence[Ask]) -> list[list[int]]:
        """Return for each ask at most ``count`` tokens that may follow its ``ids``; none where there is no good guess."""
        ...

    def forget(self, number: int) -> None:
        """Drop what is remembered of a sequence; it is finished."""
        ...


DRAFTERS: Registry[type[Drafter]] = Registry("drafter", package="quantkit.engine.drafters")
"""Drafters by name."""


class Costs:
    """What drafting costs on this machine: medians over the last steps that only decoded, by how many sequences did.

    A step of n sequences without drafts takes ``p``. A draft token adds ``d / n`` (the drafter's time for one, shared by those
    who draft together) and ``v`` (a row more to verify). Their sum over ``p / n`` decides how far drafting pays.
    """

    REMEMBERED, FIRST, UNKNOWN = 9, 2, 0.3

    def __init__(self) -> None:
        self._times = defaultdict[int, tuple[deque[float], deque[float]]](
            lambda: (deque(maxlen=self.REMEMBERED), deque(maxlen=self.REMEMBERED))
        )

    def observe(self, sequences: int, drafts: int, longest: int, drafting_s: float, step_s: float) -> None:
        """Learn from one step of ``sequences`` with ``drafts`` draft tokens in all, at most ``longest`` for one of them."""
        plain, draft = self._times[sequences]
        if not drafts:
            plain.append(step_s)
        elif plain:
            draft.append(drafting_s / longest / sequences + max(step_s - median(plain), 0.0) / drafts)

    def ratio(self, sequences: int) -> float | None:
        """Return what a draft token costs, in steps of its sequence; None until steps without drafts have been timed."""
        plain, draft = self._times[sequences]
        if len(plain) < self.FIRST:
            return None
        return median(draft) * sequences / max(median(plain), 1e-9) if draft else self.UNKNOWN


class DraftLength:
    """How many drafts to ask for, for one request, from how many of the last ones were right and what they cost.

    If every draft token is right with probability ``a``, ``k`` of them yield ``1 + a + ... + a^k`` tokens for the cost of
    ``1 + k * ratio`` (Leviathan et al. 2022, arXiv 2211.17192, section 3.5): the best k is taken. ``a`` is estimated from this
    request's verifications, older ones counting less. Where no k pays, drafting pauses and is tried again with a single
    token, after twice as many tokens each time, so that text which cannot be guessed costs next to nothing.

    Args:
        longest: never ask for more.
        guess: ``a`` before anything is known, counted as one token seen.
    """

    START, MEMORY, GAIN, FIRST_PAUSE, LONGEST_PAUSE = 0.75, 0.95, 1.03, 16, 256

    def __init__(self, longest: int, guess: float = START) -> None:
        self._longest = longest
        self._right, self._seen = guess, 1.0
        self._wait, self._pause, self._trying = 0, self.FIRST_PAUSE, False

    @property
    def acceptance(self) -> float:
        """The estimate of ``a``."""
        return self._right / self._seen

    def ask(self, ratio: float) -> int:
        """Return how many drafts to ask for now, each costing ``ratio`` of a step; 0 while pausing."""
        if self._wait:
            self._wait -= 1
            self._trying = self._wait == 0
            return 0
        if self._trying:  # until there is something to try
            return 1
        gains, tokens = [1.0], 1.0
        for k in range(1, self._longest + 1):
            tokens += self.acceptance**k
            gains.append(tokens / (1 + k * ratio))
        best = max(gains)
        if best >= self.GAIN:
            self._pause = self.FIRST_PAUSE
            return gains.index(best)
        self._wait, self._pause = self._pause, min(self._pause * 2, self.LONGEST_PAUSE)
        return 0

    def observe(self, drafted: int, accepted: int) -> None:
        """Learn from one verification of ``drafted`` >= 1 tokens; those after a wrong one say nothing."""
        tries = accepted + (accepted < drafted)
        memory = 1 / self._seen if self._trying else self.MEMORY**tries  # what was before a pause counts as one token
        self._right = self._right * memory + accepted
        self._seen = self._seen * memory + tries
        self._trying = False


def choose_drafts(asks: Sequence[Ask], written: dict[int, list[int]], logits: Tensor) -> list[int | None]:
    """Choose each ask's next draft as the engine would: with its sampling and the noise of that place.

    Args:
        asks: which sequences.
        written: the drafts of each so far, by number.
        logits: (asks, vocabulary), may be overwritten.

    Returns:
        A token for each; None where the logits are not usable.
    """
    penalized = any(ask.sampling.repetition_penalty != 1 for ask in asks)
    histories = [[*ask.ids, *written[ask.number]] for ask in asks] if penalized else None
    shaped = shape_logits(logits, [ask.sampling for ask in asks], histories, copy=False)
    noise = [ask.noise.row(len(written[ask.number]), shaped.shape[-1]) for ask in asks]
    tokens, usable = choose(shaped, noise)
    return [token if good else None for token, good in zip(tokens.tolist(), usable.tolist(), strict=True)]
