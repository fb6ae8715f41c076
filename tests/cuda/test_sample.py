"""The kernel that chooses tokens, in the emulator and as its plain torch other, against the engine's sampling."""

import pytest
import torch

from quantkit.engine.sampling import Sampling
from quantkit.errors import KernelError
from quantkit.kernels.cuda.sampling import sample, sample_plain
from quantkit.kernels.functions.sampling import Draw, draw_plain
from quantkit.numerics.filters import keep_min_p, keep_top_k, keep_top_p
from quantkit.numerics.noise import gumbel, philox
from tests.cuda import emulated
from tests.shaped import shape_logits

DTYPES = [torch.float16, torch.bfloat16]

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture(params=["plain", "emulated"])
def choose(request, monkeypatch):
    if request.param == "plain":
        yield draw_plain
        return
    with emulated.machine(monkeypatch):
        yield sample


def draw_of(*samplings: Sampling) -> Draw:
    draw = Draw.greedy(len(samplings), "cpu")
    draw.set(samplings)
    return draw


def positions_of(*numbers: int) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


def test_philox_has_the_words_of_its_authors():
    """Known answers of their library's own tests: counter, key, words."""
    ones, full = 0xFFFFFFFF, [0xFFFFFFFF] * 4
    pi = [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344]
    for counter, key, want in (
        ([0] * 4, (0, 0), [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        (full, (ones, ones), [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (pi, (0xA4093822, 0x299F31D0), [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]),
    ):
        words = philox([torch.tensor([[word]]) for word in counter], [torch.tensor([word]) for word in key])
        assert [int(word) for word in words] == want


def test_noise_belongs_to_seed_position_and_token():
    seeds, positions = torch.tensor([3, 3, 4, 3 + (1 << 32)]), positions_of(9, 10, 9, 9)
    noise = gumbel(50, seeds, positions)
    assert torch.equal(gumbel(50, seeds[1:2], positions[1:2])[0], noise[1])
    assert torch.equal(gumbel(9, seeds[:1], positions[:1])[0], noise[0, :9])
    assert len(noise.flatten().unique()) == 200


@each_dtype
def test_the_first_of_the_largest(choose, dtype):
    logits = torch.randn(3, 3001, generator=torch.Generator().manual_seed(0)).to(dtype).clamp(max=2)  # many are equal
    want = torch.tensor([int((row == row.max()).nonzero()[0]) for row in logits])
    assert torch.equal(choose(logits, Draw.greedy(3, "cpu"), positions_of(0, 1, 2)).long(), want)


def test_rows_without_a_number_say_so(choose):
    nan, infinite = float("nan"), float("inf")
    bad = [[nan] * 4, [-infinite] * 4, [infinite, 0, 0, 1], [nan, 1, -1, -5]]
    logits = torch.tensor([*bad, [-infinite, 1, -infinite, 0.5]]).half()
    for sampling in (Sampling(), Sampling(1.0, top_k=1, top_p=0.5, min_p=0.1)):
        assert choose(logits, draw_of(*[sampling] * 5), positions_of(0, 1, 2, 3, 4)).tolist() == [-1, -1, -1, -1, 1]


@pytest.mark.parametrize("way", ["plain", "emulated", "emulated, the last block first"])
def test_tokens_are_noted_by_slot(way, monkeypatch):
    """By the last row of each, whichever finishes last; rows that fill a step up stand in slot 0."""
    logits = torch.randn(8, 40).half()
    logits[4, 7] = float("nan")
    newest = torch.full((6,), 99, dtype=torch.int32)
    slots = torch.tensor([4, 4, 4, 0, 2, 5, 0, 0], dtype=torch.int32)
    with emulated.machine(monkeypatch, last_block_first="last" in way):
        function = sample_plain if way == "plain" else sample
        chosen = function(logits, Draw.greedy(8, "cpu"), positions_of(3, 4, 5, 8, 0, 1, -1, -1), slots, newest)
    want = logits.argmax(-1).tolist()
    assert chosen.tolist() == [*want[:4], -1, *want[5:]]
    assert newest.tolist() == [want[3], 99, 0, 99, want[2], want[5]]


def test_the_largest_logits_of_parts_are_enough(monkeypatch):
    """Greedy rows do not read the logits at all; others begin where the parts say."""
    logits = (torch.randn(4, 150) * 2).bfloat16()
    tiles = torch.nn.functional.pad(logits.float(), (0, 42), value=float("-inf")).unflatten(-1, (3, 64)).max(-1)
    bests = torch.stack([tiles.values.view(torch.int32), tiles.indices.int() + 64 * torch.arange(3, dtype=torch.int32)], -1)
    samplings = [Sampling(), Sampling(0.8, top_k=9, seed=1), Sampling(), Sampling(1.1, top_p=0.9, min_p=0.01, seed=2)]
    draw, positions = draw_of(*samplings), positions_of(1, 2, 3, 4)
    spoilt = torch.where(torch.tensor([True, False, True, False])[:, None], float("nan"), logits.float()).bfloat16()
    with emulated.machine(monkeypatch):
        want = sample(logits, draw, positions)
        assert torch.equal(sample(spoilt, draw, positions, bests=bests.contiguous()), want)


def shaped_by(sampling: Sampling, logits: torch.Tensor) -> torch.Tensor:
    """What the engine makes of logits (V,); of equals at the edge of top-p, the highest ids stay."""
    theirs = shape_logits(logits[None], [sampling])[0]
    if sampling.top_p is None:
        return theirs
    shaped = keep_top_k((logits.float() / sampling.temperature)[None], sampling.top_k or len(logits))
    shaped = keep_min_p(keep_top_p(shaped, sampling.top_p, stable=True), sampling.min_p or 0.0)[0]
    assert torch.equal(shaped.sort().values, theirs.sort().values)
    return shaped


LOGITS = {
    "apart": lambda: torch.randn(301) * 3,
    "equals": lambda: (torch.randn(90) * 2).round(),  # a few values, zeros of both signs among them
    "alike": lambda: torch.zeros(36),
}
SAMPLINGS = [
    Sampling(0.7),
    Sampling(1.5, top_k=7),
    Sampling(1.0, top_k=1),
    Sampling(0.8, top_p=0.6),
    Sampling(2.5, top_p=0.97),
    Sampling(1.0, top_p=1e-9),
    Sampling(1.3, min_p=0.08),
    Sampling(1.7, top_k=20, top_p=0.8, min_p=0.05),
    Sampling(1.0, top_k=1000, top_p=0.5),
]


@each_dtype
@pytest.mark.parametrize("kind", LOGITS)
def test_edges_are_where_the_engine_has_them(choose, kind, dtype):
    """Positions are looked for at which the weakest tokens that stay win, and those that would if they had not gone."""
    torch.manual_seed(1)
    logits, seed, many = LOGITS[kind]().to(dtype), 11, 3000
    noise = gumbel(len(logits), torch.full((many,), seed), torch.arange(many))
    rows, samplings, want = [], [], []
    for sampling in SAMPLINGS:
        shaped = shaped_by(sampling, logits)
        winners, kept = (shaped + noise).argmax(-1), shaped.isfinite()
        free = (logits.float() / sampling.temperature + noise).argmax(-1)
        found = [
            (winners == token).nonzero() for token in shaped.masked_fill(~kept, 1e9).sort(stable=True).indices[:3].tolist()
        ]
        gone = logits.float().masked_fill(kept, -1e9).sort(descending=True).indices[: min(3, int((~kept).sum()))]
        found += [(free == token).nonzero() for token in gone.tolist()]
        for at in {int(places[0]) for places in found if len(places)}:
            rows.append(at)
            samplings.append(Sampling(sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p, seed=seed))
            want.append(int(winners[at]))
    assert len(rows) > 2 * len(SAMPLINGS)
    got = choose(logits.expand(len(rows), -1).contiguous(), draw_of(*samplings), positions_of(*rows))
    assert got.tolist() == want


@each_dtype
@pytest.mark.parametrize(("size", "equals"), [(9, (0, 3, 7, 8)), (16, (1, 2, 14, 15)), (70_003, (3, 65_537, 69_990, 70_002))])
def test_of_equals_the_lowest_ids_go(choose, size, equals, dtype):
    logits = torch.full((size,), -30.0, dtype=dtype)
    logits[list(equals)] = 1.5
    rows = 16
    for top_p, top_k, stay in ((0.6, None, 3), (0.4, 6, 2), (0.01, size, 1), (0.9, 4, 4)):
        tokens = choose(
            logits.expand(rows, -1).contiguous(),
            draw_of(*[Sampling(1.0, top_k, top_p, seed=7)] * rows),
            torch.arange(rows).int(),
        )
        assert tokens.unique().tolist() == list(equals[4 - stay :])


def chi_square(tokens: torch.Tensor, probabilities: torch.Tensor) -> float:
    expected = probabilities.double() * len(tokens)
    counts = tokens.long().bincount(minlength=len(probabilities)).double()
    return float(((counts - expected) ** 2 / expected).sum())


LIMIT = 29.9
"""Six tokens exceed it once in 65000 times if they are drawn right."""


def test_draws_follow_the_distribution(choose):
    logits = torch.tensor([1.0, 0.25, -1.0, 0.5, 0.0, 2.0]).half()
    rows = 1500
    same, probabilities = logits.expand(rows, -1).contiguous(), (logits.float() / 1.25).softmax(-1)
    for sampling, seeds, positions in (
        (Sampling(1.25, seed=5), None, torch.arange(rows)),  # along a sequence
        (Sampling(1.25, seed=5), torch.arange(rows) * 77, torch.full((rows,), 40)),  # from request to request
    ):
        draw = draw_of(*[sampling] * rows)
        draw = draw if seeds is None else draw._replace(seed=seeds)
        tokens = choose(same, draw, positions.int())
        assert chi_square(tokens, probabilities) < LIMIT
        assert chi_square(tokens, (logits.float() / 1.0).softmax(-1)) > LIMIT  # it would notice another temperature
        pairs = tokens[1:] * 6 + tokens[:-1]  # neighbours know nothing of each other: 35 degrees of freedom
        assert chi_square(pairs, torch.outer(probabilities, probabilities).flatten()) < 85


def test_samplings_are_checked():
    draw = Draw.greedy(2, "cpu")
    with pytest.raises(KernelError, match="1 samplings for 2 rows"):
        draw.set([Sampling()])
    with pytest.raises(KernelError, match="penalties and biases"):
        draw.set([Sampling(), Sampling(repetition_penalty=1.1)])
    draw.set([Sampling(0.5), Sampling(0.5)])
    assert draw.seed[0] != draw.seed[1]
