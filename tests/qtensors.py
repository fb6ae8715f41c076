"""Random quantized tensors, and what it means that two are the same: needs torch alone, so it runs wherever kernels do."""

import torch

from quantkit.numerics import grid
from quantkit.qtensor import GridTensor, QTensor
from quantkit.spec import QuantSpec


def random_qtensor(spec: QuantSpec, shape: tuple[int, ...], seed: int = 0) -> GridTensor:
    """Every code and zero point possible: more than a quantizer would produce."""
    generator = torch.Generator().manual_seed(seed)
    rows, cols = grid.block_size(spec, shape)
    blocks = (*shape[:-2], shape[-2] // rows, shape[-1] // cols)
    codes = torch.randint(0, 2**spec.bits, shape, generator=generator, dtype=torch.uint8)
    scale = grid.round_scale(torch.rand(blocks, generator=generator) + 0.01, spec.scale_dtype)
    if spec.dtype == "fp8_e4m3":
        codes[codes & 0x7F == 0x7F] = 0  # NaN
    zero = None if spec.symmetric else torch.randint(0, 2**spec.bits, blocks, generator=generator, dtype=torch.uint8)
    if spec.offset and zero is not None:
        zero = grid.round_scale(-scale.float() * zero.float() + 0.01, spec.scale_dtype)
    return GridTensor.from_codes(codes, scale, zero, spec)


def assert_same(got: QTensor, want: QTensor) -> None:
    """The same grid, shape and bits, padding of the packed rows included."""
    assert (got.spec, got.shape) == (want.spec, want.shape)
    ours, theirs = got.parts(), want.parts()
    assert ours.keys() == theirs.keys()
    for name, part in theirs.items():
        assert ours[name].dtype == part.dtype
        narrow = part.is_floating_point() and part.itemsize == 1  # which torch does not compare
        assert torch.equal(*(one.float() if narrow else one for one in (ours[name], part)))
