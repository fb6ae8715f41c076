"""Hadamard matrices of many sizes."""

import pytest
import torch

from quantkit.numerics.hadamard import hadamard_transform, paley, random_hadamard, sylvester


@pytest.mark.parametrize("size", [1, 2, 4, 12, 20, 28, 36, 64, 96, 576, 768])
def test_these_sizes_spread_one_number_evenly(size: int) -> None:
    matrix = random_hadamard(size)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(size, dtype=torch.float64))
    torch.testing.assert_close(matrix.abs(), torch.full((size, size), size**-0.5, dtype=torch.float64))


@pytest.mark.parametrize("size", [3, 5, 9, 18, 15 * 8, 7])
def test_every_other_size_is_orthogonal(size: int) -> None:
    matrix = random_hadamard(size, seed=3)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(size, dtype=torch.float64))
    assert torch.equal(matrix, random_hadamard(size, seed=3))
    assert not torch.equal(matrix, random_hadamard(size, seed=4))


@pytest.mark.parametrize("size", [1, 2, 16])
def test_sylvesters_are_symmetric(size: int) -> None:
    matrix = sylvester(size)
    assert torch.equal(matrix, matrix.T)
    assert torch.equal(matrix @ matrix, size * torch.eye(size, dtype=torch.float64))


@pytest.mark.parametrize("size", [4, 8, 12, 20, 24, 28, 36, 44, 60])
def test_paley(size: int) -> None:
    matrix = paley(size)
    assert matrix is not None
    assert torch.equal(matrix @ matrix.T, size * torch.eye(size, dtype=torch.float64))
    assert matrix.abs().unique().tolist() == [1.0]


def test_sizes_without_a_construction() -> None:
    assert paley(9) is None
    assert paley(40) is None
    assert torch.equal(sylvester(2), torch.tensor([[1.0, 1.0], [1.0, -1.0]]).double())


@pytest.mark.parametrize("size", [1, 2, 9, 12, 24, 36, 40, 64, 96, 576, 1536])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_turning_keeps_products_and_goes_back(size: int, dtype: torch.dtype) -> None:
    x, w = torch.randn(2, 3, size, generator=torch.Generator().manual_seed(size)).to(dtype)
    tolerance = 0.05 if dtype is torch.bfloat16 else 1e-4
    assert hadamard_transform(x).dtype == dtype
    torch.testing.assert_close(
        hadamard_transform(w) @ hadamard_transform(x).T, w @ x.T, rtol=tolerance, atol=tolerance * size**0.5
    )
    torch.testing.assert_close(hadamard_transform(hadamard_transform(x), back=True), x, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("size", "spread"), [(12, 12), (64, 64), (576, 576), (1536, 1536), (40, 40), (23 * 8, 8), (192, 192), (9, 1), (39 * 4, 4)]
)
def test_turning_spreads_one_number_over_so_many(size: int, spread: int) -> None:
    turned = hadamard_transform(torch.eye(size, dtype=torch.float64))
    assert {int((row.abs() > 1e-9).sum()) for row in turned} == {spread}
    torch.testing.assert_close(turned.abs().amax(), torch.tensor(spread**-0.5, dtype=torch.float64))
