"""Guess that the text repeats itself: what followed the last words the last time they were said.

The longest n-gram (``longest`` down to ``shortest`` tokens) at the end of the sequence is looked up among earlier ones, and the
tokens after its most recent occurrence are the guess. Summaries, edits, code and lists repeat a lot; free prose does not.
Prompt lookup decoding: Saxena 2023 (github.com/apoorvumang/prompt-lookup-decoding). An index from n-grams to positions is kept
per sequence, so a step costs as much at token 10 as at token 10,000.
"""

from collections import defaultdict
from collections.abc import Sequence

from quantkit.engine.drafters.base import DRAFTERS, Ask
from quantkit.errors import QuantkitError


@DRAFTERS.register("ngram")
class NgramDrafter:
    """Prompt lookup.

    Args:
        longest: tokens of the longest n-gram looked up.
        shortest: of the shortest.

    Raises:
        QuantkitError: not 1 <= shortest <= longest.
    """

    shares_memory = False

    def __init__(self, longest: int = 4, shortest: int = 2) -> None:
        if not 1 <= shortest <= longest:
            raise QuantkitError(f"n-grams of {shortest} to {longest} tokens: want 1 <= shortest <= longest")
        self._sizes = range(longest, shortest - 1, -1)
        self._known: defaultdict[int, _Index] = defaultdict(_Index)

    def propose(self, asks: Sequence[Ask]) -> list[list[int]]:
        """See :class:`~quantkit.engine.drafters.base.Drafter`."""
        return [self._known[ask.number].look_up(ask.ids, self._sizes, ask.count) for ask in asks]

    def forget(self, number: int) -> None:
        """See :class:`~quantkit.engine.drafters.base.Drafter`."""
        self._known.pop(number, None)


class _Index:
    """Where each n-gram of one sequence was last followed by something."""

    def __init__(self) -> None:
        self._after: dict[tuple[int, ...], int] = {}
        self._indexed = 0

    def look_up(self, ids: Sequence[int], sizes: range, count: int) -> list[int]:
        for end in range(max(self._indexed, 1), len(ids)):  # n-grams that end before `end`, where their successor stands
            for size in sizes:
                if size <= end:
                    self._after[tuple(ids[end - size : end])] = end
        self._indexed = max(self._indexed, len(ids))
        for size in sizes:
            start = self._after.get(tuple(ids[-size:])) if size < len(ids) else None
            if start is not None:
                found = list(ids[start : start + count])
                while len(found) < count:  # the end of the text is within reach: what repeats once may repeat again
                    found.append(found[len(found) - (len(ids) - start)])
                return found
        return []
