"""What :func:`quantkit.quantize` returns, and how it shows itself."""

import dataclasses
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from quantkit.checkpoint.activations import choose
from quantkit.errors import QuantkitError
from quantkit.evaluation.coverage import Coverage, CoverageRow, shortfall
from quantkit.spec import Scheme
from quantkit.system.tables import facts_html, frame


@dataclass(frozen=True, repr=False)
class QuantizeResult:
    """What :func:`quantkit.quantize` returns.

    Attributes:
        model: the quantized model, ready to run.
        tokenizer: its tokenizer, if one is known.
        plan: layer name to scheme, as carried out.
        coverage: one row per weight of the model: quantized, skipped or fell back, and why; notebooks show the summary.
        losses: layer name to relative squared output error over the calibration inputs.
        path: the checkpoint directory, or None if none was asked for.
        metadata: what was recorded in the checkpoint: scheme, quantizer, calibration, versions, measured quality.
        already_done: the checkpoint was there already, written by the same run earlier, and was read back; all of them, where
            there are several outputs.
        outputs: the further checkpoints of the same codes: path, format, whether it was there already, and ``reload_kl``.
    """

    model: nn.Module
    tokenizer: Any
    plan: dict[str, Scheme]
    coverage: list[CoverageRow]
    losses: dict[str, float]
    path: Path | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    already_done: bool = False
    outputs: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        object.__setattr__(self, "coverage", Coverage(self.coverage))

    def facts(self) -> dict[str, str]:
        """Return what a reader wants to know first, label to value."""
        kinds = Counter(row.kind for row in self.coverage)
        before, after = (sum(getattr(row, name) for row in self.coverage) for name in ("bytes_before", "bytes_after"))
        quality = self.metadata.get("quality", {})
        warning = shortfall(self.coverage)
        found = {"WARNING": warning} if warning else {}
        found |= {
            "model": type(self.model).__name__,
            "layers": ", ".join(f"{count} {kind}" for kind, count in kinds.items()),
            "schemes": ", ".join(f"{count} x {name}" for name, count in self.metadata.get("schemes", {}).items()),
            "bits per weight": f"{self.metadata.get('bits_per_weight', 0):.3f} in quantized layers",
            "weights": f"{after / 1e6:.1f} MB, {before / 1e6:.1f} MB before",
        }
        if "kl_mean" in quality:
            found["KL to the float model"] = f"{quality['kl_mean']:.4f} nats on {quality['tokens']} tokens ({quality['text']})"
            found["perplexity"] = f"{quality['perplexity']:.2f}, {quality['base_perplexity']:.2f} before"
            found["same top-1 token"] = f"{quality['same_top1']:.1%}"
        if "int8_activations" in quality:
            found["loaded on a CPU"] = str(choose(self.metadata))
        found["checkpoint"] = str(self.path) if self.path else "not written"
        return found | {f"the same as {one['format']}": one["path"] for one in self.outputs}

    def plot_training(self) -> Any:
        """Return a figure of what :func:`quantkit.train` has seen: the loss of every update, and of the held-out windows.

        Raises:
            QuantkitError: nothing was trained, or matplotlib is missing.
        """
        from quantkit.pipeline.training.picture import draw

        if "training" not in self.metadata:
            raise QuantkitError("this model was quantized, not trained; quantkit.train trains one")
        return draw(self.metadata["training"])

    def __repr__(self) -> str:
        facts = self.facts()
        width = max(map(len, facts))
        return "QuantizeResult\n" + "\n".join(f"  {name:{width}}  {value}" for name, value in facts.items())

    def _repr_html_(self) -> str:
        return facts_html(self.facts())

    def layers(self) -> Any:
        """Return one row per weight of the model: a pandas data frame where pandas is installed, else a list of mappings.

        The columns: ``layer``, ``kind``, ``module``, ``scheme``, ``weights``, ``bits`` (stored per weight), ``bytes_before``,
        ``bytes_after``, ``loss`` (relative squared output error), ``tokens`` (the fewest that any expert saw), ``reason``.
        """
        return frame(
            [
                {
                    "layer": row.name,
                    "kind": row.kind,
                    "module": row.module_type,
                    "scheme": row.scheme,
                    "weights": row.parameters,
                    "bits": row.bytes_after * 8 / row.parameters if row.parameters else None,
                    "bytes_before": row.bytes_before,
                    "bytes_after": row.bytes_after,
                    "loss": self.losses.get(row.name),
                    "tokens": min(row.tokens, default=None),
                    "reason": row.reason,
                }
                for row in self.coverage
            ]
        )

    def to_dict(self) -> dict[str, Any]:
        """Return a mapping for JSON: path, what was recorded in the checkpoint, and the coverage of every weight."""
        rows = [dataclasses.asdict(row) | {"loss": self.losses.get(row.name)} for row in self.coverage]
        path = None if self.path is None else str(self.path)
        also = {"outputs": self.outputs} if self.outputs else {}
        return {"path": path, "already_done": self.already_done, **also, **self.metadata, "coverage": rows}
