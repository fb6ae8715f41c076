"""What the rows of a sweep share: the float model and its predictions, the tokens, the statistics; and how one row is made.

The float model is loaded once and never changed: a row quantizes a copy that shares its memory. Its predictions are computed
once (:class:`quantkit.evaluation.BaseLogits`), text is read and tokenized once.

**Statistics** of the float model's inputs are collected once, for all quantizers that can work with them, and kept on the disk,
a file per block, from which they are read page by page: neither collecting nor using them holds more than a block's in memory.
What they cost is accuracy: a layer is then calibrated on inputs that the layers before it have not been rounded for. Rows whose
quantizer compares with the float model or learns blocks, or whose steps change the model first, run the text for themselves.
"""

import dataclasses
import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn

from quantkit.calibrate.chain import visit_statistics
from quantkit.calibrate.data import Batch, Calibration, check_fit, unpadded, unpadded_counts
from quantkit.calibrate.data import fingerprint as data_fingerprint
from quantkit.calibrate.statistics import load_statistics, save_statistics
from quantkit.checkpoint import Key
from quantkit.checkpoint.check import config_of, layout_bytes, total_bytes
from quantkit.checkpoint.contents import carried_layout, contents_of
from quantkit.dtypes import float_dtype
from quantkit.errors import FormatError
from quantkit.evaluation import BaseLogits, EvalReport, Windows, choose_windows, evaluate
from quantkit.evaluation.footprint import peak_memory_bytes, reset_peak_memory
from quantkit.hf.ledger import ledger_of
from quantkit.hf.load import load_float
from quantkit.hf.source import locate
from quantkit.hf.structure import describe
from quantkit.nn.embedding import max_positions
from quantkit.nn.probes import all_experts_shown
from quantkit.nn.sites import Site, SiteStatistics, Structure, sharing_copy
from quantkit.pipeline.checks import check_model, prepare_blocks
from quantkit.pipeline.quantize import open_float, quantize
from quantkit.pipeline.resume import settings_key, weights_key
from quantkit.pipeline.settings import Output, Run
from quantkit.sweeps.axes import Entry
from quantkit.sweeps.rows import SweepRow
from quantkit.sweeps.schema import Keep, Scoring
from quantkit.sweeps.store import STATISTICS, Store
from quantkit.system.compute import Compute
from quantkit.system.files import write_json
from quantkit.system.memory import return_freed_memory
from quantkit.system.progress import ProgressCallback


@dataclass(frozen=True)
class Setup:
    """What all rows of a sweep are told. Without a loaded model it can be sent to another machine.

    Attributes:
        model: a float model, or where to load it from.
        dtype: in which it is loaded.
        tokenizer: of a model that is given as such.
        calibration, scoring, output, run, keep: as for :func:`quantkit.sweep`.
        directory: of the sweep.
    """

    model: nn.Module | str | Path
    dtype: str
    tokenizer: Any
    calibration: Calibration
    scoring: Scoring
    output: Output
    run: Run
    keep: Keep
    directory: Path


