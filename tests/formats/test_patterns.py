"""Names of modules in a config from anywhere: the expressions of real checkpoints, and those that never end."""

import contextlib
import time

import pytest

from quantkit.errors import FormatError
from quantkit.formats.patterns import ModulePatterns, SearchTime

DEEP = "model.layers.0.self_attn.q_proj" * 4


@pytest.mark.parametrize(
    ("pattern", "name", "wanted"),
    [
        ("lm_head", "lm_head", True),
        ("lm_head", "model.lm_head", False),
        ("re:.*lm_head", "model.lm_head", True),
        ("re:model.layers.[0-9]+.mlp", "model.layers.12.mlp.down_proj", True),
        ("re:mlp", "model.layers.12.mlp.down_proj", False),
        (r"re:^(?!.*layers\.61\.).*", "model.layers.60.mlp", True),
        (r"re:^(?!.*layers\.61\.).*", "model.layers.61.mlp", False),
        ("all", "anything", True),
    ],
)
def test_patterns_mean_what_python_says(pattern, name, wanted):
    assert ModulePatterns([pattern], SearchTime(), frozenset(["all"])).match(name) is wanted


@pytest.mark.parametrize(
    "pattern", ["(([a-z._0-9])+)+!", "([a-z._0-9]*)*[!?]$", r"(\w|\.|_)*(\w|\.|_)*(\w|\.|_)*(\w|\.|_)*[!?]", r"(.*)*\1\1x"]
)
def test_a_search_without_end_is_ended(pattern):
    started = time.perf_counter()
    names = ModulePatterns([f"re:{pattern}"], SearchTime())
    with contextlib.suppress(FormatError):  # an engine of regular expressions may be clever enough for some
        assert not any(names.match(f"{DEEP}.{number}") for number in range(200))
    assert time.perf_counter() - started < 20


def test_many_slow_searches_share_one_limit(monkeypatch):
    monkeypatch.setattr("quantkit.formats.patterns.ALL_SEARCHES_S", 0.0)
    monkeypatch.setattr("quantkit.formats.patterns.PER_SEARCH_S", 0.0)
    with pytest.raises(FormatError, match="takes too long"):
        ModulePatterns(["re:a"], SearchTime()).match("b")


@pytest.mark.parametrize(
    ("pattern", "message"), [("re:(", "is not a regular expression"), ("re:" + "a" * 100_001, "at most 100000")]
)
def test_wrong_expressions_are_named(pattern, message):
    with pytest.raises(FormatError, match=message):
        ModulePatterns([pattern], SearchTime())


def test_thousands_of_expressions_are_refused():
    with pytest.raises(FormatError, match="1001 regular expressions, want at most 1000"):
        ModulePatterns(["re:a"] * 1001, SearchTime())


def test_tens_of_thousands_of_names_are_looked_up_not_searched():
    listed = [f"model.layers.{layer}.mlp.experts.{expert}" for layer in range(60) for expert in range(500)]
    names = ModulePatterns(listed, SearchTime())
    started = time.perf_counter()
    assert all(map(names.match, listed))
    assert time.perf_counter() - started < 5
