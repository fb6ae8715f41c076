"""The evaluation of one model as a value: all measurements, how they were made, and on which machine. Stored as JSON."""

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
from quantkit.evaluation.continuations import Continuation
from quantkit.evaluation.footprint import Footprint
from quantkit.evaluation.instructions import Followed, summary
from quantkit.evaluation.latency import Latency
from quantkit.evaluation.long_context import Stretch
from quantkit.evaluation.quality import Quality
from quantkit.system.files import write_json
from quantkit.system.tables import facts_html
from quantkit.version import __version__

SCHEMA = "quantkit.eval-report/1"
"""Name and version of the JSON layout; other layouts are refused."""


@dataclass(frozen=True, slots=True)
class Protocol:
    """How the text was scored. Two perplexities are comparable only if all of this is equal.

    Attributes:
        source: description of the text.
        fingerprint: SHA-256 of token ids and scored positions.
        length: tokens per window.
        stride: tokens between the starts of windows; 0 if the windows were given.
        bos: whether every window starts with the BOS token.
        windows, available_windows: number of windows that were scored, and of windows in the text.
        tokens: number of scored tokens.
        kl_windows, kl_tokens: number of windows and tokens that were compared with the base; 0 without one.
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
    """The machine and the software: versions, processor, torch's threads, dtype of the unquantized weights, device."""

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
    """Return a description of this process, for a model with ``dtype`` on ``device``."""
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


@dataclass(frozen=True, slots=True, repr=False)
class EvalReport:
    """All measurements of one model.

    Its ``repr`` is one line, and notebooks show it as a table.

    Attributes:
        label: name of the model in tables, for instance ``"W4 GPTQ g64"``.
        quality: perplexity and divergence from the base.
        protocol: how the text was scored.
        footprint: sizes.
        environment: machine and software.
        latency: timings, or None.
        base: label of the base model, or None.
        continuations: what the model writes, beside what its base writes, if that was asked for.
        instructions: how often the model does what it is told, beside its base, if that was asked for.
        long_context: perplexity and divergence in parts of one long window, if that was asked for.
        compute: how quantized layers multiplied while the quality was measured: ``"exact"``, or with int8 activations; empty
            for a float model, and where an older report does not say.
    """

    label: str
    quality: Quality
    protocol: Protocol
    footprint: Footprint
    environment: Environment
    latency: Latency | None = None
    base: str | None = None
    compute: str = ""
    continuations: tuple[Continuation, ...] = ()
    instructions: tuple[Followed, ...] = ()
    long_context: tuple[Stretch, ...] = ()

    def summary(self) -> dict[str, str]:
        """Return the most important measurements as name and text, with units and one standard error."""
        found = {"perplexity": _with_error(self.quality.perplexity, self.quality.perplexity_se)}
        if (interval := self.quality.perplexity_interval) is not None:
            found["perplexity"] += f" (95 %: {interval[0]:.4g} to {interval[1]:.4g})"
        if (divergence := self.quality.divergence) is not None:
            found["KL"] = f"{_with_error(divergence.mean, divergence.mean_se)} nats from {self.base or 'the base'}"
            found["same top-1"] = f"{100 * divergence.same_top1:.1f} %"
        if self.instructions:
            found["instructions followed"] = summary(self.instructions)
        if self.compute:
            found["measured with"] = f"{self.compute} products" if self.compute == "exact" else self.compute
        found["bits per weight"] = f"{self.footprint.bits_per_weight:.2f}"
        if self.latency is not None:
            found["decode"] = f"{self.latency.decode_ms.median:.2f} ms per token"
            found["prefill"] = f"{self.latency.prefill_tokens_per_s.median:,.0f} tokens/s"
        return found

    def __repr__(self) -> str:
        return f"EvalReport({self.label}: {', '.join(f'{name} {value}' for name, value in self.summary().items())})"

    def _repr_html_(self) -> str:
        """Return the summary as an HTML table, for notebooks."""
        return facts_html(self.summary(), self.label)

    def to_dict(self) -> dict[str, Any]:
        """Return a mapping for JSON; :meth:`from_dict` reverses it exactly."""
        return {"schema": SCHEMA, **dataclasses.asdict(self)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "EvalReport":
        """Return the report that :meth:`to_dict` was called on.

        Raises:
            FormatError: another schema, or wrong keys or types.
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
        """Return the report in a file that :meth:`save` has written.

        Raises:
            FormatError: the file cannot be read or is not a report.
        """
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise FormatError(f"{path}: not an evaluation report: {error}") from error
        return cls.from_dict(data)


def _with_error(value: float, error: float | None) -> str:
    """Format ``value ± error`` with four significant digits of the value."""
    return f"{value:.4g}" if error is None else f"{value:.4g} ± {error:.1g}"


def _read(kind: Any, value: Any, where: str) -> Any:
    """Convert parsed JSON to ``kind`` (a dataclass, tuple, optional or plain type), checking all types.

    Raises:
        FormatError: the value does not have this type; the message has its place ``where``.
    """
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
    """Return the vendor's name of the processor, or the machine type if the system does not know it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8", errors="replace").splitlines() if info.exists() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()
