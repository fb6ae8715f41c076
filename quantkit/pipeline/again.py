"""The same run again: what is finished is recognised, and read back instead of made.

A checkpoint notes the key of the run that wrote it (:mod:`quantkit.checkpoint.record`). A run with the same key has nothing to
do. One with another is told what differs. A run that replaces its own input is recognised without the input, which is gone.
"""

import dataclasses
import json
import logging
import tempfile
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from quantkit import checkpoint
from quantkit.checkpoint.extras import write_extras
from quantkit.checkpoint.read import open_checkpoint
from quantkit.checkpoint.record import check_sums, matches
from quantkit.checkpoint.state import EXPECTED
from quantkit.errors import FormatError, QuantkitError
from quantkit.evaluation.coverage import CoverageRow
from quantkit.formats.base import FORMATS
from quantkit.hf.load import PreTrainedModel, empty_model, load_tokenizer, read_config
from quantkit.pipeline.result import QuantizeResult
from quantkit.pipeline.settings import Output, Run
from quantkit.system.files import clear_errors, write_atomic

log = logging.getLogger(__name__)


OF_THE_INPUT = ("model", "config", "carried over", "tokenizer and generation settings")
"""Topics of a key that are not known any more where the output has replaced the input."""


@dataclasses.dataclass
class _Facts:
    """What :func:`record_of` notes."""

    coverage: list[CoverageRow]
    losses: dict[str, float]


_FACTS = TypeAdapter(_Facts)


def record_of(coverage: Sequence[CoverageRow], losses: Mapping[str, float]) -> dict[str, Any]:
    """Return what a checkpoint notes of the run that made it, JSON-able."""
    return dataclasses.asdict(_Facts(list(coverage), dict(losses)))


def finished_result(
    model: PreTrainedModel, tokenizer: Any, output: Output, run: Run, key: checkpoint.Key
) -> QuantizeResult | None:
    """Return the result of an earlier run with the same key, read back from where it was written; None if there is none.

    Args:
        model: the float model; it becomes the quantized one.
        tokenizer: of the result.
        output: where the checkpoint goes; one that may be overwritten is still not made twice by the same code.
        run: without ``resume`` nothing is read back.
        key: of the run.

    Raises:
        FormatError: the output holds a checkpoint of other settings that may not be replaced, or a damaged one.
    """
    path = Path(str(output.path))
    record = checkpoint.read_record(path) if path.is_dir() and run.resume else None
    if record is None or not record.key or not is_complete(path):
        return None
    replaced = model.device.type == "meta"
    ignored = () if output.overwrite and not replaced else EXPECTED
    ignored = (*ignored, *OF_THE_INPUT) if replaced else ignored
    if differs := record.differs(key, ignored):
        if output.overwrite and not replaced:
            return None
        raise FormatError(
            f"{path} already holds a model, of another run: {'; '.join(differs)}; choose another directory, or pass "
            f"overwrite=True{' and the float model, which this directory held before' if replaced else ''}"
        )
    _write_missing(path, record.files, model, tokenizer)
    try:
        found = read_back(model, tokenizer, path, verify=True)
    except (ValidationError, QuantkitError) as error:
        if output.overwrite and not replaced:
            log.warning("%s is made again: %s", path, error)
            return None
        way_out = "" if replaced else "; to make it again, delete the directory or pass overwrite=True"
        raise FormatError(f"{path} is what this run wrote, but cannot be read back: {error}{way_out}") from error
    log.info("%s: already done", path)
    return found


def read_back(model: PreTrainedModel, tokenizer: Any, path: Path, *, verify: bool) -> QuantizeResult:
    """Return what a finished run has left in ``path``; ``model`` becomes the quantized one, as if it had been quantized now.

    Raises:
        QuantkitError: it cannot be read, or, with ``verify``, is not what was written.
    """
    record = checkpoint.read_record(path)
    facts = _FACTS.validate_python(record.run if record is not None else None)
    loaded: Any = checkpoint.load(path, compute="exact", verify=verify)
    model.__dict__ = loaded.__dict__
    with open_checkpoint(path) as opened:
        metadata, plan = dict(opened.config.get("quantkit", {})), opened.schemes
    metadata = {name: value for name, value in metadata.items() if name not in ("version", "format", "carried_over")}
    return QuantizeResult(model, tokenizer, plan, facts.coverage, facts.losses, path, metadata, already_done=True)


def _write_missing(path: Path, names: Collection[str], model: PreTrainedModel, tokenizer: Any) -> None:
    """Write what belongs beside the weights again, where it is gone or damaged; what a user has edited stays.

    Args:
        path: the checkpoint.
        names: of all its files.
        model: the float model, empty if the checkpoint has replaced it; then its source's files are gone with it.
        tokenizer: as for :func:`quantkit.checkpoint.extras.write_extras`.
    """
    if all(_is_whole(path / name) for name in names) or model.device.type == "meta":
        return
    with tempfile.TemporaryDirectory() as folder:
        write_extras(Path(folder), model, tokenizer)
        for file in sorted(Path(folder).iterdir()):
            if file.is_file() and file.name in names and not _is_whole(path / file.name):
                log.warning("%s is gone or damaged, and is written again", path / file.name)
                write_atomic(path / file.name, file.read_bytes())


def _is_whole(file: Path) -> bool:
    """Return whether a file is there and not obviously cut off: it has content, and JSON can be read."""
    try:
        if file.suffix == ".json":
            json.loads(file.read_bytes())
        return file.is_file() and file.stat().st_size > 0
    except (OSError, ValueError):
        return False


def is_complete(path: Path) -> bool:
    """Return whether a directory holds a whole checkpoint that a run has written."""
    return checkpoint.read_record(path) is not None and not (path / checkpoint.INCOMPLETE).exists()


def is_done(target: Path, key: checkpoint.Key, *, overwrite: bool) -> bool:
    """Return whether a directory holds what a conversion with this key writes, whole.

    One that is of another version of the software counts, too, unless it may be replaced.
    """
    record = checkpoint.read_record(target) if target.is_dir() else None
    if record is None or not is_complete(target) or not matches(key, record, () if overwrite else EXPECTED):
        return False
    if missing := [name for name in record.files if not (target / name).is_file()]:
        if overwrite:
            return False
        raise FormatError(
            f"{target} is what this conversion wrote, but {missing[0]} is gone; delete it, or pass overwrite=True"
        )
    with FORMATS.get(record.format).container.reader(target) as reader:
        check_sums(target, reader)
    return True


def replaced_model(source: str | Path, output: Output) -> tuple[PreTrainedModel, Any] | None:
    """Return an empty model and the tokenizer in place of an input that a finished run has replaced by its output.

    Returns:
        None if ``source`` is something else.
    """
    if output.path is None:
        return None
    path, out = Path(source), Path(output.path)
    with clear_errors(f"compare {path} with {out}"):
        if not (path.is_dir() and out.is_dir() and path.samefile(out) and is_complete(path)):
            return None
    with open_checkpoint(path) as opened:
        config = {name: value for name, value in opened.config.items() if name not in ("quantization_config", "quantkit")}
    return empty_model(read_config(config, path)), load_tokenizer(path)
