"""The hub value: a quantized tensor. Quantizers make it, formats store it, kernels repack it.

:class:`QTensor` is what every kind has: enough to store, move, count or dequantize a weight. Code that reads codes and scales
asks for a :class:`GridTensor`. The other kind is :class:`BlockTensor`.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, Self

import torch
from torch import Tensor

from quantkit.dtypes import SCALE_DTYPES
from quantkit.errors import SpecError
from quantkit.numerics import ggml, grid
from quantkit.numerics.ggml import BlockType, Content
from quantkit.numerics.pack import pack, packed_words, unpack
from quantkit.spec import QuantSpec, WeightSpec


class QTensor(Protocol):
    """A quantized weight of any kind: a frozen value that holds a few named tensors."""

    @property
    def spec(self) -> WeightSpec:
        """Which numbers the weight can have."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """(out, in), or (experts, out, in)."""
        ...

    @property
    def input_scale(self) -> Tensor | None:
        """The stored scale (..., 1) of the layer's inputs, where their grid is static."""
        ...

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        ...

    @property
    def numel(self) -> int:
        """Number of weights."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes that a file needs for it."""
        ...

    def parts(self) -> dict[str, Tensor]:
        """Return the tensors by name: those of a ``state_dict``, in a fixed order."""
        ...

    def with_parts(self, parts: Mapping[str, Tensor | None]) -> Self:
        """Return the same value with other tensors in place of the named ones; None takes an optional one away."""
        ...

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the weight this stands for, computed in float32 and rounded once to ``dtype``."""
        ...

    def rows(self, index: slice | Tensor) -> Self:
        """Return output rows: a slice of them (a view where torch allows), or those of an int64 (n,) index (a copy)."""
        ...

    def to(self, device: torch.device | str) -> Self:
        """Return the same value with its tensors on ``device``; no dtype changes."""
        ...

    def __getitem__(self, expert: int) -> Self:
        """Return one expert of a 3-D tensor (a view)."""
        ...

    @classmethod
    def stack(cls, parts: Sequence[Self]) -> Self:
        """Join (out, in) tensors of one spec and shape into one of shape (experts, out, in)."""
        ...


@dataclass(frozen=True, slots=True)
class GridTensor:
    """A weight on a grid: ``w ~ (code - zero_point) * scale [/ global_scale]``, codes unsigned.

    Attributes:
        packed: int32 (..., out, ceil(in * bits / 32)); see :mod:`quantkit.numerics.pack`.
        scale: (..., out_blocks, in_blocks) in ``spec.scale_dtype``.
        zero_point: uint8 of the scale's shape, or None for a symmetric grid (the middle code). A grid with an offset
            (:attr:`quantkit.spec.QuantSpec.offset`) has that here, in the scale's dtype: ``w ~ code * scale + offset``.
        spec: the grid.
        shape: (out, in), or (experts, out, in).
        global_scale: float32 (..., 1) where scales are FP8 (NVFP4), else None: what the weight was multiplied by before it was
            quantized. It divides, because that is the number files hold, and its inverse would be another one.
        input_scale: (..., 1) scale of the inputs where their grid is static, else None. It was calibrated together with the
            weight and travels with it.
    """

    packed: Tensor
    scale: Tensor
    zero_point: Tensor | None
    spec: QuantSpec
    shape: tuple[int, ...]
    global_scale: Tensor | None = None
    input_scale: Tensor | None = None

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
        if self.zero_point is not None and self.zero_point.is_floating_point() != self.spec.offset:
            raise SpecError(
                f"zero_point: {self.zero_point.dtype} for {self.spec.describe()}; an offset is a float, a code is not"
            )
        if self.spec.has_global_scale != (self.global_scale is not None):
            wanted = "given" if self.spec.has_global_scale else "absent"
            raise SpecError(f"global_scale must be {wanted} for {self.spec.describe()} with {self.spec.scale_dtype} scales")
        for name in ("global_scale", "input_scale"):
            value = getattr(self, name)
            if value is not None and tuple(value.shape) != (*lead, 1):
                raise SpecError(f"{name}: shape {tuple(value.shape)}, want {(*lead, 1)}")

    @classmethod
    def empty(cls, spec: QuantSpec, shape: tuple[int, ...], device: torch.device | str = "meta") -> "GridTensor":
        """Return a quantized tensor whose parts wait to be filled, or to be asked for their size; it has no input scale."""
        rows, columns = grid.block_size(spec, shape)
        blocks = (*shape[:-2], shape[-2] // rows, shape[-1] // columns)
        return cls(
            torch.empty((*shape[:-1], packed_words(shape[-1], spec.bits)), dtype=torch.int32, device=device),
            torch.empty(blocks, dtype=SCALE_DTYPES[spec.scale_dtype], device=device),
            None if spec.symmetric else torch.empty(blocks, dtype=grid.zero_dtype(spec), device=device),
            spec,
            shape,
            torch.empty((*shape[:-2], 1), device=device) if spec.has_global_scale else None,
        )

    @classmethod
    def from_codes(
        cls, codes: Tensor, scale: Tensor, zero_point: Tensor | None, spec: QuantSpec, global_scale: Tensor | None = None
    ) -> "GridTensor":
        """Pack uint8 ``codes`` (..., out, in) with their grid parameters; a global scale that is needed and not given is 1."""
        if global_scale is None and spec.has_global_scale:
            global_scale = torch.ones((*codes.shape[:-2], 1), device=codes.device)
        return cls(pack(codes, spec.bits), scale.contiguous(), zero_point, spec, tuple(codes.shape), global_scale)

    def codes(self) -> Tensor:
        """Return the codes, uint8 of :attr:`shape`."""
        return unpack(self.packed, self.spec.bits, self.shape[-1])

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the weight this stands for, computed in float32 and rounded once to ``dtype``."""
        if len(self.shape) == 3 and self.numel > grid.AT_ONCE:
            return grid.one_by_one(self.shape, dtype, self.device, lambda expert: self[expert].dequantize(dtype))
        scale = self.scale
        if self.global_scale is not None:
            scale = scale.float() / self.global_scale.unsqueeze(-1)
        return grid.dequantize(self.codes(), scale, self.zero_point, self.spec).to(dtype)

    @property
    def numel(self) -> int:
        """Number of weights."""
        return int(torch.Size(self.shape).numel())

    @property
    def nbytes(self) -> int:
        """Bytes of the packed form: codes with row padding, all scales, and zero points at the width of a code."""
        width = self.scale.element_size() * 8 if self.spec.offset else self.spec.bits
        zero_bits = 0 if self.zero_point is None else self.zero_point.numel() * width
        single = sum(one.nbytes for one in (self.global_scale, self.input_scale) if one is not None)
        return self.packed.nbytes + self.scale.nbytes + -(-zero_bits // 8) + single

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight, scales, zero points and padding included."""
        return self.nbytes * 8 / self.numel

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.packed.device

    def parts(self) -> dict[str, Tensor]:
        """Return the tensors by name."""
        return {name: part for name in PARTS if (part := getattr(self, name)) is not None}

    def with_parts(self, parts: Mapping[str, Tensor | None]) -> "GridTensor":
        """Return the same value with other tensors in place of the named ones."""
        named: dict[str, Any] = dict(parts)
        return dataclasses.replace(self, **named)

    def to(self, device: torch.device | str) -> "GridTensor":
        """Return the same value with its tensors on ``device``."""
        return self._map(lambda tensor: tensor.to(device))

    def rows(self, index: slice | Tensor) -> "GridTensor":
        """Return output rows, see :meth:`QTensor.rows`.

        Raises:
            SpecError: the rows do not fall on block boundaries, or single ones are wanted where several share a scale.
        """
        block_rows, _ = grid.block_size(self.spec, self.shape)
        blocks: slice | Tensor = index
        if isinstance(index, slice):
            start, stop, _ = index.indices(self.shape[-2])
            if start % block_rows or stop % block_rows or index.step not in (None, 1):
                raise SpecError(f"rows {start}:{stop} do not fall on blocks of {block_rows} rows")
            blocks, count = slice(start // block_rows, stop // block_rows), stop - start
        else:
            if block_rows != 1:
                raise SpecError(f"single rows of a weight {self.spec.describe()}: {block_rows} rows share a scale")
            count = len(index)
        zero = None if self.zero_point is None else self.zero_point[..., blocks, :]
        packed, scale = self.packed[..., index, :], self.scale[..., blocks, :]
        shape = (*self.shape[:-2], count, self.shape[-1])
        return dataclasses.replace(self, packed=packed, scale=scale, zero_point=zero, shape=shape)

    def __getitem__(self, expert: int) -> "GridTensor":
        """Return one expert of a 3-D tensor (a view)."""
        if len(self.shape) != 3:
            raise SpecError(f"only a 3-D quantized tensor can be indexed; shape is {self.shape}")
        return self._map(lambda tensor: tensor[expert], self.shape[1:])

    @classmethod
    def stack(cls, parts: Sequence["GridTensor"]) -> "GridTensor":
        """Join (out, in) tensors of one spec and shape into one of shape (experts, out, in)."""
        return _combine(parts, torch.stack, (len(parts), *parts[0].shape), PARTS)

    def _map(self, change: Callable[[Tensor], Tensor], shape: tuple[int, ...] | None = None) -> "GridTensor":
        """Return this with every tensor changed."""
        parts: dict[str, Any] = {name: None if (part := getattr(self, name)) is None else change(part) for name in PARTS}
        return dataclasses.replace(self, **parts, shape=self.shape if shape is None else shape)


@dataclass(frozen=True, slots=True)
class BlockTensor:
    """A weight in the blocks of a GGUF file, as the file's own bytes; :mod:`quantkit.numerics.ggml` says what they mean.

    Attributes:
        data: uint8 (..., out, bytes of a row).
        spec: the grid; its ``blocks`` is not None.
    """

    data: Tensor
    spec: QuantSpec

    def __post_init__(self) -> None:
        if self.data.dtype != torch.uint8 or self.data.ndim < 2 or self.data.shape[-1] % self.kind.nbytes:
            got = f"{self.data.dtype} {tuple(self.data.shape)}"
            raise SpecError(f"blocks: {got}, want uint8 (..., out, n x {self.kind.nbytes}) for {self.spec.describe()}")

    @classmethod
    def empty(cls, spec: QuantSpec, shape: tuple[int, ...], device: torch.device | str = "meta") -> "BlockTensor":
        """Return one whose bytes wait to be filled, or to be asked for their size."""
        return cls(torch.empty(block_layout(spec, shape), dtype=torch.uint8, device=device), spec)

    @classmethod
    def from_content(cls, content: Content, spec: QuantSpec) -> "BlockTensor":
        """Pack the blocks of a weight (..., out, in): leading dimensions of ``content`` are (..., out, blocks)."""
        return cls(ggml.BLOCK_TYPES[str(spec.blocks)].pack(content).flatten(-2), spec)

    @property
    def kind(self) -> BlockType:
        """The type of the blocks."""
        return ggml.BLOCK_TYPES[str(self.spec.blocks)]

    @property
    def shape(self) -> tuple[int, ...]:
        """(out, in), or (experts, out, in)."""
        return (*self.data.shape[:-1], self.data.shape[-1] // self.kind.nbytes * self.kind.size)

    input_scale: ClassVar[None] = None

    @property
    def device(self) -> torch.device:
        """Where the bytes are."""
        return self.data.device

    @property
    def numel(self) -> int:
        """Number of weights."""
        return int(torch.Size(self.shape).numel())

    @property
    def nbytes(self) -> int:
        """Bytes in a file."""
        return self.data.nbytes

    def parts(self) -> dict[str, Tensor]:
        """Return the bytes by name."""
        return {"blocks": self.data}

    def with_parts(self, parts: Mapping[str, Tensor | None]) -> "BlockTensor":
        """Return the same value with other bytes."""
        data = parts.get("blocks")
        return self if data is None else BlockTensor(data, self.spec)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the weight, computed in float32 (no product in it is rounded) and rounded once to ``dtype``."""
        return ggml.values(self.data, self.kind).to(dtype)

    def rows(self, index: slice | Tensor) -> "BlockTensor":
        """Return output rows, see :meth:`QTensor.rows`."""
        return BlockTensor(self.data[..., index, :], self.spec)

    def to(self, device: torch.device | str) -> "BlockTensor":
        """Return the same value with its bytes on ``device``."""
        return BlockTensor(self.data.to(device), self.spec)

    def __getitem__(self, expert: int) -> "BlockTensor":
        """Return one expert of a 3-D tensor (a view)."""
        return BlockTensor(self.data[expert], self.spec)

    @classmethod
    def stack(cls, parts: Sequence["BlockTensor"]) -> "BlockTensor":
        """Join (out, in) tensors of one spec and shape into one of shape (experts, out, in)."""
        _refuse_mixture(parts)
        return cls(torch.stack([part.data for part in parts]), parts[0].spec)


def block_layout(spec: QuantSpec, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape (..., out, bytes of a row) of a weight's blocks.

    Raises:
        SpecError: blocks do not divide its rows.
    """
    if reason := spec.rejects(shape):
        raise SpecError(reason)
    kind = ggml.BLOCK_TYPES[str(spec.blocks)]
    return (*shape[:-1], shape[-1] // kind.size * kind.nbytes)


def empty_qtensor(spec: QuantSpec, shape: tuple[int, ...], device: torch.device | str = "meta") -> "GridTensor | BlockTensor":
    """Return one of the kind that ``spec`` wants, whose parts wait to be filled, or to be asked for their size."""
    return (BlockTensor if spec.blocks is not None else GridTensor).empty(spec, shape, device)


PARTS = ("packed", "scale", "zero_point", "global_scale", "input_scale")
"""The tensors of a :class:`QTensor`; all but the first two may be None."""


def as_grid(qtensor: QTensor) -> GridTensor:
    """Return ``qtensor``, for code that reads codes and scales.

    Raises:
        SpecError: it is of another kind.
    """
    if not isinstance(qtensor, GridTensor):
        raise SpecError(f"a weight {qtensor.spec.describe()} has no codes and scales on a grid; want a GridTensor")
    return qtensor


def concatenate(parts: Sequence[QTensor]) -> QTensor:
    """Join quantized tensors of one spec, with the same global and input scales, along their output rows."""
    blocks = [part for part in parts if isinstance(part, BlockTensor)]
    if len(blocks) == len(parts):
        _refuse_mixture(parts)
        return BlockTensor(torch.cat([part.data for part in blocks], -2), blocks[0].spec)
    return _concatenate_grids([as_grid(part) for part in parts])


def _concatenate_grids(parts: Sequence[GridTensor]) -> GridTensor:
    shape = (*parts[0].shape[:-2], sum(p.shape[-2] for p in parts), parts[0].shape[-1])
    joined = _combine(parts, lambda tensors: torch.cat(tensors, -2), shape, PARTS[:3])
    for name in PARTS[3:]:
        values = [getattr(part, name) for part in parts]
        if any((v is None) != (values[0] is None) or (v is not None and not torch.equal(v, values[0])) for v in values):
            raise SpecError(f"cannot join quantized tensors with different {name}")
    return joined


def _refuse_mixture(parts: Sequence[QTensor]) -> None:
    if any(part.spec != parts[0].spec for part in parts):
        raise SpecError(f"cannot join quantized tensors of different specs: {sorted({p.spec.describe() for p in parts})}")


def _combine(
    parts: Sequence[GridTensor], join: Callable[[list[Tensor]], Tensor], shape: tuple[int, ...], names: Sequence[str]
) -> GridTensor:
    _refuse_mixture(parts)
    found = {name: [getattr(part, name) for part in parts] for name in names}
    if odd := next((name for name, tensors in found.items() if len({t is None for t in tensors}) > 1), None):
        raise SpecError(f"cannot join quantized tensors with and without {odd}")
    joined: dict[str, Any] = {name: None if tensors[0] is None else join(tensors) for name, tensors in found.items()}
    return dataclasses.replace(parts[0], **joined, shape=shape)
