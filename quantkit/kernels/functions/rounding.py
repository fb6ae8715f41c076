"""Choice of codes: grid search, GPTQ's column sweep and coordinate descent, compiled for the CPU, in plain torch elsewhere.

The plain versions, :func:`quantkit.numerics.search.search_qparams`, :func:`quantkit.numerics.sweep.sweep` and
:func:`quantkit.numerics.descent.descend`, are the definitions; the compiled ones agree with them up to the rounding of float32
sums. They keep a group, or the rows of a tile, in registers and the first cache levels, whereas plain torch passes through
memory in every step, and are 20 to 100 times faster. Without a compiler the plain versions run, which is logged once.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from quantkit.dtypes import DTYPES, SCALE_DTYPES
from quantkit.errors import SpecError
from quantkit.kernels import build
from quantkit.kernels.build import compiled
from quantkit.numerics import block_scales, descent, grid, search
from quantkit.numerics import sweep as plain
from quantkit.numerics.ggml import BlockType, Content
from quantkit.numerics.pack import packed_words
from quantkit.spec import QuantSpec


def search_qparams(
    weight: Tensor,
    spec: QuantSpec,
    importance: Tensor | None = None,
    *,
    ratios: Sequence[float] = search.RATIOS,
    refit: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Return scale and zero point of every block; see :func:`quantkit.numerics.search.search_qparams`."""
    if weight.device.type != "cpu" or spec.block[0] != 1 or not compiled("grid search and GPTQ"):
        return search.search_qparams(weight, spec, importance, ratios=ratios, refit=refit)
    rows, columns = weight.shape
    _, group = grid.block_size(spec, (rows, columns))
    weights = search.group_weights(importance, columns, group, weight.device).reshape(-1).contiguous()
    values = weight.float().contiguous()
    factors = torch.tensor(ratios, dtype=torch.float32)
    scale = torch.empty(rows, columns // group)
    zero = torch.empty(rows, columns // group, dtype=torch.uint8)
    build.library().qk_search(
        values.data_ptr(),
        weights.data_ptr(),
        factors.data_ptr(),
        scale.data_ptr(),
        zero.data_ptr(),
        rows,
        columns,
        group,
        len(factors),
        2**spec.bits - 1,
        grid.zero_code(spec) if spec.symmetric else -1,
        build.DTYPE_CODES[SCALE_DTYPES[spec.scale_dtype]],
        int(refit),
        torch.get_num_threads(),
    )
    if not bool(torch.isfinite(scale).all()):
        raise SpecError(f"a scale is not finite in {spec.scale_dtype}; use scale_dtype float32")
    return scale.to(SCALE_DTYPES[spec.scale_dtype]), None if spec.symmetric else zero


class Rounded(NamedTuple):
    """A weight that was rounded to nearest.

    Attributes:
        packed, scale, zero_point: as in :class:`quantkit.qtensor.GridTensor`.
        noise, signal: sums of the squared errors and of the squared weights.
        lost: number of rows with weights that have all become zero.
    """

    packed: Tensor
    scale: Tensor
    zero_point: Tensor | None
    noise: float
    signal: float
    lost: int


def round_to_nearest(weight: Tensor, spec: QuantSpec) -> Rounded | None:
    """Round a weight to nearest on the grid of its range, in one pass; None where there is no kernel for that.

    What it returns is, to the last bit, what :mod:`quantkit.numerics.grid` and :mod:`quantkit.numerics.pack` define.

    Args:
        weight: finite (out, in) of a size that can be squared, of float32, bfloat16 or float16.
        spec: a grid of integers that divides it.

    Raises:
        SpecError: a scale is too large for its stored dtype.
    """
    plain_grid = spec.is_integer and not spec.has_global_scale and not spec.offset and spec.blocks is None
    dtypes = (weight.dtype, SCALE_DTYPES[spec.scale_dtype])
    if not plain_grid or spec.block[0] != 1 or weight.device.type != "cpu" or not {*dtypes} <= build.DTYPE_CODES.keys():
        return None
    if not compiled("grid search and GPTQ"):
        return None
    rows, columns = weight.shape
    _, group = grid.block_size(spec, (rows, columns))
    values = weight.contiguous()
    packed = torch.empty(rows, packed_words(columns, spec.bits), dtype=torch.int32)
    scale = torch.empty(rows, columns // group)
    zero = torch.empty(rows, columns // group, dtype=torch.uint8)
    sums, lost = torch.empty(rows, 2, dtype=torch.float64), torch.empty(rows, dtype=torch.uint8)
    build.library().qk_round(
        *(tensor.data_ptr() for tensor in (values, scale, zero, packed, sums, lost)),
        rows,
        columns,
        group,
        4 * packed.shape[1],
        build.DTYPE_CODES[dtypes[0]],
        spec.bits,
        grid.zero_code(spec) if spec.symmetric else -1,
        build.DTYPE_CODES[dtypes[1]],
        torch.get_num_threads(),
    )
    if not bool(torch.isfinite(scale).all()):
        raise SpecError(f"a scale is not finite in {spec.scale_dtype}; use scale_dtype float32")
    noise, signal = sums.sum(0).tolist()
    return Rounded(packed, scale.to(dtypes[1]), None if spec.symmetric else zero, noise, signal, int(lost.sum()))


def search_blocks(weight: Tensor, kind: BlockType, importance: Tensor | None = None) -> Content:
    """Choose the scales of ggml's blocks; see :func:`quantkit.numerics.block_scales.search`."""
    scale = None
    if kind.minimums is None and DTYPES[kind.dtype].values is None:
        scale, _ = search_qparams(weight, QuantSpec(kind.dtype, (1, kind.group), scale_dtype="float32"), importance)
    return block_scales.search(weight, kind, importance, scale)


def sweep(weight: Tensor, qparams: tuple[Tensor, Tensor | None], spec: QuantSpec, order: Tensor, factor: Tensor) -> Tensor:
    """Round column by column with error compensation; see :func:`quantkit.numerics.sweep.sweep`."""
    if weight.device.type != "cpu" or not spec.is_integer or not compiled("grid search and GPTQ"):
        return plain.sweep(weight, qparams, spec, order, factor)
    rows, columns = weight.shape
    lanes = build.library().qk_sweep_rows()
    padding = -rows % lanes
    scale, zero = qparams

    def arranged(values: Tensor) -> Tensor:
        """Return (in, padded out) with columns in the order of the sweep; padding is one, because scales divide."""
        return torch.nn.functional.pad(values.T[order], (0, padding), value=1.0).contiguous()

    shape = (rows, columns)
    values = arranged(weight.float())
    scales = arranged(plain.per_column(scale.float(), spec, shape))
    zeros = None if zero is None else arranged(plain.per_column(zero.float(), spec, shape))
    lower = factor.T.contiguous()
    codes = torch.empty(columns, rows + padding, dtype=torch.uint8)
    build.library().qk_sweep(
        values.data_ptr(),
        scales.data_ptr(),
        None if zeros is None else zeros.data_ptr(),
        lower.data_ptr(),
        codes.data_ptr(),
        columns,
        rows + padding,
        2**spec.bits - 1,
        grid.zero_code(spec),
        torch.get_num_threads(),
    )
    result = torch.empty(columns, rows, dtype=torch.uint8)
    result[order] = codes[:, :rows]
    return result.T.contiguous()


def descend(
    residual: Tensor, codes: Tensor, qparams: tuple[Tensor, Tensor | None], spec: QuantSpec, order: Tensor, hessian: Tensor
) -> Tensor:
    """Choose the codes of each column again with all others fixed; see :func:`quantkit.numerics.descent.descend`."""
    if residual.device.type != "cpu" or not spec.is_integer or not compiled("grid search and GPTQ"):
        return descent.descend(residual, codes, qparams, spec, order, hessian)
    rows, columns = residual.shape
    padding = -rows % build.library().qk_sweep_rows()
    scale, zero = qparams

    def arranged(values: Tensor) -> Tensor:
        return torch.nn.functional.pad(values.T[order], (0, padding), value=1).contiguous()

    values, scales = arranged(residual), arranged(plain.per_column(scale.float(), spec, (rows, columns)))
    zeros = None if zero is None else arranged(plain.per_column(zero.float(), spec, (rows, columns)))
    ordered, arranged_codes = hessian[order][:, order].contiguous(), arranged(codes)
    build.library().qk_descend(
        values.data_ptr(),
        scales.data_ptr(),
        None if zeros is None else zeros.data_ptr(),
        ordered.data_ptr(),
        arranged_codes.data_ptr(),
        columns,
        rows + padding,
        2**spec.bits - 1,
        grid.zero_code(spec),
        torch.get_num_threads(),
    )
    result = torch.empty(columns, rows, dtype=torch.uint8)
    result[order] = arranged_codes[:, :rows]
    return result.T.contiguous()
