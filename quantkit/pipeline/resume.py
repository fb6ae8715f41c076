"""What decides the result of a run, and finished blocks between the walk and the checkpoint that is being written.

The state of an unfinished run lives in the checkpoint's own directory (:mod:`quantkit.checkpoint.staging`). It is continued
only by a run whose :func:`run_key` is the same: same model to the last byte, config, tokenizer, plan, methods, calibration,
format, versions and source code, since blocks that were made differently must not end up in one checkpoint. A finished
checkpoint notes the same key, so that the run that is given again knows that it is done.
"""

import functools
import hashlib
import importlib.metadata
import json
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from quantkit.calibrate.data import Batch
from quantkit.calibrate.data import fingerprint as data_fingerprint
from quantkit.checkpoint import CheckpointWriter, Key
from quantkit.checkpoint.digests import sums
from quantkit.checkpoint.extras import write_extras
from quantkit.checkpoint.handed import Share
from quantkit.checkpoint.handed import read as read_handed
from quantkit.checkpoint.staging import ALL
from quantkit.formats.base import FORMATS
from quantkit.hf.ledger import ledger_of
from quantkit.hf.load import PreTrainedModel
from quantkit.nn.quantized import Quantized
from quantkit.nn.sites import SiteStatistics
from quantkit.qtensor import QTensor
from quantkit.spec import Plan
from quantkit.system.files import sha256_file
from quantkit.version import __version__

PACKAGE = Path(__file__).parents[1]
SOURCES = ("*.py", "*.cpp", "*.h")
FACES = ("cli", "engine", "generation", "recipe", "report", "serve", "sweeps")
"""Folders of the package that decide no byte of a checkpoint, beyond what a run's settings say."""


def run_key(
    model: PreTrainedModel,
    plan: Plan,
    methods: Sequence[object],
    batches: Sequence[Batch],
    *,
    tokenizer: Any = None,
    statistics: Mapping[str, SiteStatistics] | None = None,
    format: str = "compressed-tensors",
) -> Key:
    """Return what decides the result of a run, by topic.

    Every byte of the model and of the statistics is hashed, which takes about as long as reading them.

    Args:
        model: the float model, before anything is done to it. Of an empty one (on the meta device) the weights are left out.
        plan: site name to scheme.
        methods: quantizer, transforms and other settings; their ``repr`` says what they do.
        batches: calibration text; batches count by size too, since what blocks hand on keeps them.
        tokenizer: written along, and asked for text to compare with.
        statistics: used instead of calibration text.
        format: name of the checkpoint's format.
    """
    known = {f"{site}|{name}": value for site, one in (statistics or {}).items() for name, value in one.results.items()}
    rule = FORMATS.get(format)
    return {
        **({} if model.device.type == "meta" else weights_key(model)),
        **settings_key(plan, methods, batches, (rule.codec, rule.container, rule.dialect)),
        "statistics": _tensors_digest(known.items()),
        "tokenizer and generation settings": _extras_digest(model, tokenizer),
        "format": format,
    }


def settings_key(plan: Plan, methods: Sequence[object], batches: Sequence[Batch], plugins: Sequence[object] = ()) -> Key:
    """Return the topics of a key that settings, calibration text and software decide; ``plugins`` take part beside methods."""
    return {
        "plan": _text_digest({name: scheme.to_dict() for name, scheme in plan.items()}),
        "settings": ", ".join(map(repr, methods)),
        "calibration": _text_digest([data_fingerprint(batches), *(tuple(batch.ids.shape) for batch in batches)]),
        "versions": ", ".join(f"{name} {version}" for name, version in versions().items()),
        "code": code_digest([*methods, *plugins]),
    }


def weights_key(model: PreTrainedModel) -> Key:
    """Return the topics of a key that a model's own numbers decide: its config, parameters and buffers."""
    config = model.config.to_dict()
    for name in ("_name_or_path", "transformers_version"):
        config.pop(name, None)
    tensors, ledger = [*model.named_parameters(), *model.named_buffers()], ledger_of(model)
    carried: Key = {}
    if ledger is not None and ledger.carried:
        with ledger.tensors() as read:
            carried = {"carried over": _text_digest(dict(sums((name, read(name)) for name in ledger.carried)))}
    return {"config": _text_digest([type(model).__name__, config]), "model": _tensors_digest(tensors), **carried}


def versions() -> dict[str, str]:
    """Return the versions that decide a run's result."""
    return {"quantkit": __version__, **{name: importlib.metadata.version(name) for name in ("torch", "transformers")}}


