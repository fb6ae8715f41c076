"""Guess that the text repeats itself: propose what followed the last few tokens when they occurred before.

The longest n-gram (``longest`` down to ``shortest`` tokens) at the end of the sequence is looked up among the earlier ones, and
the tokens after its most recent occurrence are the guess. Summaries, edits, code and lists repeat a lot; free prose does not.
Prompt lookup decoding: Saxena 2023 (github.com/apoorvumang/prompt-lookup-decoding). Each sequence has an index from n-grams to
positions, so the cost per step does not grow with its length.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import ClassVar

from quantkit.engine.drafters.base import DRAFTERS, DrafterContext, DraftRequest
from quantkit.errors import QuantkitError


@DRAFTERS.register("ngram")
class NgramDrafter:
    """Prompt lookup.

    Args:
        longest: tokens of the longest n-gram that is looked up.
        shortest: tokens of the shortest one.

    Raises:
        QuantkitError: not 1 <= shortest <= longest.
    """

    needs_model: ClassVar[bool] = False
    shares_memory = False

    def __init__(self, longest: int = 4, shortest: int = 2) -> None:
        if not 1 <= shortest <= longest:
            raise QuantkitError(f"n-grams of {shortest} to {longest} tokens: want 1 <= shortest <= longest")
        self._sizes = range(longest, shortest - 1, -1)
        self._indexes: defaultdict[int, _Index] = defaultdict(_Index)

    @classmethod
    def make(cls, context: DrafterContext) -> "NgramDrafter":
        """Return a drafter with the default n-grams."""
        return cls()

    def propose(self, requests: Sequence[DraftRequest]) -> list[list[int]]:
        """See :class:`~quantkit.engine.drafters.base.Drafter`."""
        return [self._indexes[request.number].look_up(request.ids, self._sizes, request.count) for request in requests]

    def forget(self, number: int) -> None:
        """See :class:`~quantkit.engine.drafters.base.Drafter`."""
        self._indexes.pop(number, None)


class _Index:
    """The position after the most recent occurrence of each n-gram of one sequence."""

    def __init__(self) -> None:
        self._after: dict[tuple[int, ...], int] = {}
        self._indexed = 0

    def look_up(self, ids: Sequence[int], sizes: range, count: int) -> list[int]:
        for end in range(max(self._indexed, 1), len(ids)):  # n-grams before position `end`, where the next token is known
            for size in sizes:
                if size <= end:
                    self._after[tuple(ids[end - size : end])] = end
        self._indexed = max(self._indexed, len(ids))
        for size in sizes:
            start = self._after.get(tuple(ids[-size:])) if size < len(ids) else None
            if start is not None:
                found = list(ids[start : start + count])
                while len(found) < count:  # the end of the text is reached: continue with the guess itself, periodically
                    found.append(found[len(found) - (len(ids) - start)])
                return found
        return []
