"""What every quantized model goes through last: coverage, the sanity check, the files, and these compared once read back."""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantkit import checkpoint
from quantkit.calibrate.data import Batch
from quantkit.calibrate.data import fingerprint as data_fingerprint
from quantkit.evaluation.coverage import CoverageRow, coverage_after, remark, shortfall
from quantkit.evaluation.sanity import SanityCheck
from quantkit.hf.load import PreTrainedModel
from quantkit.nn.quantized import Quantized
from quantkit.nn.sites import Structure
from quantkit.pipeline.again import record_of
from quantkit.pipeline.checks import report_fallen, report_lossy
from quantkit.pipeline.plan import Resolution
from quantkit.pipeline.result import QuantizeResult
from quantkit.pipeline.resume import versions
from quantkit.pipeline.settings import Output, Run
from quantkit.spec import Plan

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Unfinished:
    """A model whose layers are quantized, and what is known of the float model that it was.

    Attributes:
        model: quantized by now.
        tokenizer: written along.
        structure: its blocks and layers.
        resolution: what was to happen to every layer.
        rows: coverage of the float model.
        sanity: predictions of the float model.
        writer: of the checkpoint, every block written; None writes nothing.
    """

    model: PreTrainedModel
    tokenizer: Any
    structure: Structure
    resolution: Resolution
    rows: Sequence[CoverageRow]
    sanity: SanityCheck
    writer: checkpoint.CheckpointWriter | None

    def finish(self, results: Mapping[str, Quantized], metadata: Mapping[str, Any]) -> QuantizeResult:
        """Measure, publish the checkpoint once it has been read back and compared, and return the result.

        Args:
            results: layer name to what became of it.
            metadata: JSON-able facts for the checkpoint.
        """
        model, writer = self.model, self.writer
        coverage = remark(coverage_after(self.rows, results, writer.stored_bytes if writer else None), self.resolution.remarks)
        report_lossy(results)
        report_fallen([row.name for row in coverage if row.kind == "fell back"])
        if warning := shortfall(coverage):
            log.warning("%s", warning)
        quantized = self.sanity.recorded_of(model)
        facts = {**metadata, "quality": self.sanity.measure(quantized)}
        reread: dict[str, Any] = {}

        def check(stage: Path) -> dict[str, Any]:
            checkpoint.verify(stage, model)
            large = bool(self.sanity.blocks)
            reloaded = checkpoint.load_on_disk(stage) if large else checkpoint.load(stage, compute="exact", cache=False)
            reread["reload_kl"] = quantized.check_reloaded(model, reloaded)
            reread["int8_activations"] = quantized.cost_of_int8(self.sanity, reloaded)
            return reread

        path, losses = None, {name: one.loss for name, one in results.items()}
        if writer is not None:
            outside = {site.name: results[site.name].qtensor for site in self.structure.after if site.name in results}
            record = record_of(coverage, losses)
            path = writer.finish(facts, outside=outside, tokenizer=self.tokenizer, run=record, check=check)
            facts["quality"] = {**facts["quality"], **reread}
        return QuantizeResult(model, self.tokenizer, self.resolution.plan, coverage, losses, path, facts)


def open_writer(
    output: Output, run: Run, model: PreTrainedModel, plan: Plan, key: checkpoint.Key | None
) -> checkpoint.CheckpointWriter | None:
    """Open the checkpoint that the blocks of a run go to; None if nothing is to be written."""
    if output.path is None:
        return None
    return checkpoint.CheckpointWriter(
        output.path, model, plan=plan, format=output.format, overwrite=output.overwrite, key=key, resume=run.resume
    )


def metadata_of(
    resolution: Resolution, method: str, batches: Sequence[Batch], read: Mapping[str, Any], results: Mapping[str, Quantized]
) -> dict[str, Any]:
    """Return what every checkpoint records of the run that made it; ``read`` is what was read as calibration text."""
    losses = [one.loss for one in results.values()]
    return {
        "schemes": dict(Counter(scheme.weight.describe() for scheme in resolution.plan.values())),
        "quantizer": method,
        "calibration": {
            "fingerprint": data_fingerprint(batches) if batches else "none",
            "tokens": sum(batch.tokens for batch in batches),
            **read,
        },
        "bits_per_weight": bits_per_weight(results),
        "output_error": {"mean": sum(losses) / len(losses), "max": max(losses)},
        "fell_back": [name for name, one in results.items() if one.fell_back],
        "versions": versions(),
    } | ({"search": resolution.origin} if resolution.origin else {})


def bits_per_weight(results: Mapping[str, Quantized]) -> float:
    """Return stored bits per quantized weight: codes, scales, zero points and padding."""
    return sum(r.qtensor.nbytes for r in results.values()) * 8 / sum(r.qtensor.numel for r in results.values())
