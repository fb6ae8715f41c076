"""Divide the choice of codes among workers: rows of a weight, or experts of a stack, and bring the codes together.

The codes of a row do not depend on other rows, and those of an expert not on other experts, so that every worker ends with the
codes that one process alone would have found. What is said about a layer (errors, notes) is put together in an order that does
not depend on the number of workers.
"""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field

from quantkit.numerics import grid
from quantkit.qtensor import QTensor, concatenate, empty_qtensor
from quantkit.spec import QuantSpec
from quantkit.system.workers import Workers

GRANULE = 64
"""Rows that stay together, if they do not share scales with more: compiled quantizers work on so many at a time."""


@dataclass
class Remarks:
    """What is said about rows of a weight.

    Attributes:
        noise, signal: sums of squared errors and of squared weights, one of each for every granule.
        lost: number of rows that have become zero.
        notes: what was unusual.
    """

    noise: list[float] = field(default_factory=list)
    signal: list[float] = field(default_factory=list)
    lost: int = 0
    notes: list[str] = field(default_factory=list)

    def add(self, other: "Remarks") -> None:
        """Put what is said about later rows behind this."""
        self.noise += other.noise
        self.signal += other.signal
        self.lost += other.lost
        self.notes += [note for note in other.notes if note not in self.notes]

    @property
    def loss(self) -> float:
        """The errors' share of the weights; the sums are exact, so that their order does not matter."""
        return math.fsum(self.noise) / max(math.fsum(self.signal), 1e-30)


def granules(rows: slice, spec: QuantSpec, shape: tuple[int, ...], workers: Workers) -> Iterator[slice]:
    """Yield the rows that errors are summed over: all at once for a process that is alone."""
    step = _granule(spec, shape) if workers.shares else rows.stop - rows.start
    for start in range(rows.start, rows.stop, max(step, 1)):
        yield slice(start, min(start + step, rows.stop))


def portions(spec: QuantSpec, shape: tuple[int, ...], workers: Workers, *, divisible: bool) -> list[slice]:
    """Return which rows of a weight (out, in) every worker does, by number; some may have none.

    A weight that cannot be divided is the first worker's.
    """
    rows = shape[-2]
    step = _granule(spec, shape) if divisible else rows
    count = -(-rows // step)
    ends = [min(count * (rank + 1) // workers.size * step, rows) for rank in range(workers.size)]
    if not divisible:
        ends = [rows] * workers.size
    return [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]


def _granule(spec: QuantSpec, shape: tuple[int, ...]) -> int:
    block, _ = grid.block_size(spec, shape) if spec.blocks is None else (1, 0)
    return max(GRANULE // block, 1) * block


def bring_together(
    own: QTensor | None, remarks: Remarks, rows: Sequence[slice], columns: int, spec: QuantSpec, workers: Workers
) -> tuple[QTensor, Remarks]:
    """Return the whole weight, and what is said about it, of what every worker has done.

    Args:
        own: this worker's rows; None if it has none.
        remarks: about them.
        rows: of :func:`portions`.
        columns: of the weight.
        spec: its grid.
        workers: call this together.
    """
    whole = Remarks()
    for said in workers.texts(json.dumps(asdict(remarks))):
        whole.add(Remarks(**json.loads(said)))
    parts = [
        spread(own, spec, (part.stop - part.start, columns), workers, source)
        for source, part in enumerate(rows)
        if part.stop > part.start
    ]
    return parts[0] if len(parts) == 1 else concatenate(parts), whole


def spread(own: QTensor | None, spec: QuantSpec, shape: tuple[int, ...], workers: Workers, source: int) -> QTensor:
    """Return the weight that worker ``source`` has, and the others get."""
    if workers.rank == source and own is not None:
        mine = {name: part.cpu().contiguous() for name, part in own.parts().items()}
        found = own.with_parts(mine)
    else:
        found = empty_qtensor(spec, shape, "cpu")
    for part in found.parts().values():
        workers.spread(part, source)
    return found
