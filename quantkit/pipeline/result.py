"""What :func:`quantkit.quantize` returns, and how it shows itself."""

import html
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from quantkit.errors import QuantkitError
from quantkit.evaluation.coverage import CoverageRow, shortfall
from quantkit.spec import Scheme


@dataclass(frozen=True, repr=False)
class QuantizeResult:
    """What :func:`quantkit.quantize` returns.

    Attributes:
        model: the quantized model, ready to run.
        tokenizer: its tokenizer, if one is known.
        plan: layer name to scheme, as carried out.
        coverage: one row per weight of the model: quantized, skipped or fell back, and why.
        losses: layer name to relative squared output error over the calibration inputs.
        path: the checkpoint directory, or None if none was asked for.
        metadata: what was recorded in the checkpoint: scheme, quantizer, calibration, versions, measured quality.
        already_done: the checkpoint was there already, written by the same run earlier, and was read back.
    """

    model: nn.Module
    tokenizer: Any
    plan: dict[str, Scheme]
    coverage: list[CoverageRow]
    losses: dict[str, float]
    path: Path | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    already_done: bool = False

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
            "weights": f"{after / 2**20:.1f} MiB, {before / 2**20:.1f} MiB before",
        }
        if "kl_mean" in quality:
            found["KL to the float model"] = f"{quality['kl_mean']:.4f} nats on {quality['tokens']} tokens ({quality['text']})"
            found["perplexity"] = f"{quality['perplexity']:.2f}, {quality['base_perplexity']:.2f} before"
            found["same top-1 token"] = f"{quality['same_top1']:.1%}"
        return found | {"checkpoint": str(self.path) if self.path else "not written"}

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
        rows = "".join(f"<tr><th>{html.escape(k)}</th><td>{html.escape(v)}</td></tr>" for k, v in self.facts().items())
        return f"<table>{rows}</table>"
