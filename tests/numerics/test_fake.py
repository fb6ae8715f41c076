"""Fake quantization of activations."""

import pytest
import torch

from quantkit.numerics.fake import fake_quantize
from quantkit.spec import TOKEN_INT8, QuantSpec

TOKEN = TOKEN_INT8.grid


@pytest.mark.parametrize("spec", [TOKEN, QuantSpec("int8", (-1, -1), False, "float32"), QuantSpec("int4", (1, -1))])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_are_on_the_grid_and_near(spec: QuantSpec, dtype: torch.dtype) -> None:
    x = torch.randn(2, 3, 40, generator=torch.Generator().manual_seed(0)).to(dtype)
    y = fake_quantize(x, spec)
    assert (y.dtype, y.shape) == (x.dtype, x.shape)
    rows = x.float().reshape(-1, 40) if spec.block[0] == 1 else x.float().reshape(1, -1)
    step = (rows.amax(-1) - rows.amin(-1) if not spec.symmetric else 2 * rows.abs().amax(-1)) / (2**spec.bits - 1)
    error = (y.float().reshape(rows.shape) - rows).abs()
    assert (error <= step[:, None] * 0.51 + torch.finfo(dtype).eps * rows.abs()).all()
    distinct = [len(row.unique()) for row in y.reshape(rows.shape)]
    assert max(distinct) <= 2**spec.bits


def test_each_token_has_its_own_scale_and_empty_inputs_pass() -> None:
    x = torch.randn(4, 16, generator=torch.Generator().manual_seed(1))
    one_large = torch.cat([x, 1000 * x[:1]])
    assert torch.equal(fake_quantize(one_large, TOKEN)[:4], fake_quantize(x, TOKEN))
    assert fake_quantize(x[:0], TOKEN).shape == (0, 16)


def test_the_gradient_is_that_of_the_identity() -> None:
    x = torch.randn(3, 8, requires_grad=True)
    fake_quantize(x, TOKEN).sum().backward()
    assert torch.equal(x.grad, torch.ones(3, 8))
