"""The same numbers on another grid: what of a quantized weight fits where another format wants it.

Exact are: zero points where there were none (the middle code), wider scales, narrower ones that hold the same numbers, smaller
blocks that repeat the scale of a larger one, offsets that are whole multiples of scales, and the blocks of a GGUF file where
they have one scale each (or, read as a grid, several). Everything else rounds again.
"""

import dataclasses
import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from quantkit.dtypes import SCALE_DTYPES
from quantkit.numerics import ggml, grid
from quantkit.numerics.offsets import offsets, zero_points
from quantkit.qtensor import BlockTensor, GridTensor, QTensor
from quantkit.spec import BLOCK_GRIDS, QuantSpec, Scheme, block_spec

_BLOCKS = ((1, 128), (1, 64), (1, 32), (1, -1))
_SCALES = ("float16", "bfloat16", "float32")
_BITS = (4, 8, 6, 5, 3, 2)


def neighbours(scheme: Scheme, dtype: str) -> Iterator[Scheme]:
    """Yield schemes that may hold the same numbers, the likeliest first; the first is ``scheme`` itself.

    Args:
        scheme: of the weight as it is.
        dtype: dtype of the checkpoint's unquantized weights, which many formats want scales in.
    """
    yield scheme
    spec = opened_spec(scheme.weight)
    if spec is None:
        return
    scales = (
        (spec.scale_dtype,) if spec.scale_dtype not in _SCALES else tuple(dict.fromkeys((spec.scale_dtype, dtype, *_SCALES)))
    )
    zeros = dict.fromkeys((_zero(spec), *(((True, False), (False, False)) if spec.is_integer else ())))
    for block, (symmetric, offset), scale in itertools.product(dict.fromkeys((spec.block, *_BLOCKS)), zeros, scales):
        if scale in SCALE_DTYPES:
            yield _with(scheme, QuantSpec(spec.dtype, block, symmetric, scale, offset))
    for name, (dtype_of_codes, _, symmetric, size) in BLOCK_GRIDS.items():
        if scheme.activation is None and (size, dtype_of_codes) == (32, spec.dtype) and (symmetric <= spec.symmetric):
            yield _with(scheme, block_spec(name))


def _zero(spec: QuantSpec) -> tuple[bool, bool]:
    return spec.symmetric, spec.offset


def opened_spec(spec: QuantSpec) -> QuantSpec | None:
    """Return the plain grid with the numbers of ``spec``: itself, or that of a GGUF file's blocks; None if there is none."""
    if spec.blocks is None:
        return spec
    if not spec.is_integer:
        return None
    return QuantSpec(spec.dtype, spec.block, spec.symmetric, "float16" if _is_simple(spec) else "float32", not spec.symmetric)


def _is_simple(spec: QuantSpec) -> bool:
    """Whether blocks have one scale each."""
    return spec.blocks is not None and BLOCK_GRIDS[spec.blocks][3] == spec.block[1]


def surely_holds(spec: QuantSpec, other: QuantSpec, shape: tuple[int, ...]) -> bool:
    """Return whether :func:`regridded` puts every weight of ``shape`` on ``other``, whatever its numbers are."""
    own = opened_spec(spec)
    if spec == other or own is None:
        return spec == other
    if other.blocks is not None:
        return _is_simple(other) and other.symmetric and surely_holds(own, dataclasses.replace(other, blocks=None), shape)
    exact = own.scale_dtype == other.scale_dtype or (own.scale_dtype in _SCALES and other.scale_dtype == "float32")
    zeros = _zero(own) == _zero(other) or (own.symmetric and not other.offset)
    return own.dtype == other.dtype and exact and zeros and not other.rejects(shape) and _divides(own, other, shape)


def _divides(own: QuantSpec, spec: QuantSpec, shape: tuple[int, ...]) -> bool:
    """Return whether the blocks of ``spec`` are parts of those of ``own``."""
    pairs = zip(grid.block_size(own, shape), grid.block_size(spec, shape), strict=True)
    return not any(old % new for old, new in pairs)


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
    simple = [
        name for name, (dtype, _, symmetric, size) in BLOCK_GRIDS.items() if size == 32 and symmetric and dtype[:3] == "int"
    ]
    yield from (Scheme(block_spec(name)) for name in sorted(simple, key=lambda name: list(bits).index(block_spec(name).bits)))


