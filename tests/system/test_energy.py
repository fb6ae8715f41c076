"""Counters of energy: joules, a counter that starts again, machines that tell nothing."""

import pytest

from quantkit.system.energy import Meter


def package(folder, name: str, value: int, limit: int = 10_000_000):
    (folder / name).mkdir(exist_ok=True)
    (folder / name / "energy_uj").write_text(f"{value}\n")
    (folder / name / "max_energy_range_uj").write_text(f"{limit}\n")


def test_packages_are_added_and_their_parts_are_not(tmp_path):
    package(tmp_path, "intel-rapl:0", 1_000_000)
    package(tmp_path, "intel-rapl:0:0", 5)  # the cores of package 0
    package(tmp_path, "intel-rapl:1", 9_500_000)
    with Meter(powercap=tmp_path) as meter:
        package(tmp_path, "intel-rapl:0", 3_500_000)
        package(tmp_path, "intel-rapl:0:0", 99)
        package(tmp_path, "intel-rapl:1", 500_000)  # started again at 10 J
    assert meter.energy.joules == pytest.approx(2.5 + 1.0)
    assert "RAPL" in meter.energy.source


def test_a_machine_that_tells_nothing_says_why(tmp_path):
    with Meter(powercap=tmp_path) as meter:
        pass
    assert meter.energy.joules is None
    assert "no RAPL" in meter.energy.source
    (tmp_path / "intel-rapl:0").mkdir()
    with Meter(powercap=tmp_path) as meter:
        pass
    assert meter.energy.joules is None
    assert "may not be read" in meter.energy.source


def test_a_gpu_is_asked_through_nvml():
    with Meter("cuda:7") as meter:
        pass
    assert meter.energy.joules is None or "NVML" in meter.energy.source
    assert "NVML" in meter.energy.source
