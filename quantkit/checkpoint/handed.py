"""What a finished block hands on to the next one: files of hidden states, written by every worker of a run for itself.

A hidden state is known by its number among those of all workers, so that a run may go on with another number of workers: each
reads what it wants, from whichever files hold it.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from quantkit.checkpoint.digests import digest_of
from quantkit.checkpoint.state import RUN, STAGE, start_over
from quantkit.errors import FormatError
from quantkit.system.files import clear_errors
from quantkit.system.tensors import write_tensors
from quantkit.system.workers import ALONE, Workers


@dataclass(frozen=True, slots=True)
class Share:
    """Which hidden states are a worker's.

    Attributes:
        workers: all of them.
        batches: number of batches that are this worker's; None for a process alone, whose states are all there are.
    """

    workers: Workers = ALONE
    batches: int | None = None

    def numbers(self, count: int) -> list[int]:
        """Return the numbers of this worker's ``count`` states: all batches' once, and again for the float model.

        Workers call this together.
        """
        if self.batches is None:
            return list(range(count))
        sizes = [int(text) for text in self.workers.texts(str(self.batches))]
        total, rank, size = sum(sizes), self.workers.rank, self.workers.size
        copies = count // self.batches if self.batches else 0
        return [copy * total + rank + size * batch for copy in range(copies) for batch in range(self.batches)]


def write(out: Path, index: int, states: Sequence[Tensor], share: Share) -> list[str]:
    """Write what block ``index`` hands on, and return the digests of all workers' files; an empty list if there is nothing.

    Args:
        out: directory of the checkpoint.
        index: of the block.
        states: this worker's.
        share: which these are; workers call this together.
    """
    named = {f"{number:05d}": one.contiguous() for number, one in zip(share.numbers(len(states)), states, strict=True)}
    if named:
        write_tensors(_file(out, index, share.workers.rank), named)
    return [digest for digest in share.workers.texts(digest_of(named) if named else "") if digest]


def read(out: Path, index: int, digests: Sequence[str], count: int, share: Share) -> list[Tensor]:
    """Return this worker's ``count`` states of what block ``index`` handed on, mapped; files may be deleted meanwhile.

    Args:
        out: directory of the checkpoint.
        index: of the block.
        digests: of all workers' files, by number; what the first worker gives counts.
        count: number of this worker's states.
        share: which these are; workers call this together.

    Raises:
        FormatError: they are not what was written.
    """
    wanted = [f"{number:05d}" for number in share.numbers(count)]
    found: dict[str, Tensor] = {}
    for worker, digest in enumerate(json.loads(share.workers.texts(json.dumps(list(digests)))[0])):
        path = _file(out, index, worker)
        try:
            with safe_open(path, "pt") as file:
                names = sorted(file.keys())
                if not set(names) & set(wanted):
                    continue
                states = {name: file.get_tensor(name) for name in names}
        except (OSError, SafetensorError) as error:
            raise FormatError(f"{path} is damaged ({error}); {start_over(out / STAGE)}") from error
        if digest_of(states) != digest:
            raise FormatError(f"{path} is not what was written; the disk lost bits; {start_over(out / STAGE)}")
        found |= states
    if lost := next((name for name in wanted if name not in found), None):
        raise FormatError(f"{out / STAGE / RUN}: hidden state {lost} after block {index} is missing; {start_over(out / STAGE)}")
    return [found[name] for name in wanted]


def remove(out: Path, index: int) -> None:
    """Remove what block ``index`` handed on, and what of it a run left unfinished."""
    for path in (out / STAGE / RUN).glob(f"chain-{index:05d}*.safetensors"):
        with clear_errors(f"remove {path}"):
            path.unlink(missing_ok=True)


def _file(out: Path, index: int, worker: int) -> Path:
    return out / STAGE / RUN / f"chain-{index:05d}{f'-{worker}' * bool(worker)}.safetensors"
