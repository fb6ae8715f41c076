"""What a drafter is asked and answers, and how many tokens it is asked for."""

from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Protocol

from torch import Tensor

from quantkit.engine.sampling import Sampling, choose
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
        seed: of the noise with which the engine chooses.
        table: pages of the target, for a drafter that :attr:`~Drafter.shares_memory`: room for ``count`` tokens from the last
            one of ``ids`` on, which is not read yet.
    """

    number: int
    slot: int
    ids: Sequence[int]
    count: int
    sampling: Sampling
    seed: int
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
    """What drafting costs on this machine, from the last steps that only decoded; medians, so that an outlier is nothing.

    A step of n sequences takes ``p``. To draft k tokens for each adds ``k * d``, and to verify them ``v(k * n)``, by how many
    rows that makes: a few rows more cost little, until the kernels take another way. Each is kept by n.
    """

    REMEMBERED, FIRST, UNKNOWN_DRAFT, UNKNOWN_ROW = 9, 2, 0.3, 0.05

    def __init__(self) -> None:
        self._steps = defaultdict[int, dict[int, deque[float]]](dict)  # sequences -> drafts verified -> seconds of the step
        self._drafts = defaultdict[int, deque[float]](lambda: deque(maxlen=self.REMEMBERED))

    def observe(self, sequences: int, drafts: int, longest: int, drafting_s: float, step_s: float) -> None:
        """Learn from one step of ``sequences`` with ``drafts`` draft tokens in all, at most ``longest`` for one of them."""
        self._steps[sequences].setdefault(drafts, deque(maxlen=self.REMEMBERED)).append(step_s)
        if drafts:
            self._drafts[sequences].append(drafting_s / longest)

    def curve(self, sequences: int, longest: int) -> list[float] | None:
        """Return what 0 to ``longest`` drafts for each of ``sequences`` cost, in steps without; None before some were timed."""
        steps = self._steps[sequences]
        if len(steps.get(0, ())) < self.FIRST:
            return None
        known = {rows: median(times) for rows, times in steps.items()}
        plain = max(known.pop(0), 1e-9)
        draft = median(self._drafts[sequences]) / plain if self._drafts[sequences] else self.UNKNOWN_DRAFT
        added = {rows: max(time / plain - 1, 0.0) for rows, time in known.items()}
        added = {rows: min(cost for more, cost in added.items() if more >= rows) for rows in added}  # more rows, more work
        return [1 + k * draft + self._verify(added, k * sequences) for k in range(longest + 1)]

    def _verify(self, added: dict[int, float], rows: int) -> float:
        """Return what ``rows`` more cost, between and beyond those that are known."""
        below = max((known for known in added if known <= rows), default=0)
        above = min((known for known in added if known >= rows), default=0)
        least = added[below] if below else 0.0
        if below == rows:
            return least
        slope = (added[above] - least) / (above - below) if above else least / below if below else self.UNKNOWN_ROW
        return least + (rows - below) * slope


class DraftLength:
    """How many drafts to ask for, for one request, from how many of the last ones were right and what they cost.

    If every draft token is right with probability ``a``, ``k`` of them yield ``1 + a + ... + a^k`` tokens (Leviathan et al.
    2022, arXiv 2211.17192, section 3.1); over what they cost (:class:`Costs`), the best k is taken. ``a`` is estimated from
    this request's verifications, older ones counting less. Where no k pays, drafting pauses and is tried again with a single
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

    def ask(self, costs: Sequence[float]) -> int:
        """Return how many drafts to ask for now, where k cost ``costs[k]``; 0 while pausing."""
        if self._wait:
            self._wait -= 1
            self._trying = self._wait == 0
            return 0
        if self._trying:  # until there is something to try
            return 1
        gains, tokens = [1.0], 1.0
        for k in range(1, min(self._longest, len(costs) - 1) + 1):
            tokens += self.acceptance**k
            gains.append(tokens / costs[k])
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
        logits: (asks, vocabulary).

    Returns:
        A token for each; None where the logits are not usable.
    """
    penalized = any(ask.sampling.repetition_penalty != 1 for ask in asks)
    texts = [[*ask.ids, *written[ask.number]] for ask in asks] if penalized else None
    positions = [len(ask.ids) + len(written[ask.number]) - 1 for ask in asks]
    tokens = choose(logits, [ask.sampling for ask in asks], [ask.seed for ask in asks], positions, texts)
    return [token if token >= 0 else None for token in tokens]
