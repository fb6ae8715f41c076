"""Rows as tasks of a Ray cluster.

Every machine opens the model for itself and writes finished rows into the sweep's directory, which all of them share; so the
files are those of a sweep on one machine, and either continues the other's. Only settings are sent. A worker keeps what it has
opened for its next row. A worker that dies loses its row alone.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from quantkit.checkpoint import Key
from quantkit.errors import QuantkitError
from quantkit.sweeps.axes import Entry
from quantkit.sweeps.bench import Bench, Setup
from quantkit.sweeps.run import make_row
from quantkit.sweeps.store import Store
from quantkit.system.progress import ignore

_opened: dict[str, Bench] = {}
"""What this worker has open: one bench, by what it was opened for."""


def make_rows(
    setup: Setup,
    todo: Sequence[tuple[int, Entry, Key]],
    statistics: Path,
    options: Mapping[str, Any],
    say: Callable[[int, Entry], None],
) -> None:
    """Make rows on the cluster of this process: the one it is connected to, the one of ``RAY_ADDRESS``, or a new local one.

    Args:
        setup: what all rows share.
        todo: number, row and key of each.
        statistics: where those of the float model are.
        options: of the tasks.
        say: is told of every row that ends.

    Raises:
        QuantkitError: ray is not installed; a row is finished, and its file is not here.
    """
    try:
        import ray
    except ImportError as error:
        raise QuantkitError(f"ray is not installed: pip install 'quantkit[ray]' ({error})") from error
    if not ray.is_initialized():
        ray.init(include_dashboard=False, log_to_driver=False)
    here = setup.directory.resolve()
    sent = ray.put(dataclasses.replace(setup, directory=here, run=dataclasses.replace(setup.run, progress=ignore)))
    task = ray.remote(**{"num_cpus": 1, "max_retries": 0, **options})(_make)
    store = Store(setup.directory)
    waiting = {task.remote(sent, entry, dict(key), statistics.resolve()): (number, entry, key) for number, entry, key in todo}
    while waiting:
        (ended, *_), _ = ray.wait(list(waiting))
        number, entry, key = waiting.pop(ended)
        try:
            ray.get(ended)
        except ray.exceptions.RayError as error:
            lines = str(error).strip().splitlines()  # of an error in a worker, the traceback
            said = lines[-1] if isinstance(error, ray.exceptions.RayTaskError) else f"{type(error).__name__}: {lines[0]}"
            store.write(entry, dataclasses.replace(entry.row, status="failed", reason=said), key)
        if not store.has(entry):
            raise QuantkitError(
                f"row {entry.row.name!r} is finished, and its file is not in {here}: the machines of the cluster must share "
                "this directory under one path"
            )
        say(number, entry)


def _make(setup: Setup, entry: Entry, key: Key, statistics: Path) -> None:
    """Make one row in this worker."""
    known = repr((setup.directory, key["model"], key["evaluation"]))
    if known not in _opened:
        _opened.clear()
        _opened[known] = Bench.open(setup)
    make_row(_opened[known], entry, key, statistics)
