"""Training on the disk: ``<out>/training``, from which an interrupted run goes on.

    training/state.json                  what decides the result, the history so far, and which file holds the tensors
    training/step-00000120-0-5.safetensors   weights, scales, AdamW's moments after that many updates, blocks and evaluations,
                                             and the best codes so far
    training/teacher/                    predictions of the float model (:mod:`quantkit.pipeline.training.teacher`)
    training/start/                      the quantized model that training began with, a checkpoint of its own

A file of tensors is written under a new name and is durable before state.json names it; the file before it goes last. So
whenever a run is killed, state.json names a whole state. The position in the text follows from the number of updates.
"""

import contextlib
import dataclasses
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from quantkit.checkpoint import Key
from quantkit.checkpoint.digests import digest_of
from quantkit.checkpoint.state import EXPECTED
from quantkit.errors import FormatError
from quantkit.pipeline.training import teacher
from quantkit.pipeline.training.loop import History, Learner, SaveState
from quantkit.system.files import clear_errors, read_json, remove_temporaries, write_json
from quantkit.system.tensors import write_tensors

log = logging.getLogger(__name__)

FOLDER, STATE, START, TEACHER = "training", "state.json", "start", "teacher"
_PATTERN = "step-*.safetensors"
_LIBRARY_TEMPORARY = ".tmp??????"
"""What safetensors calls a file while it writes it."""
_HISTORY = TypeAdapter(History)


class TrainingState(SaveState):
    """The state of one run.

    Args:
        out: where the checkpoint goes; claimed by this process.
        key: what decides the result of the run.
        resume: go on from a state of the same key; otherwise what is left of any run goes.

    Raises:
        FormatError: there is the state of a run with other settings, or it is damaged.
    """

    def __init__(self, out: Path, key: Key, *, resume: bool) -> None:
        self.path, self.key = out / FOLDER, dict(key)
        self._found: dict[str, Any] | None = None
        if not resume:
            self.clear()
        if (self.path / STATE).is_file():
            found = read_json(self.path / STATE)
            if (changed := _differ(found, key)) and set(changed) <= set(EXPECTED):
                log.warning("%s: other %s than before; training starts over", self.path, ", ".join(changed))
                self.clear()
                found = {}
            elif changed:
                raise FormatError(
                    f"{self.path} holds the state of another training run (other {', '.join(changed)}); give its settings to "
                    "go on with it, choose another directory, or pass resume=False to start over"
                )
            self._found = found or None
        with clear_errors(f"write to {self.path}"):
            self.path.mkdir(parents=True, exist_ok=True)
            self._remove_leftovers()

    @property
    def start(self) -> Path:
        """Where the quantized model goes that training begins with."""
        return self.path / START

    @property
    def teacher(self) -> Path:
        """Where predictions of the float model lie."""
        return self.path / TEACHER

    def restore(self, learner: Learner) -> bool:
        """Bring a fresh learner to the state on the disk; say whether there is one.

        Raises:
            FormatError: the state is damaged.
        """
        if self._found is None:
            return False
        file = self.path / str(self._found.get("file"))
        way_out = "pass resume=False to start over"
        try:
            tensors = load_file(file)
            history = _HISTORY.validate_python(self._found.get("history"))
        except (OSError, SafetensorError, ValidationError) as error:
            raise FormatError(f"{file}: the state of training cannot be read: {error}; {way_out}") from error
        if digest_of(tensors) != self._found.get("digest"):
            raise FormatError(f"{file} is not what was written: the disk lost bits; {way_out}")
        learner.restore(tensors, history)
        return True

    def __call__(self, learner: Learner) -> None:
        """Write the state of ``learner``: all of it, or after a kill nothing."""
        tensors: Mapping[str, Tensor] = {name: value.detach().cpu().contiguous() for name, value in learner.tensors().items()}
        history = learner.history  # of what happened at one step nothing overwrites the file that state.json still names
        name = f"step-{learner.done:08d}-{len(history.blocks)}-{len(history.evaluations)}.safetensors"
        write_tensors(self.path / name, tensors)
        facts = {"key": self.key, "file": name, "digest": digest_of(tensors), "history": dataclasses.asdict(history)}
        write_json(self.path / STATE, facts)
        with clear_errors(f"write to {self.path}"):
            for old in self.path.glob(_PATTERN):
                if old.name != name:
                    old.unlink()

    def clear(self) -> None:
        """Remove what training has left, and nothing else."""
        if not self.path.is_dir():
            return
        with clear_errors(f"remove {self.path}"):
            (self.path / STATE).unlink(missing_ok=True)
            for file in self.path.glob(_PATTERN):
                file.unlink()
            self._remove_leftovers()
            if self.teacher.is_dir():
                for file in self.teacher.glob(teacher.PATTERN):
                    file.unlink()
                with contextlib.suppress(OSError):  # something of the user's is in it
                    self.teacher.rmdir()
            if (self.start / "config.json").is_file() or (self.start / "incomplete").is_dir():
                shutil.rmtree(self.start)
            with contextlib.suppress(OSError):  # something of the user's is in it
                self.path.rmdir()

    def _remove_leftovers(self) -> None:
        """Remove what a run that was killed while it wrote left half written."""
        for folder in (self.path, self.teacher):
            if folder.is_dir():
                remove_temporaries(folder)
                for file in folder.glob(_LIBRARY_TEMPORARY):
                    file.unlink(missing_ok=True)


def course_so_far(out: Path) -> dict[str, Any] | None:
    """Return what a run into ``out`` has seen when it last wrote its state, as :meth:`History.facts`; None if there is none."""
    file = out / FOLDER / STATE
    if not file.is_file():
        return None
    try:
        return _HISTORY.validate_python(read_json(file).get("history")).facts()
    except ValidationError as error:
        raise FormatError(f"{file}: the state of training cannot be read: {error}") from error


def _differ(found: Mapping[str, Any], key: Key) -> list[str]:
    """Return the topics in which a state's key is another."""
    known = found.get("key", {})
    return sorted(topic for topic in {*key, *known} if known.get(topic) != key.get(topic))
