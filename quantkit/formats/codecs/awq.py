"""The codecs of ``awq``: 4-bit codes with zero points as AutoAWQ lays them out, which vLLM, SGLang and transformers read.

- ``gemm``, the usual one: ``qweight`` int32 (in, out / 8), ``qzeros`` int32 (in / group, out / 8), ``scales`` (in / group,
  out). A word holds eight *output* channels of one input channel; its fields, lowest first, are channels 0, 2, 4, 6, 1, 3, 5,
  7.
- ``gemv``: ``qweight`` int32 (out, in / 8), fields in order; ``qzeros`` int32 (out, words) and ``scales`` (out, 8 * words) with
  columns of padding behind those of the groups. It is only read.

``w = (code - zero point) * scale``; zero points are stored as they are, for every group.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from quantkit.dtypes import SCALE_DTYPES
from quantkit.errors import FormatError
from quantkit.formats.base import check_layout
from quantkit.formats.codecs.gptq import matrix
from quantkit.formats.containers.base import Layout
from quantkit.numerics import grid
from quantkit.numerics.pack import pack, unpack
from quantkit.qtensor import GridTensor
from quantkit.spec import QuantSpec

_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_FIELDS = len(_ORDER)
_BITS = 4


class AwqGemm:
    """Codec of version ``gemm``."""

    def layout(self, spec: QuantSpec, shape: tuple[int, ...]) -> Layout:
        """See :class:`quantkit.formats.base.Codec`."""
        if reason := rejects(spec, shape):
            raise FormatError(reason)
        out, columns = matrix(shape)
        groups = columns // grid.block_size(spec, shape)[1]
        return {
            "qweight": (torch.int32, (columns, out // _FIELDS)),
            "qzeros": (torch.int32, (groups, out // _FIELDS)),
            "scales": (SCALE_DTYPES[spec.scale_dtype], (groups, out)),
        }

    def encode(self, qtensor: GridTensor) -> dict[str, Tensor]:
        """See :class:`quantkit.formats.base.Codec`."""
        self.layout(qtensor.spec, qtensor.shape)
        assert qtensor.zero_point is not None
        return {
            "qweight": _pack(qtensor.codes().T),
            "qzeros": _pack(qtensor.zero_point.T),
            "scales": qtensor.scale.T.contiguous(),
        }

    def decode(self, tensors: Mapping[str, Tensor], spec: QuantSpec, shape: tuple[int, ...]) -> GridTensor:
        """See :class:`quantkit.formats.base.Codec`."""
        check_layout(tensors, self.layout(spec, shape))
        codes, zero = (_unpack(tensors[name], shape[0]).T.contiguous() for name in ("qweight", "qzeros"))
        return GridTensor.from_codes(codes, tensors["scales"].T.contiguous(), zero, spec)


class AwqGemv:
    """Codec of version ``gemv``, which is only read."""

    def layout(self, spec: QuantSpec, shape: tuple[int, ...]) -> Layout:
        """See :class:`quantkit.formats.base.Codec`."""
        if reason := rejects(spec, shape):
            raise FormatError(reason)
        out, columns = matrix(shape)
        if columns % _FIELDS:
            raise FormatError(f"in={columns} is not a multiple of {_FIELDS}")
        words = _gemv_words(columns // grid.block_size(spec, shape)[1], grid.block_size(spec, shape)[1])
        return {
            "qweight": (torch.int32, (out, columns // _FIELDS)),
            "qzeros": (torch.int32, (out, words)),
            "scales": (SCALE_DTYPES[spec.scale_dtype], (out, words * _FIELDS)),
        }

    def encode(self, qtensor: GridTensor) -> dict[str, Tensor]:
        """Refuse."""
        raise FormatError("awq version gemv is only read; gemm is written")

    def decode(self, tensors: Mapping[str, Tensor], spec: QuantSpec, shape: tuple[int, ...]) -> GridTensor:
        """See :class:`quantkit.formats.base.Codec`."""
        check_layout(tensors, self.layout(spec, shape))
        groups = shape[1] // grid.block_size(spec, shape)[1]
        zero = unpack(tensors["qzeros"].contiguous(), _BITS, tensors["qzeros"].shape[1] * _FIELDS)[:, :groups].contiguous()
        return GridTensor(tensors["qweight"].contiguous(), tensors["scales"][:, :groups].contiguous(), zero, spec, shape)


def rejects(spec: QuantSpec, shape: tuple[int, ...]) -> str | None:
    """Say why a weight cannot be laid out; None if it can."""
    if reason := spec.rejects(shape):
        return reason
    if spec.dtype != "int4" or spec.block[0] != 1 or spec.offset:
        return f"awq stores 4-bit integers per group or channel, not {spec.describe()}; use gptq, compressed-tensors or native"
    if spec.symmetric:
        return "awq stores a zero point for every group; use w4a16-asym, or format gptq or compressed-tensors"
    if shape[-2] % _FIELDS:
        return f"out={shape[-2]} is not a multiple of {_FIELDS}, the channels in a word; use format native"
    return None


def _pack(codes: Tensor) -> Tensor:
    """Pack codes (n, out), eight neighbours to a word in AWQ's order."""
    return pack(codes.unflatten(1, (-1, _FIELDS))[..., list(_ORDER)].flatten(1).contiguous(), _BITS)


def _unpack(words: Tensor, out: int) -> Tensor:
    """Reverse :func:`_pack`."""
    back = sorted(range(_FIELDS), key=_ORDER.__getitem__)
    codes: Tensor = unpack(words.contiguous(), _BITS, out).unflatten(1, (-1, _FIELDS))[..., back].flatten(1)
    return codes


def _gemv_words(groups: int, group: int) -> int:
    """Return the words of a row of zero points: AutoAWQ rounds them up to 4, 2 or 1 where groups are of 32, 64 or more."""
    multiple = {32: 4, 64: 2}.get(group, 1)
    words = math.ceil(groups / _FIELDS)
    return math.ceil(words / multiple) * multiple
