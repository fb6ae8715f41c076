"""What a scheme says of a linear beside its codes, as plain structs: tables of numbers, and how inputs are rounded."""

import ctypes
import functools
import math
from typing import Final

import torch
from torch import Tensor

from quantkit.dtypes import DTYPES, table
from quantkit.errors import KernelError
from quantkit.numerics.hadamard import rotation_factors
from quantkit.spec import ActivationSpec

MIDDLE: Final = 128
"""The byte that stands for zero in an int8 table."""


class TableStruct(ctypes.Structure):
    """``qk::Table`` of ``csrc/linear.h``."""

    _fields_ = (
        ("number", ctypes.c_float * 16),
        ("pair", ctypes.c_uint16 * 32),
        ("byte", ctypes.c_uint8 * 16),
        ("unit", ctypes.c_float),
        ("exact", ctypes.c_int32),
    )


class InputsStruct(ctypes.Structure):
    """``qk::Inputs`` of ``csrc/linear.h``."""

    _fields_ = (
        ("mixing", ctypes.c_void_p),
        ("mixes", ctypes.c_int64),
        ("group", ctypes.c_int64),
        ("scale", ctypes.c_float),
        ("top", ctypes.c_int32),
    )


@functools.cache
def whole_numbers(dtype: str) -> tuple[Tensor, float, bool]:
    """Return a table of 4 bits as int8 products see it: whole numbers, what one is worth, and whether nothing was rounded.

    The numbers of FP4 are multiples of 1/2 and those of IQ4 whole. Those of NF4 are rounded to multiples of 1/127, by 1/254 at
    most, a twentieth of the smallest step between them.

    Returns:
        float32 (16,), of magnitude up to 127; the unit; whether ``numbers * unit`` are the table's own.
    """
    values = table(dtype)[0]
    unit = float(values.abs()[values != 0].min())
    steps = values / unit
    if bool((steps == steps.round()).all()) and float(steps.abs().max()) < MIDDLE:
        return steps, unit, True
    unit = float(values.abs().max()) / (MIDDLE - 1)
    return (values / unit).round(), unit, False


@functools.cache
def table_struct(dtype: str) -> TableStruct:
    """Return the table of a dtype of 4 bits for the kernels; it lives as long as the process."""
    values = table(dtype)[0]
    numbers, unit, exact = whole_numbers(dtype)
    pairs = values.bfloat16().view(torch.int16).tolist()
    return TableStruct(
        (ctypes.c_float * 16)(*values.tolist()),
        (ctypes.c_uint16 * 32)(*((pair & 0xFFFF) for pair in pairs * 2)),
        (ctypes.c_uint8 * 16)(*(int(number) + MIDDLE for number in numbers)),
        unit,
        exact,
    )


def is_table(dtype: str) -> bool:
    """Say whether the codes of a dtype name one of 16 numbers."""
    return DTYPES[dtype].values is not None and DTYPES[dtype].bits == 4


def rejects_inputs(activation: ActivationSpec | None, columns: int) -> str | None:
    """Return why kernels cannot round inputs of ``columns`` channels themselves; None if they can, or need not."""
    if activation is None:
        return None
    spec, group = activation.grid, activation.grid.block[1]
    if not (spec.is_integer or spec.dtype == "fp8_e4m3") or not spec.symmetric or spec.blocks is not None:
        return f"inputs are rounded to {activation.describe()}, want symmetric integers or fp8_e4m3"
    if activation.static:
        return None
    if spec.block[0] != 1:
        return f"inputs are rounded to {activation.describe()}: the scale of a token depends on others"
    if spec.scale_dtype != "float32":
        return f"inputs have scales of {spec.scale_dtype}, want float32"
    return f"inputs of {columns} channels cannot have groups of {group}" if group > 0 and columns % group else None


def inputs_struct(activation: ActivationSpec, columns: int, scale: float | None) -> tuple[InputsStruct, Tensor | None]:
    """Return how kernels round inputs, and the matrix that the struct points into, to be kept as long as it.

    Args:
        activation: one that :func:`rejects_inputs` does not reject.
        columns: number of channels.
        scale: the stored scale of a static grid.

    Raises:
        KernelError: a stored scale that is no positive number.
    """
    if scale is not None and not 0 < scale < math.inf:
        raise KernelError(f"the stored scale of inputs is {scale}, want a positive number; quantize again")
    spec = activation.grid
    group = spec.block[1] if activation.dynamic and spec.block[1] > 0 else columns
    top = (1 << (spec.bits - 1)) - 1 if spec.is_integer else 0
    mixing = rotation_factors(columns)[0].float().contiguous() if activation.rotated else None
    pointer, mixes = (None, 0) if mixing is None else (mixing.data_ptr(), len(mixing))
    return InputsStruct(pointer, mixes, group, scale or 0.0, top), mixing