def regridded(qtensor: QTensor, spec: QuantSpec) -> QTensor | None:
    """Return the same weight, number for number, on the grid ``spec``; None if that grid does not have its numbers."""
    if qtensor.spec == spec:
        return qtensor
    plain = _opened(qtensor)
    if plain is None or spec.blocks is None:
        return None if plain is None else _on_grid(plain, spec)
    if not _is_simple(spec):
        return None
    found = _on_grid(plain, dataclasses.replace(spec, blocks=None, offset=not spec.symmetric))
    return None if found is None else _in_blocks(found, spec)


def _opened(qtensor: QTensor) -> GridTensor | None:
    """Return a weight on its plain grid, see :func:`opened_spec`."""
    if isinstance(qtensor, GridTensor):
        return qtensor
    if not isinstance(qtensor, BlockTensor) or (spec := opened_spec(qtensor.spec)) is None:
        return None
    content = qtensor.kind.unpack(qtensor.data.unflatten(-1, (-1, qtensor.kind.nbytes)))
    scale, minimum = (None if one is None else one.flatten(-2) for one in ggml.steps(content))
    assert scale is not None
    stored = SCALE_DTYPES[spec.scale_dtype]
    return GridTensor.from_codes(
        content.codes.flatten(-2), scale.to(stored), None if minimum is None else (-minimum).to(stored), spec
    )


def _in_blocks(qtensor: GridTensor, spec: QuantSpec) -> BlockTensor:
    """Return a weight whose groups are those of blocks with one scale each, and whose offsets are their minimums."""
    codes = qtensor.codes().unflatten(-1, (-1, spec.block[1]))
    low = None if qtensor.zero_point is None else -qtensor.zero_point
    return BlockTensor.from_content(ggml.Content(codes, qtensor.scale, None, low), spec)


def _on_grid(qtensor: GridTensor, spec: QuantSpec) -> GridTensor | None:
    """Do what :func:`regridded` does between plain grids."""
    own = qtensor.spec
    if own == spec:
        return qtensor
    if own.dtype != spec.dtype or own.has_global_scale or spec.rejects(qtensor.shape):
        return None
    if (scale := _repeated(qtensor.scale, own, spec, qtensor.shape)) is None:
        return None
    stored = scale.to(SCALE_DTYPES[spec.scale_dtype])
    if not torch.equal(stored.float(), scale.float()):
        return None
    zero = None if qtensor.zero_point is None else _repeated(qtensor.zero_point, own, spec, qtensor.shape)
    if own.offset and not spec.offset:
        assert zero is not None
        if (zero := zero_points(scale, zero, spec.bits)) is None:
            return None
    if spec.offset:
        zero = offsets(stored, grid.zero_code(spec) if zero is None else zero) if not own.offset else _narrowed(zero, stored)
        if zero is None:
            return None
    elif spec.symmetric and zero is not None:
        if bool((zero != grid.zero_code(spec)).any()):
            return None
        zero = None
    elif not spec.symmetric and zero is None:
        zero = torch.full(stored.shape, grid.zero_code(spec), dtype=torch.uint8)
    zero = None if zero is None else zero.contiguous()
    return dataclasses.replace(qtensor, scale=stored.contiguous(), zero_point=zero, spec=spec)


def _narrowed(values: Tensor | None, like: Tensor) -> Tensor | None:
    """Return floats in the dtype of ``like``; None if they are others there."""
    if values is None:
        return None
    found = values.to(like.dtype)
    return found if torch.equal(found.float(), values.float()) else None


def rounded(qtensor: QTensor, scheme: Scheme) -> QTensor:
    """Return the weight rounded to the nearest numbers of another grid."""
    weight, spec = qtensor.dequantize(), opened_spec(scheme.weight)
    assert spec is not None
    scale, zero = grid.choose_qparams(weight, spec)
    found = GridTensor.from_codes(grid.quantize(weight, scale, zero, spec), scale, zero, spec)
    if scheme.weight.blocks is not None:
        return _in_blocks(found, scheme.weight)
    return dataclasses.replace(found, input_scale=qtensor.input_scale if scheme.static else None)


def _with(scheme: Scheme, spec: QuantSpec) -> Scheme:
    return dataclasses.replace(scheme, weight=spec)


def _repeated(values: Tensor, own: QuantSpec, spec: QuantSpec, shape: tuple[int, ...]) -> Tensor | None:
    """Return one value per block of ``spec``, of those per block of ``own``; None where new blocks are no parts of old ones."""
    if not _divides(own, spec, shape):
        return None
    found = values
    for axis, old, new in zip((-2, -1), grid.block_size(own, shape), grid.block_size(spec, shape), strict=True):
        found = found if old == new else found.float().repeat_interleave(old // new, axis).to(values.dtype)
    return found
