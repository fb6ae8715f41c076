"""The allocation is the best there is, for every budget."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantkit.errors import SpecError
from quantkit.mixed.allocate import Allocation, Option
from quantkit.mixed.budget import Budget

OPTIONS = st.lists(st.builds(Option, st.integers(1, 60), st.floats(0, 10, allow_nan=False)), min_size=1, max_size=4)


@settings(max_examples=60, deadline=None)
@given(st.lists(OPTIONS, min_size=1, max_size=5), st.integers(1, 250))
def test_no_choice_within_the_budget_loses_less(groups, budget):
    allocation = Allocation(groups)
    every = [c for c in itertools.product(*(range(len(g)) for g in groups)) if allocation.weight(c) <= budget]
    found = allocation.at(budget)
    if not every:
        assert found is None
        return
    assert found is not None
    assert allocation.weight(found) <= budget
    assert allocation.loss(found) == pytest.approx(min(map(allocation.loss, every)))


def test_weights_that_have_no_common_unit_are_never_exceeded_and_hardly_missed(monkeypatch):
    monkeypatch.setattr("quantkit.mixed.allocate.MOST_STEPS", 4096)
    groups = [[Option(1_000_003 + 7 * g, 4.0 + g), Option(2_000_001 + 11 * g, 1.0), Option(3_100_007, 0.1)] for g in range(40)]
    allocation = Allocation(groups)
    for budget in (60_000_000, 80_000_001, 110_000_000):
        found = allocation.at(budget)
        assert budget * 0.97 < allocation.weight(found) <= budget


def test_the_frontier_goes_one_way():
    groups = [[Option(b * (g + 1), 4.0**-b * (g % 5 + 1)) for b in (2, 3, 4, 8)] for g in range(30)]
    allocation = Allocation(groups)
    found = allocation.frontier(40)
    assert len(found) == 40
    weights, losses = [allocation.weight(c) for c in found], [allocation.loss(c) for c in found]
    assert weights == sorted(weights)
    assert losses == sorted(losses, reverse=True)


@pytest.mark.parametrize(
    ("text", "kind", "limit"),
    [
        ("4.25 bpw", "bits", 4.25),
        ("300MB", "bytes", 3e8),
        ("2 GiB", "bytes", 2**31),
        ("20 ms", "ms", 20),
        ("50 tok/s", "ms", 20),
    ],
)
def test_budgets_are_written_with_a_unit(text, kind, limit):
    assert Budget.parse(text) == Budget(kind, limit)
    assert Budget.parse(str(Budget.parse(text))) == Budget.parse(text)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("4.25bits", "unknown unit 'bits'; did you mean 'bpw'"),
        ("300 mb", "did you mean 'MB'"),
        ("4.25", "want a number and a unit"),
        ("0 bpw", "positive"),
        ("-1 MB", "want a number and a unit"),
        ("1e400 bpw", "positive number|want a number"),
        (4.25, "want a number and a unit"),
        ("nan bpw", "want a number and a unit"),
    ],
)
def test_a_budget_without_sense_says_how_to_write_one(text, says):
    with pytest.raises(SpecError, match=says):
        Budget.parse(text)
