"""Energy of the processor or the GPU, where the machine tells: counters are read before and after.

Linux tells the energy of a processor's packages since some time (RAPL, Documentation/power/powercap), in microjoules that start
again at a limit; since 2020 only root may read it on most systems, and virtual machines rarely have it. NVIDIA's driver tells a
GPU's in millijoules (NVML, nvmlDeviceGetTotalEnergyConsumption; Volta and later). Both are of everything that runs there.
"""

import importlib
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

POWERCAP = Path("/sys/class/powercap")


@dataclass(frozen=True, slots=True)
class Energy:
    """What a machine told.

    Attributes:
        joules: energy; None if it was not told.
        source: who told it, or why nobody did.
    """

    joules: float | None
    source: str


class Meter:
    """Measures the energy of a with block; :attr:`energy` has it afterwards.

    Args:
        device: ``"cpu"``, ``"cuda"`` or ``"cuda:1"``.
        powercap: where Linux shows the counters of processors.
    """

    def __init__(self, device: str = "cpu", powercap: Path = POWERCAP) -> None:
        self.energy = Energy(None, "nothing was measured")
        self._device, self._powercap = device, powercap
        self._before: dict[str, float] = {}
        self._source = ""

    def __enter__(self) -> "Meter":
        self.start()
        return self

    def start(self) -> None:
        """Read the counters for the first time."""
        self._before, self._source = self._read()

    def stop(self) -> None:
        """Read the counters again, and know the energy between."""
        after, _ = self._read()
        used = [self._used(name, after[name] - before) for name, before in self._before.items() if name in after]
        self.energy = Energy(sum(used) if used else None, self._source)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.stop()

    def _used(self, name: str, difference: float) -> float:
        """Return the difference of a counter in joules; one that went down has started again at its limit."""
        if difference >= 0:
            return difference
        return difference + _number(self._powercap / name / "max_energy_range_uj") / 1e6

    def _read(self) -> tuple[dict[str, float], str]:
        """Return every counter in joules, and who tells them, or why nobody does."""
        if self._device.startswith("cuda"):
            return _read_gpu(int(self._device.partition(":")[2] or 0))
        packages = [one for one in sorted(self._powercap.glob("intel-rapl:*")) if one.name.count(":") == 1]
        if not packages:
            return {}, "this machine does not tell the energy of its processor (no RAPL)"
        try:
            return {one.name: _number(one / "energy_uj") / 1e6 for one in packages}, "RAPL, whole processor packages"
        except OSError as error:
            return {}, f"the energy of the processor may not be read (RAPL): {error.strerror}"


def _number(path: Path) -> float:
    return float(path.read_text(encoding="ascii"))


def _read_gpu(index: int) -> tuple[dict[str, float], str]:
    try:
        nvml = importlib.import_module("pynvml")
    except ImportError:
        return {}, "the energy of a GPU needs NVML: pip install nvidia-ml-py"
    try:
        nvml.nvmlInit()
        handle = nvml.nvmlDeviceGetHandleByIndex(index)
        return {str(index): nvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3}, "NVML, the whole GPU"
    except nvml.NVMLError as error:
        return {}, f"the driver does not tell the GPU's energy (NVML): {error}"
