"""Choosing tokens natively against its definition in plain torch."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantkit.engine.sampling import Sampling
from quantkit.kernels.functions.sampling import Draw, draw_plain, draw_tokens, shape
from quantkit.numerics.noise import gumbel

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def draws(samplings: list[Sampling], seed: int = 5) -> Draw:
    return Draw.of(samplings, [seed] * len(samplings), "cpu")


def check(logits: torch.Tensor, samplings: list[Sampling], places: int = 40) -> None:
    """Compare along a sequence; of different tokens, both must be as good: sums of probabilities are rounded differently."""
    for sampling in samplings:
        draw, positions = draws([sampling] * places), torch.arange(places, dtype=torch.int32) * 1000
        rows = logits.expand(places, -1)
        got, want = draw_tokens(rows, draw, positions).long(), draw_plain(rows, draw, positions).long()
        if torch.equal(got, want):
            continue
        scores = shape(rows, draw) + gumbel(logits.shape[-1], draw.seed, positions)
        lost = scores.gather(1, want[:, None]) - scores.gather(1, got[:, None])
        assert float(lost.max()) < 1e-5, sampling


SAMPLINGS = [
    Sampling(),
    Sampling(0.7),
    Sampling(1.5, top_k=7),
    Sampling(1.0, top_k=1),
    Sampling(1.0, top_k=65),
    Sampling(0.8, top_p=0.6),
    Sampling(2.5, top_p=0.97),
    Sampling(1.0, top_p=1e-9),
    Sampling(1.0, top_p=1.0, min_p=1.0),
    Sampling(1.3, min_p=0.08),
    Sampling(1.7, top_k=20, top_p=0.8, min_p=0.05),
    Sampling(1.0, top_k=100_000, top_p=0.5),
    Sampling(30.0, top_k=40, top_p=0.999),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1, 3, 63, 64, 65, 300, 5003])
def test_it_chooses_what_the_definition_chooses(size, dtype):
    check((torch.randn(size, generator=torch.Generator().manual_seed(size)) * 3).to(dtype), SAMPLINGS, places=12)


@pytest.mark.usefixtures("isa")
def test_on_every_instruction_set():
    check(torch.randn(2100, generator=torch.Generator().manual_seed(0)) * 4, SAMPLINGS, places=12)


@pytest.mark.parametrize("kind", ["equal", "few values", "far apart", "mostly gone"])
def test_ties_and_tails(kind):
    generator = torch.Generator().manual_seed(1)
    logits = {
        "equal": torch.zeros(197),
        "few values": (torch.randn(500, generator=generator) * 2).round() / 2,
        "far apart": torch.randn(700, generator=generator) * 200,
        "mostly gone": torch.randn(300, generator=generator).masked_fill(torch.arange(300) % 7 > 0, -math.inf),
    }[kind]
    check(logits, SAMPLINGS)


def test_what_top_p_leaves_is_what_it_should():
    """Not only the winners: over many places every survivor wins somewhere, and nobody else."""
    logits = (torch.randn(40, generator=torch.Generator().manual_seed(3)) * 2).round()
    for sampling in (
        Sampling(2.0, top_p=0.7),
        Sampling(2.0, top_k=9),
        Sampling(2.0, top_k=15, top_p=0.8),
        Sampling(2.0, min_p=0.2),
    ):
        many = 4000
        draw = draws([sampling] * many)
        left = shape(logits[None], draws([sampling]))[0].isfinite()
        tokens = draw_tokens(logits.expand(many, -1), draw, torch.arange(many, dtype=torch.int32))
        assert torch.equal(tokens.long().unique(), left.nonzero()[:, 0]), sampling


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    size=st.integers(1, 400),
    temperature=st.floats(0.05, 5.0),
    top_k=st.none() | st.integers(1, 500),
    top_p=st.none() | st.floats(0.01, 1.0),
    min_p=st.none() | st.floats(0.0, 1.0),
)
def test_any_parameters(seed, size, temperature, top_k, top_p, min_p):
    logits = torch.randn(size, generator=torch.Generator().manual_seed(seed)) * 3
    check(logits, [Sampling(temperature, top_k, top_p, min_p)], places=5)


def test_rows_and_threads_do_not_see_each_other(threads):
    logits = torch.randn(len(SAMPLINGS), 999, generator=torch.Generator().manual_seed(2)) * 2
    logits[3, 17] = math.nan
    positions = torch.arange(len(SAMPLINGS), dtype=torch.int32)
    threads(1)
    alone = [
        draw_tokens(row[None], draws([sampling]), at[None])
        for row, sampling, at in zip(logits, SAMPLINGS, positions, strict=True)
    ]
    assert int(alone[3]) == -1
    for count in (1, 2, 3):
        threads(count)
        assert torch.equal(draw_tokens(logits, draws(SAMPLINGS), positions), torch.cat(alone))


def test_without_a_compiler_it_says_so_once_and_chooses_the_same(monkeypatch):
    logits, samplings = torch.randn(len(SAMPLINGS), 77, generator=torch.Generator().manual_seed(4)), SAMPLINGS
    positions = torch.arange(len(SAMPLINGS), dtype=torch.int32)
    want, said = draw_tokens(logits, draws(samplings), positions), []
    monkeypatch.setattr("quantkit.kernels.functions.sampling.compiled", lambda what: said.append(what))
    assert torch.equal(draw_tokens(logits, draws(samplings), positions), want)
    assert said == ["sampling"]
