"""A second kind of quantized weight, the simplest there is: every weight is one of a few free values."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class CodebookSpec:
    """One table of ``size`` values per matrix."""

    size: int

    def describe(self) -> str:
        return f"codebook of {self.size}"

    def rejects(self, shape: tuple[int, ...]) -> str | None:
        return None if self.size <= 256 else f"{self.size} values; want at most 256"


@dataclass(frozen=True)
class CodebookTensor:
    """``w = table[index]``: index uint8 (..., out, in), table float16 (..., size)."""

    index: Tensor
    table: Tensor
    spec: CodebookSpec
    input_scale: Tensor | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.index.shape)

    @property
    def device(self) -> torch.device:
        return self.index.device

    @property
    def numel(self) -> int:
        return self.index.numel()

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts().values())

    def parts(self) -> dict[str, Tensor]:
        scale = {} if self.input_scale is None else {"input_scale": self.input_scale}
        return {"index": self.index, "table": self.table, **scale}

    def with_parts(self, parts: Mapping[str, Tensor | None]) -> "CodebookTensor":
        return replace(self, **parts)  # type: ignore[arg-type]

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        values = self.table.float().unsqueeze(-2).expand(*self.shape[:-1], -1)
        return values.gather(-1, self.index.long()).to(dtype)

    def rows(self, index: slice | Tensor) -> "CodebookTensor":
        return replace(self, index=self.index[..., index, :])

    def to(self, device: torch.device | str) -> "CodebookTensor":
        return self.with_parts({name: part.to(device) for name, part in self.parts().items()})

    def __getitem__(self, expert: int) -> "CodebookTensor":
        return self.with_parts({name: part[expert] for name, part in self.parts().items()})

    @classmethod
    def stack(cls, parts: Sequence["CodebookTensor"]) -> "CodebookTensor":
        tensors = {name: torch.stack([part.parts()[name] for part in parts]) for name in parts[0].parts()}
        return parts[0].with_parts(tensors)


def random_codebook(shape: tuple[int, ...], size: int = 16, seed: int = 0) -> CodebookTensor:
    """Any index, any values."""
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(0, size, shape, generator=generator, dtype=torch.uint8)
    return CodebookTensor(index, torch.randn(*shape[:-2], size, generator=generator).half(), CodebookSpec(size))
