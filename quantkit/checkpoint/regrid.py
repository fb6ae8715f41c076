"""The same numbers on another grid: what of a quantized weight fits where another format wants it.

Exact are: zero points where there were none (the middle code), wider scales, narrower ones that hold the same numbers, and
smaller blocks that repeat the scale of a larger one. Everything else rounds again.
"""

import dataclasses
import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from quantkit.dtypes import SCALE_DTYPES
from quantkit.numerics import grid
from quantkit.qtensor import GridTensor, QTensor
from quantkit.spec import QuantSpec, Scheme

_BLOCKS = ((1, 128), (1, 64), (1, 32), (1, -1))
_SCALES = ("float16", "bfloat16", "float32")
_BITS = (4, 8, 6, 5, 3, 2)


def neighbours(scheme: Scheme, dtype: str) -> Iterator[Scheme]:
    """Yield schemes that may hold the same numbers, the likeliest first; the first is ``scheme`` itself.

    Args:
        scheme: of the weight as it is.
        dtype: dtype of the checkpoint's unquantized weights, which many formats want scales in.
    """
    spec = scheme.weight
    scales = (
        (spec.scale_dtype,) if spec.scale_dtype not in _SCALES else tuple(dict.fromkeys((spec.scale_dtype, dtype, *_SCALES)))
    )
    points = (spec.symmetric, not spec.symmetric) if spec.is_integer and not spec.offset else (spec.symmetric,)
    for block, symmetric, scale in itertools.product(dict.fromkeys((spec.block, *_BLOCKS)), points, scales):
        if scale in SCALE_DTYPES:
            yield _with(scheme, QuantSpec(spec.dtype, block, symmetric, scale, spec.offset))


def roundings(scheme: Scheme, dtype: str) -> Iterator[Scheme]:
    """Yield integer schemes that a weight may be rounded to, those most like ``scheme`` first, with and without its inputs'."""
    spec = scheme.weight
    bits = dict.fromkeys((spec.bits, *_BITS))
    scales = tuple(dict.fromkeys((dtype, *_SCALES)))
    activations = dict.fromkeys((scheme.activation, None))
    blocks = dict.fromkeys((spec.block, *_BLOCKS))
    for activation, width, block, symmetric, scale in itertools.product(
        activations, bits, blocks, (spec.symmetric, not spec.symmetric), scales
    ):
        if scale in _SCALES:
            yield Scheme(QuantSpec(f"int{width}", block, symmetric, scale), activation)


def regridded(qtensor: QTensor, spec: QuantSpec) -> QTensor | None:
    """Return the same weight, number for number, on the grid ``spec``; None if that grid does not have its numbers."""
    if qtensor.spec == spec:
        return qtensor
    if not isinstance(qtensor, GridTensor):
        return None
    own = qtensor.spec
    if own.dtype != spec.dtype or own.has_global_scale or own.offset or spec.offset or spec.rejects(qtensor.shape):
        return None
    if (scale := _repeated(qtensor.scale, own, spec, qtensor.shape)) is None:
        return None
    stored = scale.to(SCALE_DTYPES[spec.scale_dtype])
    if not torch.equal(stored.float(), scale.float()):
        return None
    zero = None if qtensor.zero_point is None else _repeated(qtensor.zero_point, own, spec, qtensor.shape)
    if spec.symmetric and zero is not None:
        if bool((zero != grid.zero_code(spec)).any()):
            return None
        zero = None
    if not spec.symmetric and zero is None:
        zero = torch.full(stored.shape, grid.zero_code(spec), dtype=torch.uint8)
    return dataclasses.replace(qtensor, scale=stored.contiguous(), zero_point=zero, spec=spec)


def rounded(qtensor: QTensor, scheme: Scheme) -> GridTensor:
    """Return the weight rounded to the nearest numbers of another grid."""
    weight = qtensor.dequantize()
    scale, zero = grid.choose_qparams(weight, scheme.weight)
    found = GridTensor.from_codes(grid.quantize(weight, scale, zero, scheme.weight), scale, zero, scheme.weight)
    return dataclasses.replace(found, input_scale=qtensor.input_scale if scheme.static else None)


def _with(scheme: Scheme, spec: QuantSpec) -> Scheme:
    return dataclasses.replace(scheme, weight=spec)


def _repeated(values: Tensor, own: QuantSpec, spec: QuantSpec, shape: tuple[int, ...]) -> Tensor | None:
    """Return one value per block of ``spec``, of those per block of ``own``; None where new blocks are no parts of old ones."""
    found = values
    for axis, old, new in zip((-2, -1), grid.block_size(own, shape), grid.block_size(spec, shape), strict=True):
        if old % new:
            return None
        found = found if old == new else found.float().repeat_interleave(old // new, axis).to(values.dtype)
    return found
