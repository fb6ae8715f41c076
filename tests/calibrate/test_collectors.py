"""Every collector: the same result however rows are split, merged or saved."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantkit.calibrate.collectors import COLLECTORS, Collector, Samples
from quantkit.errors import CalibrationError

NAMES = COLLECTORS.names()


def rows(seed: int, tokens: int, features: int) -> torch.Tensor:
    return torch.randn(tokens, features, generator=torch.Generator().manual_seed(seed))


def fed(name: str, parts: list[torch.Tensor]) -> Collector:
    member = COLLECTORS.get(name)
    collector = member(parts[0].shape[1] // (2 if member.paired else 1))
    for part in parts:
        collector.update(part)
    return collector


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=15, deadline=None)
@given(cuts=st.lists(st.integers(0, 90), max_size=4), seed=st.integers(0, 99))
def test_split_and_merge_do_not_change_the_result(name: str, cuts: list[int], seed: int) -> None:
    x = rows(seed, 90, 8)
    edges = [0, *sorted(cuts), 90]
    parts = [x[a:b] for a, b in itertools.pairwise(edges)]
    whole, split = fed(name, [x]), fed(name, parts)
    merged = fed(name, parts[:1])
    for part in parts[1:]:
        merged.merge(fed(name, [part]))
    torch.testing.assert_close(split.result(), whole.result(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(merged.result(), whole.result(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["abs_max", "samples"])
def test_order_free_collectors_are_exact(name: str) -> None:
    x = rows(3, 64, 5)
    shuffled = x[torch.randperm(64, generator=torch.Generator().manual_seed(1))]
    assert torch.equal(fed(name, [x]).result(), fed(name, [shuffled[:10], shuffled[10:]]).result())


def test_values() -> None:
    x = rows(0, 300, 130)
    torch.testing.assert_close(fed("hessian", [x]).result(), x.T @ x / 300, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(fed("mean_square", [x]).result(), x.double().square().mean(0))
    assert torch.equal(fed("abs_max", [x]).result(), x.abs().amax(0))
    own, float_x = x.chunk(2, 1)
    torch.testing.assert_close(fed("drift", [x]).result(), (float_x - own).T @ own / 300, rtol=1e-4, atol=1e-5)


def test_samples_are_real_rows_and_bounded() -> None:
    x = rows(6, Samples.ROWS + 100, 4)
    kept = fed("samples", [x]).result()
    assert kept.shape == (Samples.ROWS, 4)
    assert {tuple(row) for row in kept.tolist()} <= {tuple(row) for row in x.tolist()}


def test_nothing_collected_is_an_error() -> None:
    with pytest.raises(CalibrationError, match="never called"):
        COLLECTORS.get("hessian")(4).result()


def test_unknown_collector_names_the_nearest() -> None:
    with pytest.raises(CalibrationError, match="did you mean 'hessian'"):
        COLLECTORS.get("hesian")


def test_bfloat16_inputs_lose_nothing_in_the_second_moment() -> None:
    x = torch.randn(300, 96, generator=torch.Generator().manual_seed(0)).bfloat16()
    hessian = COLLECTORS.get("hessian")(96)
    hessian.update(x)
    torch.testing.assert_close(hessian.result(), (x.double().T @ x.double() / 300).float(), atol=1e-5, rtol=1e-5)
