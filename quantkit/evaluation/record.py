"""The evaluation of one model as a value: everything measured, how it was measured, and where. JSON on the disk."""

import dataclasses
import functools
import importlib.metadata
import json
import platform
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from quantkit.errors import FormatError
from quantkit.evaluation.footprint import Footprint
from quantkit.evaluation.latency import Latency
from quantkit.evaluation.quality import Quality
from quantkit.system.files import write_json
from quantkit.version import __version__

SCHEMA = "quantkit.eval-report/1"
"""Name and version of the JSON layout; a reader refuses others."""


@dataclass(frozen=True, slots=True)
class Protocol:
    """How the text was scored; two perplexities are comparable only if all of this is equal.

    Attributes:
        source: where the text came from, in words.
        fingerprint: SHA-256 over token ids and scored positions.
        length: tokens of a window, the longest context plus one.
        stride: tokens between windows; 0 for ready-made windows.
        bos: every window starts with the BOS token.
        windows, available_windows: scored, and in the text; spread evenly.
        tokens: scored tokens.
        kl_windows, kl_tokens: compared with the base; 0 without one.
    """

    source: str
    fingerprint: str
    length: int
    stride: int
    bos: bool
    windows: int
    available_windows: int
    tokens: int
    kl_windows: int
    kl_tokens: int


@dataclass(frozen=True, slots=True)
class Environment:
    """Where it ran: versions, processor, torch's threads, dtype of the unquantized weights, device."""

    quantkit: str
    torch: str
    transformers: str
    python: str
    system: str
    cpu: str
    gpu: str | None
    threads: int
    dtype: str
    device: str


def describe_environment(dtype: torch.dtype, device: torch.device) -> Environment:
    """Describe this process, for a model of ``dtype`` on ``device``."""
    return Environment(
        quantkit=__version__,
        torch=torch.__version__,
        transformers=importlib.metadata.version("transformers"),
        python=platform.python_version(),
        system=f"{platform.system()} {platform.machine()}",
        cpu=cpu_name(),
        gpu=torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        threads=torch.get_num_threads(),
        dtype=str(dtype).removeprefix("torch."),
        device=str(device),
    )


@dataclass(frozen=True, slots=True)
class EvalReport:
    """All that was measured about one model.

    Attributes:
        label: the model's name in tables, e.g. ``"W4 GPTQ g64"``.
        quality: perplexity and divergence from the base.
        protocol: how the text was scored.
        footprint: sizes.
        environment: where it ran.
        latency: timings, if they were taken.
        base: label of the model it was compared with, if any.
    """

    label: str
    quality: Quality
    protocol: Protocol
    footprint: Footprint
    environment: Environment
    latency: Latency | None = None
    base: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready mapping; :meth:`from_dict` reverses it exactly."""
        return {"schema": SCHEMA, **dataclasses.asdict(self)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "EvalReport":
        """Build a report from :meth:`to_dict` output.

        Raises:
            FormatError: for another schema, or keys or types that do not belong.
        """
        if not isinstance(data, Mapping) or data.get("schema") != SCHEMA:
            found = data.get("schema") if isinstance(data, Mapping) else type(data).__name__
            raise FormatError(f"evaluation report: schema is {found!r}, this version reads {SCHEMA!r}")
        report: EvalReport = _read(cls, {key: value for key, value in data.items() if key != "schema"}, "report")
        return report

    def save(self, path: str | Path) -> None:
        """Write the report as JSON, atomically."""
        write_json(path, self.to_dict())

    @classmethod
    def load(cls, path: str | Path) -> "EvalReport":
        """Read a report that :meth:`save` wrote.

        Raises:
            FormatError: if the file is not one.
        """
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise FormatError(f"{path}: not an evaluation report: {error}") from error
        return cls.from_dict(data)


def _read(kind: Any, value: Any, where: str) -> Any:
    """Turn parsed JSON into ``kind``: a dataclass, a tuple, an optional or a plain type, checking every type on the way."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        return None if value is None else _read(next(a for a in arguments if a is not types.NoneType), value, where)
    if origin is tuple and isinstance(value, list | tuple):
        inner = arguments[:1] * len(value) if arguments[-1] is Ellipsis else arguments
        if len(inner) != len(value):
            raise FormatError(f"{where}: {len(value)} values, want {len(inner)}")
        return tuple(_read(one, item, f"{where}[{i}]") for i, (one, item) in enumerate(zip(inner, value, strict=True)))
    if dataclasses.is_dataclass(kind) and isinstance(value, Mapping):
        hints = typing.get_type_hints(kind)
        missing = [f.name for f in dataclasses.fields(kind) if f.name not in value and f.default is dataclasses.MISSING]
        if missing or set(value) - set(hints):
            raise FormatError(f"{where}: missing {missing}, unknown {sorted(set(value) - set(hints))}")
        return kind(**{name: _read(hints[name], item, f"{where}.{name}") for name, item in value.items()})  # type: ignore[operator]
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if origin is None and isinstance(kind, type) and type(value) is kind:
        return value
    raise FormatError(f"{where}: {value!r} is a {type(value).__name__}, want {getattr(kind, '__name__', kind)}")


@functools.cache
def cpu_name() -> str:
    """Return the processor's name as its maker gives it, or the machine type where the system does not say."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8", errors="replace").splitlines() if info.exists() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()
