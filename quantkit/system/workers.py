"""Several processes that carry out one run together: who is who, and the few things they tell each other.

A launcher (``torchrun``, ``accelerate launch``) starts the same command several times, on one machine or on many, and says in
the environment how the processes find each other; torch.distributed connects them, with gloo. :class:`Workers` is what the rest
of the library sees: a process that is alone shares with nobody, and every method returns what it was given.

Sums are the same in whatever order they are made, because what is added has been rounded to a common step before
(:mod:`quantkit.calibrate.together`); nothing here may depend on the number of workers either.

When one of them is gone, the others cannot go on: each raises :class:`~quantkit.errors.WorkerError`, and :func:`launched` lets
one of them say so.
"""

import contextlib
import datetime
import os
import signal
from collections.abc import Iterator, Mapping, Sequence
from types import FrameType
from typing import Any, TypeVar

import torch
from torch import Tensor

from quantkit.errors import WorkerError

T = TypeVar("T")

LAUNCHED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What launchers put into the environment of every process."""

LONGEST_WAIT = datetime.timedelta(days=7)
"""How long workers wait for the one that writes; one that is gone is noticed at once, by its connection."""

_LOT_BYTES = 64 << 20
"""What is summed at a time, so that the library's own buffers stay small."""

_WAY_OUT = "what is finished is kept; give the same command again to continue"


class Workers:
    """A process that carries out a run alone.

    Attributes:
        rank: number of this process; the first writes.
        size: number of processes.
        shares: whether there may be others.
    """

    rank, size, shares = 0, 1, False

    @property
    def writes(self) -> bool:
        """Whether this process writes the result."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> list[T]:
        """Return what this process does of a list."""
        return list(items[self.rank :: self.size])

    def least(self, value: int) -> int:
        """Return the smallest of all processes' numbers."""
        return value

    def agree(self, value: bool) -> bool:
        """Say whether all processes say so."""
        return value

    def add(self, tensor: Tensor) -> None:
        """Replace a tensor by the sum over all processes; every one gives the same shape and dtype."""

    def maximum(self, tensor: Tensor) -> None:
        """Replace a tensor by the largest values of all processes."""

    def spread(self, tensor: Tensor, source: int) -> None:
        """Replace a tensor, on the CPU and contiguous, by that of process ``source``."""

    def texts(self, text: str) -> list[str]:
        """Return what every process says, by number."""
        return [text]

    def wait(self) -> None:
        """Return when all processes have come here."""


ALONE = Workers()
"""The one process of a run that nobody has launched as several."""


class Group(Workers):
    """One of the processes that a launcher has started.

    Args:
        environment: what the launcher says.

    Raises:
        WorkerError: the others are not to be found; every method raises it when one of them is gone.
    """

    shares = True

    def __init__(self, environment: Mapping[str, str]) -> None:
        from torch import distributed
        from torch.distributed.rendezvous import rendezvous

        self._library: Any = distributed
        self.local = int(environment.get("LOCAL_RANK", environment["RANK"]))
        if torch.cuda.is_available():
            torch.cuda.set_device(self.local % torch.cuda.device_count())
        with self._together():
            self._store, self.rank, self.size = next(iter(rendezvous("env://", timeout=LONGEST_WAIT)))
            distributed.init_process_group(
                "gloo", store=self._store, rank=self.rank, world_size=self.size, timeout=LONGEST_WAIT
            )

    @contextlib.contextmanager
    def _together(self) -> Iterator[None]:
        try:
            yield
        except (RuntimeError, ValueError, OSError) as error:
            reason = str(error).partition("\n")[0].rpartition("] ")[2].partition(". ")[0]
            raise WorkerError(
                f"a worker of this run is gone, and the others end with it (seen by {self.rank} of {self.size}: {reason}); "
                f"{_WAY_OUT}"
            ) from error

    def least(self, value: int) -> int:
        """Return the smallest of all processes' numbers."""
        found = torch.tensor([value])
        with self._together():
            self._library.all_reduce(found, self._library.ReduceOp.MIN)
        return int(found)

    def agree(self, value: bool) -> bool:
        """Say whether all processes say so."""
        return bool(self.least(int(value)))

    def add(self, tensor: Tensor) -> None:
        """Replace a tensor by the sum over all processes."""
        self._reduce(tensor, self._library.ReduceOp.SUM)

    def maximum(self, tensor: Tensor) -> None:
        """Replace a tensor by the largest values of all processes."""
        self._reduce(tensor, self._library.ReduceOp.MAX)

    def spread(self, tensor: Tensor, source: int) -> None:
        """Replace a tensor, on the CPU and contiguous, by that of process ``source``."""
        with self._together():
            self._library.broadcast(tensor.reshape(-1).view(torch.uint8), source)

    def texts(self, text: str) -> list[str]:
        """Return what every process says, by number."""
        own = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8) if text else torch.empty(0, dtype=torch.uint8)
        sizes = torch.zeros(self.size, dtype=torch.int64)
        sizes[self.rank] = len(own)
        self.add(sizes)
        found = []
        for source, size in enumerate(sizes.tolist()):
            said = own if source == self.rank else torch.empty(size, dtype=torch.uint8)
            if size:
                self.spread(said, source)
            found.append(bytes(said.numpy()).decode())
        return found

    def wait(self) -> None:
        """Return when all processes have come here."""
        with self._together():
            self._library.barrier()

    def is_first(self) -> bool:
        """Say whether no process has asked this before; where the launcher is gone, too, the first of every machine is."""
        try:
            return bool(self._store.add("quantkit-told", 1) == 1)
        except (RuntimeError, OSError):
            return self.local == 0

    def end(self) -> None:
        """Part from the others."""
        self._library.destroy_process_group()

    def _reduce(self, tensor: Tensor, how: Any) -> None:
        if not tensor.numel():
            return
        flat = tensor.cpu().contiguous().view(-1)
        with self._together():
            for part in flat.split(max(_LOT_BYTES // flat.itemsize, 1)):
                self._library.all_reduce(part, how)
        tensor.copy_(flat.view(tensor.shape))


@contextlib.contextmanager
def launched(environment: Mapping[str, str] = os.environ) -> Iterator[Workers]:
    """Join the processes that a launcher has started beside this one; without a launcher the process is :data:`ALONE`.

    When the run ends with an error, it leaves this context in the process that is first to tell; the others end without a word,
    with exit code 2, or 130 where somebody has stopped the run.

    Raises:
        WorkerError: another process is gone, or the launcher stops this one for it.
    """
    if not environment.get("WORLD_SIZE"):
        yield ALONE
        return
    if missing := [name for name in LAUNCHED if not environment.get(name)]:
        raise WorkerError(
            f"WORLD_SIZE={environment['WORLD_SIZE']} says that a launcher has started this process, but {missing[0]} is not "
            "set; start it by torchrun --nproc-per-node N -m quantkit run RECIPE, or unset WORLD_SIZE"
        )
    group = Group(environment)
    before = signal.signal(signal.SIGTERM, _stopped)
    try:
        yield group
        group.end()
    except BaseException as error:
        if not group.is_first():
            raise SystemExit(130 if isinstance(error, KeyboardInterrupt) else 2) from error
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


def _stopped(number: int, frame: FrameType | None) -> None:
    """End this process because its launcher asks for that."""
    raise WorkerError(f"the launcher stops this run, as it does when one of its workers is gone; {_WAY_OUT}")
