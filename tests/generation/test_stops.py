"""Stop strings: the automaton against a plain search, its limits, and its cost."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantkit.errors import QuantkitError
from quantkit.generation.generate import generate
from quantkit.generation.stops import MAX_CHARACTERS, MAX_STRINGS, StopStrings
from quantkit.generation.text import TextStream, encode_prompt
from tests.tiny import tiny_llama, tiny_tokenizer

LETTERS = st.text("ab", max_size=40)


class Letters:
    """A tokenizer whose tokens are the numbers of characters."""

    def decode(self, ids, **options) -> str:
        return "".join(map(chr, ids))


def first_end(text: str, stops: list[str]) -> tuple[int, int] | None:
    """Return where the first complete string ends and how long it is, the longest of several."""
    for end in range(1, len(text) + 1):
        lengths = [len(stop) for stop in stops if text[:end].endswith(stop)]
        if lengths:
            return end, max(lengths)
    return None


@given(LETTERS, st.lists(st.text("ab", min_size=1, max_size=6), min_size=1, max_size=5), st.data())
def test_any_pieces_of_any_text_stop_at_the_first_complete_string(text, stops, data):
    automaton, state, read = StopStrings(stops), 0, 0
    want = first_end(text, stops)
    while read < len(text):
        piece = text[read : read + data.draw(st.integers(1, 5))]
        state, count, found = automaton.search(state, piece)
        read += count
        if found:
            assert want == (read, found)
            return
        held = automaton.pending(state)
        assert held == max((n for s in stops for n in range(len(s)) if text[:read].endswith(s[:n])), default=0)
    assert want is None


@given(LETTERS, st.lists(st.text("ab", min_size=1, max_size=6), max_size=5))
def test_a_stream_shows_the_text_before_the_string_and_never_a_part_of_it(text, stops):
    pieces: list[str] = []
    stream = TextStream(Letters(), stops, pieces.append)
    for character in text:
        if stream.add(ord(character)):
            break
    want = first_end(text, stops)
    assert stream.finish() == "".join(pieces) == (text if want is None else text[: want[0] - want[1]])


def test_the_cost_does_not_grow_with_the_length_of_the_strings():
    stops = ["a" * (MAX_CHARACTERS - 1) + "b"]
    stream = TextStream(Letters(), stops)
    started = time.perf_counter()
    for _ in range(20_000):
        assert not stream.add(97)
    assert time.perf_counter() - started < 5  # comparing every beginning took minutes


@pytest.mark.parametrize("text", ["\ufffd", ""])
def test_tokens_that_never_become_text_cost_no_more_and_more(text):
    longest = 0

    class Silent:
        def decode(self, ids, **options) -> str:
            nonlocal longest
            longest = max(longest, len(ids))
            return text * (len(ids) if text else 0)

    stream = TextStream(Silent())
    for token in range(2000):
        stream.add(token)
    assert longest < 200
    assert stream.finish() == text * 2000


@pytest.mark.parametrize(
    ("stop", "message"),
    [(["x"] * (MAX_STRINGS + 1), "want at most 64; leave some out"), ("x" * 900_000, "900000 characters in all, want at most")],
)
def test_stop_strings_have_limits(stop, message):
    with pytest.raises(QuantkitError, match=message):
        generate(tiny_llama(), "the cat", tiny_tokenizer(), stop=stop, max_new_tokens=2)


@pytest.mark.parametrize(
    "prompt",
    ["ab\ud83d", [{"role": "user", "content": "\ude00"}], [{"role": "user", "content": [{"type": "text", "text": "\ud83d"}]}]],
)
def test_half_of_an_emoji_is_named(prompt):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ messages }}"
    with pytest.raises(QuantkitError, match=r"half of a surrogate pair"):
        generate(tiny_llama(), prompt, tokenizer, max_new_tokens=2)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('no system role') }}", "refuses these messages: no system role"),
        ("{{ messages[7].content }}", "refuses these messages"),
        ("{{ messages[0].content + 1 }}", "refuses these messages"),
        ("{{ 1 / 0 }}", "refuses these messages: division by zero"),
        ("{% for %}", "refuses these messages"),
    ],
)
def test_a_template_that_fails_is_the_reason(template, message):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(QuantkitError, match=message):
        encode_prompt([{"role": "system", "content": "sing"}], tokenizer)


@pytest.mark.parametrize("token", [2**70, -(2**70)])
def test_ids_beyond_64_bits_are_named(token):
    with pytest.raises(QuantkitError, match="does not fit 64 bits"):
        generate(tiny_llama(), [1, token], max_new_tokens=2)
