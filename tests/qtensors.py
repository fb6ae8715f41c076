"""Random quantized tensors, and what it means that two are the same: needs torch alone, so it runs wherever kernels do."""

import torch

from quantkit.numerics import grid
from quantkit.qtensor import GridTensor
from quantkit.spec import QuantSpec


def random_qtensor(spec: QuantSpec, shape: tuple[int, ...], seed: int = 0) -> GridTensor:
    """Every code and zero point possible: more than a quantizer would produce."""
    generator = torch.Generator().manual_seed(seed)
    rows, cols = grid.block_size(spec, shape)
    blocks = (*shape[:-2], shape[-2] // rows, shape[-1] // cols)
    codes = torch.randint(0, 2**spec.bits, shape, generator=generator, dtype=torch.uint8)
    scale = grid.round_scale(torch.rand(blocks, generator=generator) + 0.01, spec.scale_dtype)
    zero = None if spec.symmetric else torch.randint(0, 2**spec.bits, blocks, generator=generator, dtype=torch.uint8)
    return GridTensor.from_codes(codes, scale, zero, spec)


def assert_same(got: GridTensor, want: GridTensor) -> None:
    """The same grid, shape and bits, padding of the packed rows included."""
    assert (got.spec, got.shape) == (want.spec, want.shape)
    for a, b in ((got.packed, want.packed), (got.scale, want.scale), (got.zero_point, want.zero_point)):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            assert a.dtype == b.dtype
            assert torch.equal(a, b)
