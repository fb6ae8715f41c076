"""The codecs of ``bitsandbytes``, which are only read: what ``save_pretrained`` leaves of a model that it rounded as it loaded.

- ``nf4``: ``weight`` uint8 (out * in / 2, 1), the even element in the *high* nibble; ``weight.absmax``, one per block of
  ``blocksize`` elements of the flat weight; ``weight.quant_map`` float32 (16,), the values of the codes;
  ``weight.quant_state.bitsandbytes__nf4``, JSON as bytes. Blocks must not cross rows here.
  With double quantization ``absmax`` is uint8: ``nested_quant_map[code] * nested_absmax[block of 256] + nested_offset``.
- ``int8``: ``weight`` int8 (out, in), ``SCB`` float32 (out,), ``weight_format`` uint8 (): ``w = code * SCB / 127``.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quantkit.dtypes import table
from quantkit.errors import FormatError
from quantkit.formats.base import check_layout
from quantkit.formats.codecs.gptq import matrix
from quantkit.formats.containers.base import Layout
from quantkit.numerics import grid
from quantkit.qtensor import GridTensor
from quantkit.spec import QuantSpec

STATE = "weight.quant_state.bitsandbytes__nf4"
_CLOSE = 1e-6  # of the values of NF4, which others have computed in float32
_LARGEST = 127


@dataclass(frozen=True, slots=True)
class Nf4:
    """Codec of ``nf4``.

    Attributes:
        state: what the JSON of a weight says.
        state_bytes: its length.
    """

    state: tuple[tuple[str, Any], ...]
    state_bytes: int

    def layout(self, spec: QuantSpec, shape: tuple[int, ...]) -> Layout:
        """See :class:`quantkit.formats.base.Codec`."""
        out, columns = matrix(shape)
        state = dict(self.state)
        blocks = out * (columns // grid.block_size(spec, shape)[1])
        nested = state.get("nested_blocksize")
        layout: Layout = {
            "weight": (torch.uint8, (out * columns // 2, 1)),
            "weight.absmax": (torch.uint8 if nested else torch.float32, (blocks,)),
            "weight.quant_map": (torch.float32, (16,)),
            STATE: (torch.uint8, (self.state_bytes,)),
        }
        if nested:
            layout["weight.nested_absmax"] = (torch.float32, (-(-blocks // nested),))
            layout["weight.nested_quant_map"] = (torch.float32, (256,))
        return layout

    def encode(self, qtensor: GridTensor) -> dict[str, Tensor]:
        """Refuse."""
        raise FormatError(ONLY_READ)

    def decode(self, tensors: Mapping[str, Tensor], spec: QuantSpec, shape: tuple[int, ...]) -> GridTensor:
        """See :class:`quantkit.formats.base.Codec`."""
        check_layout(tensors, self.layout(spec, shape))
        state = dict(self.state)
        if tuple(state["shape"]) != shape:
            raise FormatError(f"{STATE} says shape {tuple(state['shape'])}, the model says {shape}")
        if not torch.allclose(tensors["weight.quant_map"], table("nf4")[0], rtol=0, atol=_CLOSE):
            raise FormatError("weight.quant_map: its values are not those of NF4")
        scale = tensors["weight.absmax"]
        if nested := state.get("nested_blocksize"):
            outer = tensors["weight.nested_absmax"].repeat_interleave(nested)[: len(scale)]
            scale = tensors["weight.nested_quant_map"][scale.long()] * outer + state["nested_offset"]
        packed = tensors["weight"].reshape(shape[0], -1)
        packed = ((packed << 4) | (packed >> 4)).contiguous().view(torch.int32)
        return GridTensor(packed, scale.reshape(shape[0], -1).contiguous(), None, spec, shape)


class Int8:
    """Codec of ``int8``."""

    def layout(self, spec: QuantSpec, shape: tuple[int, ...]) -> Layout:
        """See :class:`quantkit.formats.base.Codec`."""
        out, _ = matrix(shape)
        return {"weight": (torch.int8, shape), "SCB": (torch.float32, (out,)), "weight_format": (torch.uint8, ())}

    def encode(self, qtensor: GridTensor) -> dict[str, Tensor]:
        """Refuse."""
        raise FormatError(ONLY_READ)

    def decode(self, tensors: Mapping[str, Tensor], spec: QuantSpec, shape: tuple[int, ...]) -> GridTensor:
        """See :class:`quantkit.formats.base.Codec`."""
        check_layout(tensors, self.layout(spec, shape))
        if int(tensors["weight_format"]):
            raise FormatError(f"weight_format is {int(tensors['weight_format'])}; quantkit reads 0, rows")
        codes = tensors["weight"].contiguous().view(torch.uint8) ^ 0x80
        return GridTensor.from_codes(codes, (tensors["SCB"] / _LARGEST).unsqueeze(1), None, spec)


ONLY_READ = "bitsandbytes checkpoints are only read; write nf4 and int8 in format native, int8 in compressed-tensors or gptq"


def read_state(content: Tensor) -> dict[str, Any]:
    """Return the JSON of a weight, checked.

    Raises:
        FormatError: it is none, or lacks something, or says what cannot be.
    """
    try:
        found = json.loads(bytes(content.tolist()))
        sizes = [found["blocksize"], *([found["nested_blocksize"]] if "nested_blocksize" in found else [])]
        shape = found["shape"]
        if not all(type(size) is int and size > 0 for size in (*sizes, *shape)) or found["quant_type"] != "nf4":
            raise ValueError(f"blocksize {sizes}, shape {shape}, quant_type {found['quant_type']!r}")
        nested = {"nested_blocksize": sizes[1], "nested_offset": float(found["nested_offset"])} if len(sizes) > 1 else {}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise FormatError(f"{STATE} is malformed: {error!r}") from error
    return {"blocksize": sizes[0], "shape": tuple(shape), **nested}
