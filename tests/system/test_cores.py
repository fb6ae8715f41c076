"""How many cores a process may use, in containers too, and what is said to OpenMP before it starts."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from quantkit.system import cores

ROOT = Path(__file__).parent.parent.parent


def control_groups(tmp_path: Path, groups: str, files: dict[str, str]) -> tuple[Path, Path]:
    listed = tmp_path / "cgroup"
    listed.write_text(groups)
    for name, text in files.items():
        file = tmp_path / "fs" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return tmp_path / "fs", listed


@pytest.mark.parametrize(
    ("groups", "files", "quota"),
    [
        ("0::/\n", {"cpu.max": "200000 100000\n"}, 2.0),
        ("0::/\n", {"cpu.max": "max 100000\n"}, None),
        ("0::/\n", {}, None),
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000", "a/cpu.max": "150000 100000"}, 1.5),
        ("0::/a/b\n", {"a/b/cpu.max": "50000 100000", "a/cpu.max": "150000 100000"}, 0.5),
        ("4:cpu:/docker/x\n3:memory:/\n", {"cpu/cpu.cfs_quota_us": "300000", "cpu/cpu.cfs_period_us": "100000"}, 3.0),
        ("4:cpu,cpuacct:/\n", {"cpu,cpuacct/cpu.cfs_quota_us": "-1\n", "cpu,cpuacct/cpu.cfs_period_us": "100000"}, None),
        ("0::/\n", {"cpu.max": "nonsense\n"}, None),
    ],
)  # fmt: skip
def test_the_smallest_quota_counts(tmp_path, groups, files, quota):
    assert cores.cpu_quota(*control_groups(tmp_path, groups, files)) == quota


def test_without_control_groups_there_is_no_quota(tmp_path):
    assert cores.cpu_quota(tmp_path, tmp_path / "missing") is None


@pytest.mark.parametrize(("quota", "want"), [(None, 8), (3.6, 4), (0.2, 1), (64.0, 8)])
def test_cores_are_those_of_affinity_and_quota(monkeypatch, quota, want):
    monkeypatch.setattr(cores, "cpu_quota", lambda: quota)
    monkeypatch.setattr(cores, "_visible_cores", lambda: 8)
    assert cores.usable_cores() == want


@pytest.mark.parametrize(
    ("given", "quota", "want"),
    [
        ({}, None, {"GOMP_SPINCOUNT": cores.SPINS}),
        ({}, 2.0, {"GOMP_SPINCOUNT": cores.SPINS, "OMP_NUM_THREADS": "2"}),
        ({"OMP_WAIT_POLICY": "active"}, None, {"OMP_WAIT_POLICY": "active"}),
        ({"GOMP_SPINCOUNT": "7", "OMP_NUM_THREADS": "5"}, 2.0, {"GOMP_SPINCOUNT": "7", "OMP_NUM_THREADS": "5"}),
    ],
)
def test_the_environment_is_completed_and_never_changed(monkeypatch, given, quota, want):
    monkeypatch.setattr(cores, "cpu_quota", lambda: quota)
    monkeypatch.setattr(cores, "_visible_cores", lambda: 8)
    cores.prepare_openmp(given)
    assert given == want


@pytest.mark.parametrize(
    ("environment", "threads", "want"),
    [({}, 8, 2), ({}, 4, 2), ({}, 2, None), ({}, 1, None), ({"OMP_NUM_THREADS": "8"}, 8, None)],
)
def test_a_quota_leaves_fewer_threads_than_torch_started(monkeypatch, environment, threads, want):
    monkeypatch.setattr(cores, "_visible_cores", lambda: 8)
    monkeypatch.setattr(cores, "cpu_quota", lambda: 2.0)
    assert cores.fewer_threads(environment, threads) == want
    monkeypatch.setattr(cores, "cpu_quota", lambda: None)
    assert cores.fewer_threads(environment, threads) is None


def test_importing_quantkit_is_enough():
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    code = "import os, quantkit; print(os.environ.get('GOMP_SPINCOUNT'))"
    environment["PYTHONPATH"] = str(ROOT)
    assert subprocess.check_output([sys.executable, "-c", code], env=environment, text=True).strip() == cores.SPINS
