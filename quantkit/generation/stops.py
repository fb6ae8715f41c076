"""Find the first of several strings in text that arrives in pieces, in time proportional to the text.

The strings become one automaton (Aho and Corasick 1975, doi 10.1145/360825.360855). Its states are the beginnings of the
strings; after each character it is in the state of the longest beginning that the text ends with. So one look-up per character,
amortized, says both whether a string is complete and how many characters could still become one, however long the strings are
and however many there are.
"""

import functools
from collections import deque
from collections.abc import Sequence

from quantkit.errors import QuantkitError

MAX_STRINGS = 64
"""Most stop strings of a request."""
MAX_CHARACTERS = 8192
"""Most characters of all stop strings of a request together."""


class StopStrings:
    """An automaton for some strings. It is not changed by a search, so several texts can share it.

    Args:
        strings: the strings, none of them empty.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        self._next: list[dict[str, int]] = [{}]  # state and character to state
        self._depth = [0]  # length of the beginning that a state stands for
        self._found = [0]  # length of the longest string that ends in a state; 0 for none
        for string in strings:
            self._insert(string)
        self._shorter = [0] * len(self._next)  # the longest other state that the text of a state ends with
        waiting = deque(self._next[0].values())
        while waiting:
            state = waiting.popleft()
            for character, following in self._next[state].items():
                self._shorter[following] = self._follow(self._shorter[state], character)
                waiting.append(following)
            self._found[state] = self._found[state] or self._found[self._shorter[state]]

    def search(self, state: int, text: str) -> tuple[int, int, int]:
        """Continue a search with more text, up to the end of the first string that is complete.

        Args:
            state: state after the text so far; 0 at its beginning.
            text: what follows it.

        Returns:
            The state; the number of characters of ``text`` that were read; and the length of the string that is complete
            there, the longest one of several, or 0.
        """
        for position, character in enumerate(text):
            state = self._follow(state, character)
            if self._found[state]:
                return state, position + 1, self._found[state]
        return state, len(text), 0

    def pending(self, state: int) -> int:
        """Return how many of the last characters could be the beginning of a string."""
        return self._depth[state]

    def _insert(self, string: str) -> None:
        state = 0
        for character in string:
            following = self._next[state].setdefault(character, len(self._next))
            if following == len(self._next):
                self._next.append({})
                self._depth.append(self._depth[state] + 1)
                self._found.append(0)
            state = following
        self._found[state] = len(string)

    def _follow(self, state: int, character: str) -> int:
        while (following := self._next[state].get(character)) is None:
            if not state:
                return 0
            state = self._shorter[state]
        return following


@functools.lru_cache(maxsize=16)
def stop_strings(strings: tuple[str, ...]) -> StopStrings:
    """Return the automaton for ``strings``; the answers of one request share it."""
    return StopStrings(strings)


def check_stops(strings: Sequence[str], name: str = "stop") -> None:
    """Refuse stop strings that are empty, too many, too long, or that no text can contain.

    Args:
        strings: the strings.
        name: what messages call them.

    Raises:
        QuantkitError: naming the reason and the limit.
    """
    if len(strings) > MAX_STRINGS:
        raise QuantkitError(f"{name}: {len(strings)} strings, want at most {MAX_STRINGS}; leave some out")
    for string in strings:
        if not string:
            raise QuantkitError(f"{name}: an empty string would end every answer; leave it out")
    if (total := sum(map(len, strings))) > MAX_CHARACTERS:
        raise QuantkitError(f"{name}: {total} characters in all, want at most {MAX_CHARACTERS}; give shorter strings")
