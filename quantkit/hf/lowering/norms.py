"""Recognise RMS norms among recorded steps: seven steps over a vector become one."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quantkit.kernels.program.tape import Compute, Mixture, Read, Step


def fuse(steps: Sequence[Step], result: Read) -> list[Step]:
    """Return steps in which ``x * rsqrt(mean(x * x) + eps) * gain`` is one step; those it was made of may be left over."""
    uses = Counter(read.source for step in steps for read in step.reads if isinstance(read.source, int))
    uses.update([result.source] if isinstance(result.source, int) else [])
    made = {step.out: step for step in steps}
    after = {read.source: step for step in steps for read in step.reads if isinstance(read.source, int)}
    replaced: dict[int, Step] = {}
    for step in steps:
        found = _normalized(step, made)
        if found is None:
            continue
        out, gain = step.out, torch.ones(found.n)
        scaling = after.get(out)
        if uses[out] == 1 and not isinstance(scaling, Mixture) and (own := _gain(scaling, out, found)) is not None:
            assert scaling is not None
            out, gain = scaling.out, own
        columns = (found.n,)
        reads = (found.x, Read(gain, 0, columns, (1,)), Read(torch.zeros(found.n), 0, columns, (1,)))
        replaced[out] = Compute("norm", reads, out, (found.eps, 0.0))
    return [replaced.get(step.out, step) for step in steps]


@dataclass(frozen=True, slots=True, eq=False)
class _Found:
    x: Read  # (outer, n)
    eps: float

    @property
    def n(self) -> int:
        return self.x.shape[1]


def _normalized(step: Step, made: dict[int, Step]) -> _Found | None:
    """Return what ``step`` normalizes, if it is the product with a reciprocal root."""
    if not isinstance(step, Compute) or step.op != "mul":
        return None
    for x, r in (step.reads, step.reads[::-1]):
        root = _made(r, made, "rsqrt")
        shifted = root and _made(root.reads[0], made, "add")
        mean, eps = _scaled(shifted, made, "mul")
        total, factor = _scaled(mean, made, "sum")
        if total is None or eps is None or factor is None:
            continue
        outer, n = total.reads[0].shape
        squares = _made(total.reads[0], made, "square") or _made(total.reads[0], made, "mul")
        joined = np.array_equal(_places(total.reads[0]), np.arange(outer * n))
        regular = joined and abs(factor * n - 1) < 1e-5
        if squares is None or not regular or not isinstance(x.source, int):
            continue
        places = _places(x)
        if any(not np.array_equal(_places(part), places) or not _reads(part, x.source) for part in squares.reads):
            continue
        if not np.array_equal(_places(r), np.arange(outer).repeat(n)) or places.size != outer * n:
            continue
        if np.array_equal(places, np.arange(places.size) + places[0]):
            return _Found(Read(x.source, int(places[0]), (outer, n), (n, 1)), eps)
    return None


def _made(read: Read, made: dict[int, Step], op: str) -> Compute | None:
    """Return the step that made what is read, if it is of this kind."""
    step = made.get(read.source) if isinstance(read.source, int) else None
    return step if isinstance(step, Compute) and step.op == op else None


def _scaled(step: Compute | None, made: dict[int, Step], op: str) -> tuple[Compute | None, float | None]:
    """Return the operand of a sum or product with a number, made by ``op``, and the number."""
    if step is None or len(step.reads) != 2:
        return None, None
    for part, number in (step.reads, step.reads[::-1]):
        if isinstance(number.source, Tensor) and number.source.numel() == 1:
            return _made(part, made, op), float(number.source[0])
    return None, None


def _gain(step: Step | None, value: int, found: _Found) -> Tensor | None:
    """Return the gain (n,) by which a step multiplies a normalized value, if that is all it does."""
    if not isinstance(step, Compute) or step.op != "mul":
        return None
    for part, gain in (step.reads, step.reads[::-1]):
        if not _reads(part, value) or not isinstance(gain.source, Tensor):
            continue
        places = _places(gain)
        outer = places.size // found.n
        if not np.array_equal(_places(part), np.arange(places.size)) or outer != found.x.shape[0]:
            continue
        if np.array_equal(places, np.tile(places[: found.n], outer)):
            return gain.source[torch.from_numpy(places[: found.n])].contiguous()
    return None


def _reads(read: Read, value: int) -> bool:
    return isinstance(read.source, int) and read.source == value


def _places(read: Read) -> NDArray[np.int64]:
    """Return the index of every element that is read, in order."""
    places = np.full(read.shape, read.offset, dtype=np.int64)
    for axis, (size, stride) in enumerate(zip(read.shape, read.strides, strict=True)):
        places += (np.arange(size, dtype=np.int64) * stride).reshape([-1 if i == axis else 1 for i in range(len(read.shape))])
    return places.reshape(-1)
