"""The hub value: a quantized tensor. Quantizers make it, formats store it, kernels repack it."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.errors import SpecError
from quantkit.numerics import grid
from quantkit.numerics.pack import pack, packed_words, unpack
from quantkit.spec import QuantSpec


@dataclass(frozen=True, slots=True)
class QTensor:
    """A weight on a grid: ``w ~ (code - zero_point) * scale``, codes unsigned.

    Attributes:
        packed: int32 (..., out, ceil(in * bits / 32)); see :mod:`quantkit.numerics.pack`.
        scale: (..., out_blocks, in_blocks) in ``spec.scale_dtype``.
        zero_point: uint8 of the scale's shape, or None for a symmetric grid (the middle code).
        spec: the grid.
        shape: (out, in), or (experts, out, in).
    """

    packed: Tensor
    scale: Tensor
    zero_point: Tensor | None
    spec: QuantSpec
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        rows, cols = grid.block_size(self.spec, self.shape)
        lead = self.shape[:-2]
        blocks = (*lead, self.shape[-2] // rows, self.shape[-1] // cols)
        words = (*self.shape[:-1], packed_words(self.shape[-1], self.spec.bits))
        if tuple(self.packed.shape) != words or self.packed.dtype != torch.int32:
            raise SpecError(
                f"packed codes: {self.packed.dtype} {tuple(self.packed.shape)}, want int32 {words} for {self.shape}"
            )
        if tuple(self.scale.shape) != blocks:
            raise SpecError(f"scale: shape {tuple(self.scale.shape)}, want {blocks} for {self.shape} {self.spec.describe()}")
        if self.spec.symmetric != (self.zero_point is None):
            raise SpecError(f"zero_point must be {'absent' if self.spec.symmetric else 'given'} for {self.spec.describe()}")
        if self.zero_point is not None and tuple(self.zero_point.shape) != blocks:
            raise SpecError(f"zero_point: shape {tuple(self.zero_point.shape)}, want {blocks}")

    @classmethod
    def from_codes(cls, codes: Tensor, scale: Tensor, zero_point: Tensor | None, spec: QuantSpec) -> "QTensor":
        """Pack uint8 ``codes`` (..., out, in) with their grid parameters."""
        return cls(pack(codes, spec.bits), scale.contiguous(), zero_point, spec, tuple(codes.shape))

    def codes(self) -> Tensor:
        """Return the codes, uint8 of :attr:`shape`."""
        return unpack(self.packed, self.spec.bits, self.shape[-1])

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the weight this stands for, computed in float32 and rounded once to ``dtype``."""
        return grid.dequantize(self.codes(), self.scale, self.zero_point, self.spec).to(dtype)

    @property
    def numel(self) -> int:
        """Number of weights."""
        return int(torch.Size(self.shape).numel())

    @property
    def nbytes(self) -> int:
        """Bytes of the packed form: codes with row padding, scales, and zero points at the width of a code."""
        zero_bits = 0 if self.zero_point is None else self.zero_point.numel() * self.spec.bits
        return self.packed.nbytes + self.scale.nbytes + -(-zero_bits // 8)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight, scales, zero points and padding included."""
        return self.nbytes * 8 / self.numel

    def to(self, device: torch.device | str) -> "QTensor":
        """Return the same value with its tensors on ``device``."""
        zero = None if self.zero_point is None else self.zero_point.to(device)
        return dataclasses.replace(self, packed=self.packed.to(device), scale=self.scale.to(device), zero_point=zero)

    def rows(self, start: int, stop: int) -> "QTensor":
        """Return output rows ``start:stop`` (a view where torch allows); both must fall on block boundaries."""
        block_rows, _ = grid.block_size(self.spec, self.shape)
        if start % block_rows or stop % block_rows:
            raise SpecError(f"rows {start}:{stop} do not fall on blocks of {block_rows} rows")
        blocks = slice(start // block_rows, stop // block_rows)
        zero = None if self.zero_point is None else self.zero_point[..., blocks, :]
        shape = (*self.shape[:-2], stop - start, self.shape[-1])
        return QTensor(self.packed[..., start:stop, :], self.scale[..., blocks, :], zero, self.spec, shape)

    def __getitem__(self, expert: int) -> "QTensor":
        """Return one expert of a 3-D tensor (a view)."""
        if len(self.shape) != 3:
            raise SpecError(f"only a 3-D quantized tensor can be indexed; shape is {self.shape}")
        zero = None if self.zero_point is None else self.zero_point[expert]
        return QTensor(self.packed[expert], self.scale[expert], zero, self.spec, self.shape[1:])


def concatenate(parts: Sequence[QTensor]) -> QTensor:
    """Join quantized tensors of one spec along their output rows."""
    return _combine(
        parts,
        lambda tensors: torch.cat(tensors, -2),
        (*parts[0].shape[:-2], sum(p.shape[-2] for p in parts), parts[0].shape[-1]),
    )


def stack(parts: Sequence[QTensor]) -> QTensor:
    """Join quantized (out, in) tensors of one spec and shape into one of shape (experts, out, in)."""
    return _combine(parts, torch.stack, (len(parts), *parts[0].shape))


def _combine(parts: Sequence[QTensor], join: Callable[[list[Tensor]], Tensor], shape: tuple[int, ...]) -> QTensor:
    spec = parts[0].spec
    if any(part.spec != spec for part in parts):
        raise SpecError(f"cannot join quantized tensors of different specs: {sorted({p.spec.describe() for p in parts})}")
    zeros = [part.zero_point for part in parts if part.zero_point is not None]
    return QTensor(
        join([part.packed for part in parts]), join([part.scale for part in parts]), join(zeros) if zeros else None, spec, shape
    )
