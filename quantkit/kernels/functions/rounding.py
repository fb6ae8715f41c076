"""Choice of codes: grid search, GPTQ's column sweep and coordinate descent, compiled for the CPU, in plain torch elsewhere.

The plain versions, :func:`quantkit.numerics.search.search_qparams`, :func:`quantkit.numerics.sweep.sweep` and
:func:`quantkit.numerics.descent.descend`, are the definitions; the compiled ones agree with them up to the rounding of float32
sums. They keep a group, or the rows of a tile, in registers and the first cache levels, whereas plain torch passes through
memory in every step, and are 20 to 100 times faster. Without a compiler the plain versions run, which is logged once.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from quantkit.dtypes import DTYPES, SCALE_DTYPES
from quantkit.errors import SpecError
from quantkit.kernels import build
from quantkit.kernels.build import compiled
from quantkit.numerics import block_scales, descent, grid, search
from quantkit.numerics import sweep as plain
from quantkit.numerics.ggml import BlockType, Content
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
