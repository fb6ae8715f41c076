"""Sums of outer products: exact for bfloat16 rows, whatever the shape and however many threads."""

import pytest
import torch

from quantkit.kernels.functions.moment import add_moment


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("tokens", "features"), [(1, 5), (300, 64), (129, 130), (64, 259)])
def test_equals_the_product_in_double(dtype: torch.dtype, tokens: int, features: int) -> None:
    generator = torch.Generator().manual_seed(tokens)
    left, right = (torch.randn(tokens, features, generator=generator).to(dtype) for _ in range(2))
    start = torch.randn(features, features, generator=generator)
    for one, other in ((left, right), (left, left)):
        total = start.clone()
        add_moment(total, one, other)
        want = start.double() + one.double().T @ other.double()
        if one is other:
            total, want = total.triu(), want.triu()
        torch.testing.assert_close(total.double(), want, rtol=1e-5, atol=1e-4)


def test_threads_do_not_change_the_result() -> None:
    x = torch.randn(500, 300, generator=torch.Generator().manual_seed(1)).bfloat16()
    threads, totals = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            totals.append(torch.zeros(300, 300))
            add_moment(totals[-1], x, x)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(totals[0].triu(), total.triu()) for total in totals)