@dataclass(frozen=True)
class Bench:
    """Where the rows of one sweep are made. Open it with :meth:`open`."""

    setup: Setup
    model: Any
    tokenizer: Any
    structure: Structure
    windows: Windows
    source: str

    @classmethod
    def open(cls, setup: Setup) -> "Bench":
        """Load the model and cut the windows that it is scored on."""
        if isinstance(setup.model, nn.Module):
            model, tokenizer = open_float(setup.model, setup.tokenizer)
        else:
            dtype = None if setup.dtype == "auto" else float_dtype(setup.dtype)
            model, tokenizer = load_float(locate(setup.model), dtype, tokenizer=setup.tokenizer)
        asked: dict[str, Any] = setup.scoring.model_dump(include={"data", "column", "template", "windows", "length"})
        windows, text = choose_windows(asked.pop("data"), tokenizer, max_positions(model), **asked)
        return cls(setup, model, tokenizer, describe(model), windows, text)

    @cached_property
    def base(self) -> BaseLogits:
        """The float model's predictions."""
        return BaseLogits(self.model)

    @cached_property
    def batches(self) -> list[Batch]:
        """The calibration text."""
        found = self.setup.calibration.batches(self.tokenizer)
        check_fit(found, self.model)
        return found

    @cached_property
    def compute(self) -> Compute:
        """Where blocks run."""
        return self.setup.run.compute or Compute.default(self.model, self.setup.run.device)

    @cached_property
    def about(self) -> Key:
        """What all rows have in common: the model, and how they are scored."""
        timed = "with times" if self.setup.scoring.latency else "without times"
        return {**weights_key(self.model), "evaluation": f"{self.windows.fingerprint()}", "timing": timed}

    def key(self, entry: Entry) -> Key:
        """Return what decides a row, by topic."""
        plan = entry.resolution.plan if entry.resolution else {}
        shown = ("all experts",) if self.setup.calibration.all_experts else ()
        methods = (*entry.steps, entry.method, self.compute, *shown) if entry.resolution else ()
        batches = self.batches if entry.row.statistics != "none" else []
        kept = f"{self.setup.keep} {self.setup.output.format}" if self.setup.keep != "none" else "none"
        statistics = f"{entry.row.statistics} {' '.join(sorted(entry.needs))}".strip()
        return {**self.about, **settings_key(plan, methods, batches), "statistics": statistics, "kept checkpoints": kept}

    def collect(self, needs: Sequence[str], progress: ProgressCallback) -> None:
        """Collect statistics of the float model's inputs, unless they are there."""
        place = self.statistics_path(needs)
        if not needs or (place / "complete.json").exists():
            return
        check_model(self.model)
        structure, compute = prepare_blocks(self.model, self.structure, self.compute)
        fingerprint, waiting = data_fingerprint(self.batches), dict[str, SiteStatistics]()
        number = {site.name: index for index, block in enumerate(structure.blocks) for site in block.sites}

        def write() -> None:
            if waiting:
                save_statistics(place / f"block-{number[next(iter(waiting))]:05d}.safetensors", waiting, fingerprint)
                waiting.clear()

        def keep(site: Site, found: SiteStatistics) -> None:
            if waiting and number[next(iter(waiting))] != number[site.name]:
                write()
            waiting[site.name] = found

        with all_experts_shown(self.model, self.setup.calibration.all_experts):
            visit_statistics(
                self.model,
                structure,
                unpadded(self.batches),
                needs,
                keep,
                counted=unpadded_counts(self.batches),
                compute=compute,
                progress=progress,
            )
        write()
        write_json(place / "complete.json", {"collectors": list(needs), "fingerprint": fingerprint})

    def statistics_path(self, needs: Sequence[str]) -> Path:
        """Return the directory of statistics of this model and text."""
        shown = (self.setup.calibration.all_experts, self.compute, *needs)
        key = {**self.about, **settings_key({}, shown, self.batches if needs else [])}
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        return self.setup.directory / f"{STATISTICS}{digest[:8]}"

    def measure(self, entry: Entry, statistics: Path, progress: ProgressCallback) -> SweepRow:
        """Quantize a copy of the model as a row says, and score it.

        Args:
            entry: the row.
            statistics: where :meth:`collect` has put them.
            progress: receives the events of every stage.
        """
        if entry.resolution is None or entry.method is None:
            return dataclasses.replace(entry.row, status="done", **self._scores(self.model, entry, progress))
        reset_peak_memory(self.compute.device)
        begin = time.perf_counter()
        result = quantize(
            sharing_copy(self.model),
            entry.resolution,
            method=entry.method,
            steps=entry.steps,
            calibration=self._calibration(entry, statistics),
            output=self._output(entry),
            run=dataclasses.replace(self.setup.run, progress=progress),
            tokenizer=self.tokenizer,
        )
        cost: dict[str, Any] = {"seconds": time.perf_counter() - begin, "peak_bytes": peak_memory_bytes(self.compute.device)}
        row = dataclasses.replace(entry.row, status="done", **cost, **self._scores(result.model, entry, progress))
        del result
        return_freed_memory()
        return row

    def _calibration(self, entry: Entry, statistics: Path) -> Calibration:
        given = self.setup.calibration
        if entry.row.statistics != "none":
            given = dataclasses.replace(given, data=self.batches)
        if not entry.needs:
            return given
        files = sorted(statistics.glob("block-*.safetensors"))
        return dataclasses.replace(
            given, statistics={name: one for file in files for name, one in load_statistics(file)[0].items()}
        )

    def _output(self, entry: Entry) -> Output:
        if self.setup.keep == "none":
            return Output()
        path = Store(self.setup.directory).checkpoint(entry.id)
        return dataclasses.replace(self.setup.output, path=path, overwrite=True)  # made anew where the code has changed

    def _scores(self, model: nn.Module, entry: Entry, progress: ProgressCallback) -> dict[str, Any]:
        report: EvalReport = evaluate(
            model,
            self.base,
            data=self.windows,
            tokenizer=self.tokenizer,
            latency=self.setup.scoring.latency,
            label=entry.row.name,
            base_label="the float model",
            progress=progress,
        )
        report = dataclasses.replace(report, protocol=dataclasses.replace(report.protocol, source=self.source))
        return {"report": report, "bytes": self._bytes(model, entry, report.footprint.stored_bytes)}

    def _bytes(self, model: Any, entry: Entry, in_memory: int) -> int:
        """Return the bytes of all tensors of a row's checkpoint: as its files have them, if their format can store it."""
        plan = entry.resolution.plan if entry.resolution else {}
        try:
            return total_bytes(contents_of(config_of(model)), model, plan, self.setup.output.format)
        except FormatError:
            return in_memory + layout_bytes(carried_layout(ledger_of(self.model)))
