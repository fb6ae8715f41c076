"""What a drafter is asked and answers, and how many tokens it is asked for."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from quantkit.engine.sampling import Noise, Sampling
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
    """

    number: int
    slot: int
    ids: Sequence[int]
    count: int
    sampling: Sampling
    noise: Noise


class Drafter(Protocol):
    """Guesses tokens."""

    def propose(self, asks: Sequence[Ask]) -> list[list[int]]:
        """Return for each ask at most ``count`` tokens that may follow its ``ids``; none where there is no good guess."""
        ...

    def forget(self, number: int) -> None:
        """Drop what is remembered of a sequence; it is finished."""
        ...


DRAFTERS: Registry[type[Drafter]] = Registry("drafter", package="quantkit.engine.drafters")
"""Drafters by name."""


class DraftLength:
    """How many drafts to ask for, for one request, from how many of the last ones were right.

    It grows by two when all were right, and falls to what was right (at least one) when not. After ``PATIENCE`` verifications
    in a row in which nothing was right, drafting pauses, for twice as many tokens each time, so that text which cannot be
    guessed costs next to nothing.

    Args:
        longest: never ask for more.
    """

    START, PATIENCE, FIRST_PAUSE, LONGEST_PAUSE = 4, 2, 8, 256

    def __init__(self, longest: int) -> None:
        self._longest, self._length = longest, min(self.START, longest)
        self._useless = self._wait = 0
        self._pause = self.FIRST_PAUSE

    def ask(self) -> int:
        """Return how many drafts to ask for now; 0 while pausing."""
        if self._wait:
            self._wait -= 1
            return 0
        return self._length

    def observe(self, drafted: int, accepted: int) -> None:
        """Learn from one verification of ``drafted`` >= 1 tokens."""
        if accepted:
            self._useless, self._pause = 0, self.FIRST_PAUSE
            self._length = min(self._length + 2, self._longest) if accepted == drafted else accepted
            return
        self._length = 1
        self._useless += 1
        if self._useless >= self.PATIENCE:
            self._wait, self._pause = self._pause, min(self._pause * 2, self.LONGEST_PAUSE)
            self._useless = self.PATIENCE - 1  # one more failure after the pause is enough
