"""Products of 4- and 8-bit weights with many tokens on Hopper, without an expanded copy of the weight in memory.

On other devices, and for fewer tokens, :mod:`quantkit.kernels.cuda.calls` is used. The instructions (wgmma) exist on compute
capability 9.0 only. Before the kernel is used on a device, its results are checked once against an expanded weight.
"""

import logging
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional as F

from quantkit.errors import KernelError
from quantkit.kernels.cuda import calls, layout
from quantkit.kernels.cuda.calls import fill_matmul, pointer, steps_of, struct
from quantkit.kernels.cuda.layout import STEP, Fragments
from quantkit.qtensor import GridTensor
from quantkit.spec import QuantSpec

logger = logging.getLogger(__name__)

ArrangeStruct = struct("ArrangeStruct", "x out", "tokens k")

CAPABILITY: Final = (9, 0)
TOKENS: Final = 128
"""Tokens per thread block."""
_LARGEST_ERROR: Final = 1e-2  # relative to the norm of the product; misplaced operands give an error of about 1


def arrange(x: Tensor) -> Tensor:
    """Return x in the order in which thread blocks read it.

    Args:
        x: float16 or bfloat16 (tokens, K), K a multiple of 16.

    Returns:
        (tiles of 128 tokens, steps of 64 columns, 128, 64) in x's dtype, padded with zeros.
    """
    tokens, columns = x.shape
    out = x.new_empty((-(-tokens // TOKENS), -(-columns // STEP), TOKENS, STEP))
    calls.launch("qk_arrange", ArrangeStruct(pointer(x), pointer(out), tokens, columns), x.device)
    return out


def matmul(
    x: Tensor, weight: Fragments, bias: Tensor | None = None, activation: str | None = None, *, bests: Tensor | None = None
) -> Tensor:
    """Return ``x @ w.T + bias``, or ``activation(gate) * up``, like :func:`quantkit.kernels.cuda.calls.matmul`.

    Weights are rounded to x's dtype before they are multiplied, as in an expanded weight; sums are in float32.

    Args:
        x: float16 or bfloat16 (tokens, K), contiguous.
        weight: one matrix with integer codes.
        bias: (N,) in x's dtype.
        activation, bests: as in :func:`quantkit.kernels.cuda.calls.matmul`.

    Returns:
        (tokens, N), or (tokens, N / 2) with an activation.
    """
    tokens, columns = x.shape
    y = x.new_empty((tokens, weight.rows if activation is None else weight.rows // 2))
    if not tokens:
        return y
    if columns % 16:
        x = F.pad(x, (0, -columns % 16))
    elif x.data_ptr() % 16:
        x = x.clone()
    arranged = arrange(x)
    splits = choose_splits(len(arranged) * -(-weight.tiles // 2), steps_of(columns), calls.multiprocessors(x.device))
    parts = {"x": arranged, "bias": bias, "y": y, "bests": bests}
    calls.launch("qk_prompt", fill_matmul(weight, parts, TOKENS, splits, activation), x.device, weight.bits)
    return y


def choose_splits(blocks: int, steps: int, processors: int) -> int:
    """Return over how many thread blocks K is split: enough to occupy all multiprocessors, with at least 8 steps each."""
    return max(1, min(processors // blocks, steps // 8))


def capability(device: torch.device) -> tuple[int, int]:
    """Return the compute capability of a device."""
    return torch.cuda.get_device_capability(device)


def works(device: torch.device, dtype: torch.dtype, bits: int) -> bool:
    """Return whether :func:`matmul` can be used on a device. An unexpected failure of its check is logged once."""
    key = (device, dtype, bits)
    if key not in _known:
        fits = capability(device) == CAPABILITY
        if fits and calls.capturing():
            return False
        _known[key] = fits and _agrees(*key)
    return _known[key]


_known: dict[tuple[torch.device, torch.dtype, int], bool] = {}


def _agrees(device: torch.device, dtype: torch.dtype, bits: int) -> bool:
    """Compare products with those of an expanded weight, and repeat them; they use all pipeline stages and a split K."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(150, 1088, generator=generator).to(device, dtype)
    for group, symmetric in ((64, False), (32, True)):
        codes = torch.randint(2**bits, (130, 1088), generator=generator, dtype=torch.uint8)
        scale = torch.rand(130, 1088 // group, generator=generator).half()
        zero = None if symmetric else torch.randint(2**bits, scale.shape, generator=generator).byte()
        qtensor = GridTensor.from_codes(codes, scale, zero, QuantSpec(f"int{bits}", (1, group), symmetric))
        weight = layout.prepack(qtensor.to(device))
        want = calls.dense_matmul(x, weight, None).float()
        try:
            got, again = matmul(x, weight), matmul(x, weight)
        except KernelError as failed:
            logger.warning("%s: the wgmma kernel failed and is not used: %s", device, failed)
            return False
        error = float((got.float() - want).norm() / want.norm())
        if not error < _LARGEST_ERROR or not torch.equal(got, again):
            message = "%s: the wgmma kernel is not used, its result has a relative error of %.2g or is not reproducible"
            logger.warning(message + "; please report this", device, error)
            return False
    return True
