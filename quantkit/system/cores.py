"""How many cores this process may use, and how OpenMP's threads wait for each other.

A container's quota (``docker run --cpus 2``) limits processor time, not the cores that a program sees: OpenMP then starts a
thread for every core of the machine, and the system suspends all of them for most of the time.

Threads that finish their part of a loop wait for the others. GNU's OpenMP runtime, which torch brings along, lets them run in
circles for milliseconds before they sleep. This is quick if every thread has a core of its own. If other programs use the
cores too, the waiting threads take the time away from the very thread that they wait for. So they circle only for some
microseconds here, unless the user's environment says otherwise.

Both are settings of the environment that the runtime reads when it is loaded, so :func:`prepare_openmp` is called when quantkit
is imported. If torch was imported before, both are made up for when the kernels are loaded (:mod:`quantkit.kernels.build`).
"""

import os
from collections.abc import Iterator, Mapping, MutableMapping
from pathlib import Path

SPINS = "1000"
"""Default of ``GOMP_SPINCOUNT``: how often a thread looks before it sleeps; ten to forty microseconds, as in our barriers."""


def usable_cores() -> int:
    """Return the number of cores that this process may use at the same time, at least 1: its affinity and its quota."""
    quota = cpu_quota()
    visible = _visible_cores()
    return visible if quota is None else max(min(visible, round(quota)), 1)


def cpu_quota(root: Path = Path("/sys/fs/cgroup"), group: Path = Path("/proc/self/cgroup")) -> float | None:
    """Return the smallest quota of this process's control groups in cores (1.5 is one and a half); None for no quota.

    Args:
        root: where the control groups are mounted.
        group: file that names those of this process.
    """
    found = [quota for folder in _groups(root, group) if (quota := _quota(folder)) is not None]
    return min(found, default=None)


def waits_are_chosen(environment: Mapping[str, str]) -> bool:
    """Return whether the environment says how long OpenMP's threads look before they sleep."""
    return bool({"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & environment.keys())


def prepare_openmp(environment: MutableMapping[str, str]) -> None:
    """Complete the environment of an OpenMP runtime that is not loaded yet; what the user has set stays.

    Args:
        environment: ``os.environ``.
    """
    if not waits_are_chosen(environment):
        environment["GOMP_SPINCOUNT"] = SPINS
    if (cores := fewer_threads(environment, _visible_cores())) is not None:
        environment["OMP_NUM_THREADS"] = str(cores)


def fewer_threads(environment: Mapping[str, str], threads: int) -> int | None:
    """Return how many threads a quota leaves if ``threads`` are too many; None if they are not, or the user chose.

    Args:
        environment: of the process.
        threads: how many there are, or would be.
    """
    cores = usable_cores()
    return cores if "OMP_NUM_THREADS" not in environment and cores < min(threads, _visible_cores()) else None


def _visible_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _groups(root: Path, group: Path) -> Iterator[Path]:
    """Yield the directories that may hold a quota: the process's own control groups, version 2 or 1, and those above them."""
    try:
        lines = group.read_text().splitlines()
    except OSError:
        return  # not on Linux
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        top = root / controllers if controllers else root
        parts = Path(path.lstrip("/")).parts
        yield from (top.joinpath(*parts[:count]) for count in range(len(parts), -1, -1))


def _quota(folder: Path) -> float | None:
    """Return the quota in a directory, in cores."""
    try:
        if (folder / "cpu.max").exists():
            quota, period = (folder / "cpu.max").read_text().split()
        else:
            quota = (folder / "cpu.cfs_quota_us").read_text()
            period = (folder / "cpu.cfs_period_us").read_text()
        return int(quota) / int(period) if quota.strip() not in ("max", "-1") else None
    except (OSError, ValueError, ZeroDivisionError):
        return None  # not there, or not readable: no quota that could be respected