def code_digest(plugins: Iterable[object] = (), package: Path = PACKAGE) -> str:
    """Return a SHA-256 over the source code that decides a run's result.

    Args:
        plugins: what takes part in the run; the files of those that are not quantkit's own count, too.
        package: quantkit's directory.
    """
    found = {getattr(one, "__module__", type(one).__module__) for one in plugins}
    foreign = {name: getattr(sys.modules.get(name), "__file__", None) for name in found if name.split(".")[0] != "quantkit"}
    files = {name: hashlib.sha256(Path(file).read_bytes()).hexdigest() for name, file in foreign.items() if file}
    return _text_digest([_package_digest(package), files])


@functools.cache
def _package_digest(package: Path) -> str:
    files = {path.relative_to(package): path for pattern in SOURCES for path in package.rglob(pattern)}
    digest = hashlib.sha256()
    for name in sorted(name for name in files if name.parts[0] not in FACES):
        digest.update(f"{name.as_posix()} {hashlib.sha256(files[name].read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()


def _text_digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def _tensors_digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Return a SHA-256 over names, shapes, dtypes and every byte."""
    found = list(tensors)
    facts = {name: f"{tuple(tensor.shape)} {tensor.dtype}" for name, tensor in found}
    return _text_digest([[name, facts[name], digest] for name, digest in sums(found)])


def _extras_digest(model: PreTrainedModel, tokenizer: Any) -> str:
    """Return a SHA-256 over the files that are written beside the tensors."""
    with tempfile.TemporaryDirectory(prefix="quantkit-") as scratch:
        folder = Path(scratch)
        write_extras(folder, model, tokenizer)
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        return _text_digest([[path.relative_to(folder).as_posix(), sha256_file(path)] for path in files])


def _restored(qtensor: QTensor, facts: Mapping[str, Any]) -> Quantized:
    """Return a layer as it was when its block was finished; its bias is in the model."""
    notes, tokens = tuple(facts["notes"]), tuple(facts.get("tokens", ()))
    return Quantized(qtensor, facts["loss"], notes, facts["fell_back"], tokens=tokens)


class ResumeStore:
    """Finished blocks of one run, kept in its checkpoint as it is written.

    Args:
        writer: of the checkpoint; opened with the run's :func:`run_key`.
        share: which part of what blocks hand on is this process's.
    """

    def __init__(self, writer: CheckpointWriter, share: Share = ALL) -> None:
        self.writer, self.share = writer, share

    def finished(self) -> int:
        """Return how many leading blocks are finished."""
        return self.writer.finished

    def save(self, index: int, quantized: Mapping[str, Quantized], chain: Sequence[Tensor]) -> None:
        """Write block ``index``, which is as it shall be in the model, with its outputs (one (B, T, H) per batch)."""
        facts = {
            name: {"loss": one.loss, "notes": one.notes, "fell_back": one.fell_back, "tokens": one.tokens}
            for name, one in quantized.items()
        }
        qtensors = {name: one.qtensor for name, one in quantized.items()}
        self.writer.write_block(index, qtensors, facts=facts, chain=chain, share=self.share)

    def load(self, index: int) -> dict[str, Quantized]:
        """Return the quantized sites of finished block ``index``; its other tensors, such as biases, go into the model."""
        qtensors, facts = self.writer.restore_block(index)
        return {name: _restored(qtensor, facts[name]) for name, qtensor in qtensors.items()}

    def on_disk(self, index: int, quantized: Mapping[str, Quantized]) -> dict[str, Quantized]:
        """Return the sites of a written block as they are in its file, compared bit for bit, and no longer in memory."""
        places = self.writer.on_disk(index, {name: one.qtensor for name, one in quantized.items()})
        return {name: replace(one, qtensor=places.get(name, one.qtensor)) for name, one in quantized.items()}

    def load_chain(self, count: int) -> list[Tensor]:
        """Return the outputs of the last of the finished blocks, of which ``count`` are this process's."""
        return read_handed(self.writer.path, self.finished() - 1, self.writer.handed, count, self.share)

    def changed(self, step: str) -> Any:
        """Return what was recorded of a step that changes finished blocks; None if it has not been carried out."""
        return self.writer.changes.get(step)

    def change(self, step: str, quantized: Mapping[str, Quantized], facts: Any) -> None:
        """Write what ``step`` has made of the finished blocks, and what to record of it (JSON-able, not None)."""
        self.writer.change_blocks(step, {name: one.qtensor for name, one in quantized.items()}, facts)
