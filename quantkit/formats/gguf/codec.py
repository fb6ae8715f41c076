"""The codec of format ``gguf``: a weight is one tensor, the bytes of its blocks, uint8 (..., out, bytes of a row)."""

from collections.abc import Mapping

import torch
from torch import Tensor

from quantkit.errors import FormatError, SpecError
from quantkit.formats.base import check_layout
from quantkit.formats.containers.base import Layout
from quantkit.qtensor import BlockTensor, block_layout
from quantkit.spec import QuantSpec


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
