"""The compiled passes for learning scales equal their plain forms."""

import pytest
import torch

from quantkit.kernels import build
from quantkit.kernels.functions import learning
from quantkit.numerics import divergence


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocabulary", [5, 16, 4096 + 16, 5003])
def test_divergence_and_gradient(dtype: torch.dtype, vocabulary: int) -> None:
    generator = torch.Generator().manual_seed(vocabulary)
    logits, wanted = ((6 * torch.randn(9, vocabulary, generator=generator)).to(dtype) for _ in range(2))
    logits[0] += 100
    logits[1, 1:] = -30000  # everything but one token is impossible: exponentials underflow, nothing becomes NaN
    wanted[2, :2] = -torch.inf  # masked tokens
    total, gradient = learning.divergence_gradient(logits, wanted)
    want_total, want = divergence.divergence_gradient(logits, wanted.clamp(min=-1e4))
    assert total == pytest.approx(want_total, rel=1e-5)
    torch.testing.assert_close(gradient, want, atol=2e-7, rtol=2 * torch.finfo(dtype).eps + 2e-6)
    assert torch.isfinite(gradient).all()
    same, zero = learning.divergence_gradient(logits, logits)
    assert same == pytest.approx(0, abs=1e-5)
    assert float(zero.abs().max()) < 1e-7


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("split", [(7, 1, 3, 32), (2, 5, 1, 2, 19), (4, 3, 2, 8)])
def test_groups_are_expanded_and_reduced(dtype: torch.dtype, split: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(1)
    levels = torch.randint(-15, 16, split, generator=generator, dtype=torch.int8)
    scale = torch.rand((*split[:-3], split[-2]), generator=generator)
    weight = torch.empty(split, dtype=dtype)
    learning.expand_groups(levels, scale, weight)
    assert torch.equal(weight, (levels * scale[..., :, None, :, None]).to(dtype))
    slope = torch.randn(split, generator=generator).to(dtype)
    want = (levels.double() * slope.double()).sum((-3, -1))
    torch.testing.assert_close(learning.reduce_groups(levels, slope).double(), want, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("split", [(7, 1, 3, 32), (2, 5, 1, 2, 19), (4, 3, 2, 8)])
def test_levels_follow_their_drift_inside_the_grid(split: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(2)
    low = torch.randint(-7, 1, (*split[:-3], split[-2]), generator=generator, dtype=torch.int8)
    levels = torch.randint(0, 8, split, generator=generator, dtype=torch.int8) + low[..., :, None, :, None]
    drift = torch.zeros(split, dtype=torch.float16)
    start = levels.clone()
    wanted = levels.double()
    for _ in range(20):
        slope = torch.randn(split, generator=generator) + 0.5 * (torch.arange(split[-1]) % 3 - 1)
        slope.view(-1)[0] = 0
        wanted -= 0.125 * slope.sign().double()
        learning.drift_levels(drift, slope, 0.125)
        learning.settle_levels(levels, drift, low, 7)
        lowest = low[..., :, None, :, None].double()
        wanted = wanted.clamp(lowest - 0.5, lowest + 7.5)  # a level at the edge forgets what would lead outside
    assert torch.equal(levels.double() + drift.double(), wanted)
    assert (levels != start).any()
    assert (drift.abs() <= 0.5).all()
    assert (levels >= lowest).all()
    assert (levels <= lowest + 7).all()


def test_threads_change_nothing() -> None:
    logits, wanted = torch.randn(2, 33, 1000, generator=torch.Generator().manual_seed(0))
    before = torch.get_num_threads()
    results = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        results.append(learning.divergence_gradient(logits, wanted))
    torch.set_num_threads(before)
    assert results[0][0] == results[1][0]
    assert torch.equal(results[0][1], results[1][1])


def test_without_a_compiler_the_plain_forms_run(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(3)
    logits, wanted = torch.randn(2, 4, 50, generator=generator)
    levels = torch.randint(-8, 8, (6, 1, 2, 32), generator=generator, dtype=torch.int8)
    slope = torch.randn(levels.shape, generator=generator)
    fast = (*learning.divergence_gradient(logits, wanted), learning.reduce_groups(levels, slope))
    monkeypatch.setattr(learning, "compiled", lambda what: False)
    slow = (*learning.divergence_gradient(logits, wanted), learning.reduce_groups(levels, slope))
    assert build.DTYPE_CODES
    for one, other in zip(fast, slow, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
