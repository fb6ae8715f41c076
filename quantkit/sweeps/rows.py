"""One row of a sweep: what was made, what it cost and how good it is; and the table's columns."""

from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from quantkit.errors import FormatError
from quantkit.evaluation.record import EvalReport

Status = Literal["done", "failed", "skipped", "pending"]

FLOAT = "float"
"""Name of the row of the model as it is."""


@dataclass(frozen=True)
class SweepRow:
    """One row of a sweep.

    Attributes:
        name: what distinguishes it, for instance ``"w4a16-asym-g64 gptq"``.
        scheme, quantizer, steps: what it was made with; empty for the float model.
        budget: what its plan was searched for, or empty.
        status: ``"done"``; ``"failed"``: the next run tries it again; ``"skipped"``: it cannot be; ``"pending"``: a run was
            interrupted before it.
        reason: why it failed or was skipped.
        statistics: what its layers were calibrated on: ``"float inputs"`` (once for the sweep), ``"walk"`` (inputs behind the
            quantized layers before, run for this row), ``"text"`` (only its steps read text), or ``"none"``.
        bytes: of all tensors of its checkpoint.
        seconds, peak_bytes: time and peak memory of the process while it was quantized, without scoring.
        report: every measurement.
        checkpoint: where its model is, if it was kept.
    """

    name: str
    scheme: str = ""
    quantizer: str = ""
    steps: str = ""
    budget: str = ""
    status: Status = "pending"
    reason: str = ""
    statistics: str = "none"
    bytes: int | None = None
    seconds: float | None = None
    peak_bytes: int | None = None
    report: EvalReport | None = field(default=None, repr=False)
    checkpoint: Path | None = None

    @property
    def is_float(self) -> bool:
        """Whether it is the model as it is."""
        return self.name == FLOAT

    @property
    def kl(self) -> float | None:
        """Mean KL divergence from the float model, nats per token."""
        found = self.report and self.report.quality.divergence
        return found.mean if found else None

    @property
    def kl_se(self) -> float | None:
        """Standard error of :attr:`kl` over windows."""
        found = self.report and self.report.quality.divergence
        return found.mean_se if found else None

    @property
    def top1(self) -> float | None:
        """Share of tokens whose most likely prediction is the float model's."""
        found = self.report and self.report.quality.divergence
        return found.same_top1 if found else None

    @property
    def perplexity(self) -> float | None:
        """Perplexity."""
        return self.report.quality.perplexity if self.report else None

    @property
    def perplexity_se(self) -> float | None:
        """Standard error of :attr:`perplexity` over windows."""
        return self.report.quality.perplexity_se if self.report else None

    @property
    def bits(self) -> float | None:
        """Stored bits per quantized weight: codes, scales, zero points, padding; of the float model, per parameter."""
        return self.report.footprint.bits_per_weight if self.report else None

    @property
    def ms(self) -> float | None:
        """Milliseconds per generated token, median, if it was timed."""
        return self.report.latency.decode_ms.median if self.report and self.report.latency else None

    def to_dict(self) -> dict[str, Any]:
        """Return a mapping for JSON; :meth:`from_dict` reverses it."""
        plain = {one.name: getattr(self, one.name) for one in fields(self) if one.name not in ("report", "checkpoint")}
        return {**plain, "report": self.report.to_dict() if self.report else None}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "SweepRow":
        """Return the row that :meth:`to_dict` was called on.

        Raises:
            FormatError: wrong keys or types.
        """
        report = data.get("report")
        plain = {key: value for key, value in data.items() if key != "report"}
        try:
            row = _ROWS.validate_python({**plain, "report": None})
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            raise FormatError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None
        return SweepRow(**{**asdict(row), "report": EvalReport.from_dict(report) if report else None})


_ROWS = TypeAdapter(SweepRow)

COLUMNS = (
    "name", "scheme", "quantizer", "steps", "budget", "status", "bits", "bytes", "kl", "kl_se", "perplexity", "perplexity_se",
    "top1", "ms", "seconds", "peak_bytes", "statistics", "reason", "checkpoint",
)  # fmt: skip
"""The columns of the table: attributes of a row."""
