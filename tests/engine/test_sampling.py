"""Sampling filters against transformers' logits processors, and the draw against the distribution it should follow."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from quantkit.engine.sampling import (
    History,
    Sampling,
    choose,
    penalize_repetition,
)
from quantkit.errors import QuantkitError
from quantkit.numerics.filters import keep_min_p, keep_top_k, keep_top_p
from tests.shaped import shape_logits


def random_logits(seed: int, rows: int = 3, vocab: int = 57) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 3


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("k", [1, 2, 7, 56, 57, 500])
def test_top_k_equals_transformers(seed, k):
    logits = random_logits(seed)
    assert torch.equal(keep_top_k(logits, k), TopKLogitsWarper(k)(None, logits.clone()))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("p", [1e-6, 0.1, 0.5, 0.9, 0.999])
def test_top_p_equals_transformers(seed, p):
    logits = random_logits(seed)
    assert torch.equal(keep_top_p(logits, p), TopPLogitsWarper(p)(None, logits.clone()))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("p", [0.0, 0.01, 0.3, 1.0])
def test_min_p_equals_transformers(seed, p):
    logits = random_logits(seed)
    assert torch.equal(keep_min_p(logits, p), MinPLogitsWarper(p)(None, logits.clone()))


@pytest.mark.parametrize("penalty", [0.5, 1.1, 2.0])
def test_repetition_penalty_equals_transformers_and_counts_a_token_once(penalty):
    logits = random_logits(5)
    previous = torch.tensor([[3, 3, 9], [0, 56, 56], [1, 2, 3]])
    want = RepetitionPenaltyLogitsProcessor(penalty)(previous, logits.clone())
    assert torch.equal(penalize_repetition(logits, previous, penalty), want)
    assert not torch.equal(want, logits)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    temperature=st.floats(0.1, 5.0),
    top_k=st.none() | st.integers(1, 80),
    top_p=st.none() | st.floats(0.01, 1.0),
    min_p=st.none() | st.floats(0.0, 1.0),
    penalty=st.floats(0.5, 2.0),
)
def test_all_filters_together_equal_transformers_in_order(seed, temperature, top_k, top_p, min_p, penalty):
    logits, previous = random_logits(seed), [[1, 4], [2, 2], [0, 50]]
    chain = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(penalty), TemperatureLogitsWarper(temperature)])
    chain.extend([TopKLogitsWarper(top_k)] if top_k is not None else [])
    chain.extend([TopPLogitsWarper(top_p)] if top_p is not None and top_p < 1 else [])
    chain.extend([MinPLogitsWarper(min_p)] if min_p is not None else [])
    got = shape_logits(logits, [Sampling(temperature, top_k, top_p, min_p, penalty)] * 3, [History(ids) for ids in previous])
    assert torch.equal(got, chain(torch.tensor(previous), logits.clone()))
    assert torch.isfinite(got).any(-1).all()


def test_rows_have_their_own_parameters_and_do_not_see_each_other():
    logits = random_logits(1, rows=6)
    samplings = [
        Sampling(), Sampling(0.7, top_k=9, top_p=0.8, min_p=0.02), Sampling(1.3, top_k=3), Sampling(repetition_penalty=3.0),
        Sampling(0.5, top_p=0.6, repetition_penalty=1.5), Sampling(2.0, min_p=0.3),
    ]  # fmt: skip
    histories = [History(ids) for ids in ([1], [2, 3], [4], [5, 6, 7, 5], [8, 8], [9])]
    before = logits.clone()
    together = shape_logits(logits, samplings, histories)
    alone = [shape_logits(row[None], [s], [h]) for row, s, h in zip(logits, samplings, histories, strict=True)]
    assert torch.equal(together, torch.cat(alone))
    assert torch.equal(logits, before)
    assert torch.equal(together[0], logits[0])


@pytest.mark.parametrize(
    "sampling", [Sampling(1.0, seed=3), Sampling(0.6, top_k=4, seed=3), Sampling(1.5, top_p=0.8, min_p=0.1, seed=3)]
)
def test_draws_follow_the_distribution(sampling):
    logits, draws = random_logits(2, rows=1, vocab=8) / 2, 20_000
    tokens = choose(logits.expand(draws, -1), [sampling] * draws, [3] * draws, range(draws))
    expected = shape_logits(logits, [sampling]).softmax(-1)[0] * draws
    observed = torch.bincount(torch.tensor(tokens), minlength=8).float()
    possible = expected > 0
    assert observed[~possible].sum() == 0
    chi_square = ((observed - expected)[possible] ** 2 / expected[possible]).sum()
    assert chi_square < 24.3  # P(chi2 with 7 degrees of freedom > 24.3) = 0.001


def test_a_draw_belongs_to_seed_and_position():
    logits, sampling = random_logits(3, rows=1, vocab=3000).expand(12, -1), Sampling(3.0)
    drawn = choose(logits, [sampling] * 12, [1] * 6 + [2] * 6, [*range(6)] * 2)
    assert len(set(drawn)) > 10
    for row, (seed, position) in enumerate([(1, 0), (1, 3), (2, 5)]):
        assert choose(logits[:1], [sampling], [seed], [position]) == [drawn[(seed - 1) * 6 + position]], row


def test_greedy_is_argmax_and_takes_half_precision():
    logits = random_logits(4)
    for x in (logits, logits.bfloat16(), logits.half(), logits.double()):
        assert choose(x, [Sampling()] * 3, [0] * 3, [0] * 3) == x.argmax(-1).tolist()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.0, seed=1), Sampling(0.5, top_k=3, top_p=0.5, min_p=0.1)])
def test_logits_that_are_not_finite_spoil_their_own_row_only(bad, sampling):
    logits = random_logits(4)
    logits[1, 5], logits[2] = bad, -math.inf
    tokens = choose(logits, [sampling] * 3, [1] * 3, [7] * 3)
    assert tokens == [*choose(logits[:1], [sampling], [1], [7]), -1, -1]
    assert tokens[0] >= 0


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1), ("temperature", math.nan), ("temperature", "hot"), ("temperature", True),
        ("temperature", math.inf),
        ("top_k", 0), ("top_k", 2.5), ("top_k", True),
        ("top_p", 0.0), ("top_p", 1.1), ("min_p", -0.1), ("min_p", 1.5),
        ("repetition_penalty", 0.0), ("repetition_penalty", -1), ("repetition_penalty", 1e-300), ("repetition_penalty", 1e300),
        ("temperature", 10**400), ("repetition_penalty", 10**400), ("seed", -1), ("seed", 1.5), ("seed", 2**63),
    ],
)  # fmt: skip
def test_values_out_of_range_name_the_parameter(name, value):
    with pytest.raises(QuantkitError, match=f"{name}=.*want"):
        Sampling(**{"temperature": 1.0, name: value})


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("temperature", [5e-324, 1e-45, 1e-300, 1e-38, 1e-20])
def test_at_the_coldest_temperatures_the_most_likely_token_is_drawn(temperature, plain, monkeypatch):
    if plain:
        monkeypatch.setattr("quantkit.kernels.functions.sampling.compiled", lambda what: False)
    logits = random_logits(4) * 1000
    logits[0, 3] = -math.inf
    for filters in ({}, {"top_k": 5}, {"top_p": 0.5}, {"min_p": 0.1}, {"top_p": 1e-300}, {"min_p": 1e-300}):
        sampling = Sampling(temperature, **filters)
        assert choose(logits, [sampling] * 3, [1, 2, 3], [7] * 3) == logits.argmax(-1).tolist()


@pytest.mark.parametrize("temperature", [1e20, 1e39, 1e300])
def test_at_the_hottest_temperatures_every_token_is_as_likely(temperature):
    logits = random_logits(4)
    logits[:, ::2] = -math.inf
    drawn = {token for seed in range(40) for token in choose(logits, [Sampling(temperature)] * 3, [seed] * 3, [7, 8, 9])}
    assert len(drawn) > 5
    assert all(token % 2 for token in drawn)


def test_a_filter_that_could_do_nothing_is_an_error():
    with pytest.raises(QuantkitError, match=r"top_k, min_p: no effect on greedy"):
        Sampling(top_k=4, min_p=0.1)


def test_repetition_penalty_needs_the_tokens_so_far():
    with pytest.raises(QuantkitError, match="need histories"):
        shape_logits(random_logits(0), [Sampling(repetition_penalty=1.2)] * 3)
