"""The codecs of format ``gguf``: a weight is one tensor, the bytes of its blocks, uint8 (..., out, bytes of a row).

MXFP4 alone is a plain grid: its blocks of 32 are the byte of a power of two and 16 bytes of codes, the first half of the block
in the low nibbles. ggml's table has twice the numbers of FP4 and its scale is half of E8M0's (``ggml-common.h``,
``kvalues_mxfp4``; ``ggml-impl.h``, ``ggml_e8m0_to_fp32_half``), so that codes and scales are those of the OCP format.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from quantkit.errors import FormatError, SpecError
from quantkit.formats.base import Codec, check_layout
from quantkit.formats.containers.base import Layout
from quantkit.qtensor import BlockTensor, GridTensor, block_layout
from quantkit.spec import QuantSpec, Scheme, block_spec

MXFP4 = QuantSpec("fp4_e2m1", (1, 32), True, "float8_e8m0fnu")
MXFP4_BLOCK = 39, 32, 17
"""Number of the type in a file, weights and bytes of a block."""


class BlockCodec:
    """Blocks as they are."""

    def layout(self, spec: QuantSpec, shape: tuple[int, ...]) -> Layout:
        """See :class:`quantkit.formats.base.Codec`."""
        try:
            return {"weight": (torch.uint8, block_layout(spec, shape))}
        except SpecError as error:
            raise FormatError(str(error)) from error

    def encode(self, qtensor: BlockTensor) -> dict[str, Tensor]:
        """See :class:`quantkit.formats.base.Codec`."""
        return {"weight": qtensor.data.contiguous()}

    def decode(self, tensors: Mapping[str, Tensor], spec: QuantSpec, shape: tuple[int, ...]) -> BlockTensor:
        """See :class:`quantkit.formats.base.Codec`."""
        check_layout(tensors, self.layout(spec, shape))
        return BlockTensor(tensors["weight"], spec)


class Mxfp4Codec:
    """Blocks of MXFP4."""

    def layout(self, spec: QuantSpec, shape: tuple[int, ...]) -> Layout:
        """See :class:`quantkit.formats.base.Codec`."""
        if spec != MXFP4 or (reason := spec.rejects(shape)):
            raise FormatError(f"MXFP4 stores {MXFP4.describe()}, not {spec.describe()}" if spec != MXFP4 else str(reason))
        _, size, nbytes = MXFP4_BLOCK
        return {"weight": (torch.uint8, (*shape[:-1], shape[-1] // size * nbytes))}

    def encode(self, qtensor: GridTensor) -> dict[str, Tensor]:
        """See :class:`quantkit.formats.base.Codec`."""
        self.layout(qtensor.spec, qtensor.shape)
        first, second = qtensor.codes().unflatten(-1, (-1, 2, 16)).unbind(-2)
        scale = qtensor.scale.contiguous().view(torch.uint8).unsqueeze(-1)
        return {"weight": torch.cat([scale, first | second << 4], -1).flatten(-2)}

    def decode(self, tensors: Mapping[str, Tensor], spec: QuantSpec, shape: tuple[int, ...]) -> GridTensor:
        """See :class:`quantkit.formats.base.Codec`."""
        check_layout(tensors, self.layout(spec, shape))
        blocks = tensors["weight"].unflatten(-1, (-1, MXFP4_BLOCK[2]))
        codes = torch.cat([blocks[..., 1:] & 15, blocks[..., 1:] >> 4], -1).flatten(-2)
        scale = blocks[..., 0].contiguous().view(torch.float8_e8m0fnu)
        return GridTensor.from_codes(codes, scale, None, spec)


def codec_of(scheme: Scheme) -> Codec:
    """Return the codec of a scheme."""
    return Mxfp4Codec() if scheme.weight == MXFP4 else BlockCodec()


def type_of(spec: QuantSpec) -> str | None:
    """Return what ggml calls the type of a weight's blocks; None if a file has none for it."""
    return "MXFP4" if spec == MXFP4 else spec.blocks


def spec_of(name: str) -> QuantSpec:
    """Reverse :func:`type_of`."""
    return MXFP4 if name == "MXFP4" else block_spec(name)
