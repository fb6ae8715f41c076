"""What a run leaves on the disk so that it can be killed at any instant and continued to byte-identical files.

A checkpoint is built in ``<out>/incomplete``::

    incomplete/INCOMPLETE.json               no quantkit loads this directory
    incomplete/*.part                        the container's files; every finished block is in its place
    incomplete/run/state.json                what decides the result, which blocks are finished, and a digest of each
    incomplete/run/chain-00003.safetensors   what the newest finished block handed on to the next one
    incomplete/run/changes.safetensors       while finished blocks are being changed: what they are changed to

A block is recorded in state.json after its tensors and what it handed on are durable, so a block that is recorded can be
continued from; one that is half written is written again. Steps that change finished blocks (scales learned after all of them)
first write everything they change to ``changes.safetensors``; from then on the change is carried out, by this run or the next.
How the files move to ``<out>``: :mod:`quantkit.checkpoint.publish`. One process at a time writes: :func:`claim`.
"""

import contextlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from quantkit.checkpoint import handed, publish
from quantkit.checkpoint.digests import digest_of
from quantkit.checkpoint.handed import Share
from quantkit.checkpoint.publish import mark_incomplete
from quantkit.checkpoint.state import EXPECTED, RUN, STAGE, Block, Key, State, has_state, read_state, start_over
from quantkit.errors import FormatError
from quantkit.system.files import clear_errors, remove_temporaries, usable_path
from quantkit.system.lock import lock
from quantkit.system.tensors import write_tensors

log = logging.getLogger(__name__)

ALL = Share()


@contextlib.contextmanager
def claim(out: str | Path | None, doing: str = "writing a checkpoint") -> Iterator[None]:
    """Be the only one who writes a checkpoint to ``out``; what an earlier run was about to publish there is published first.

    A thread may claim a directory it has claimed already. None is no directory, and nothing is done.

    Raises:
        BusyError: another process, or another thread, is at work there.
        DiskError: it cannot be written to.
    """
    if out is None:
        yield
        return
    path = usable_path(out)
    with clear_errors(f"use {path}"):
        if path.exists() and not path.is_dir():
            raise FormatError(f"{path} is a file; want a directory to write the checkpoint to")
    with lock(path, doing):
        publish.recover(path)
        remove_temporaries(path)
        yield


def stage_bytes(out: Path) -> int:
    """Return the disk space that an unfinished checkpoint at ``out`` takes (holes in its files take none)."""
    return sum(file.stat().st_blocks * 512 for file in (out / STAGE).rglob("*") if file.is_file())


def find_state(out: Path, key: Key) -> tuple[State | None, str | None]:
    """Look for an unfinished run at ``out`` that can be continued under ``key``.

    Returns:
        Its state, or None; and if there is one that cannot be continued, the reason.

    Raises:
        FormatError: it is the state of a run with other settings, which the user may still want, or it is damaged; what is
            there is not quantkit's, or another user's.
    """
    stage = out / STAGE
    if not out.is_dir():
        return None, None
    publish.refuse_foreign(stage, publish.owner_of_new_files(out))
    if not has_state(stage):
        return None, None
    state = read_state(stage)
    if state is None:
        return None, f"{stage} was written by another version of quantkit"
    other = sorted(topic for topic in {*key, *state.key} if key.get(topic) != state.key.get(topic))
    if asked := [topic for topic in other if topic not in EXPECTED]:
        raise FormatError(f"{stage} holds the unfinished state of another run (other {', '.join(asked)}); {start_over(stage)}")
    if other:
        changed = "the source code of quantkit or a plug-in" if "code" in other else f"versions ({state.key['versions']})"
        count = len(state.blocks)
        return (
            None,
            f"{stage}: {changed} changed after its {count} finished blocks were written, which do not mix with new ones",
        )
    return state, None


class Stage:
    """The directory of a checkpoint that is being written.

    Args:
        out: where the checkpoint goes; an existing directory, which this thread has claimed.
        key: what decides the result; None for a checkpoint that is written in one go.
        resume: continue a run of the same key.

    Raises:
        FormatError: see :func:`find_state`.
        DiskError: the disk refuses, or is full; so do all methods.
    """

    def __init__(self, out: Path, key: Key | None, *, resume: bool) -> None:
        self.out, self.path, self._run = out, out / STAGE, out / STAGE / RUN
        self.key = key
        publish.refuse_foreign(self.path, publish.owner_of_new_files(out))
        found, obstacle = find_state(out, key) if key is not None and resume else (None, None)
        if obstacle is not None:
            log.warning("%s; starting over", obstacle)
        self._state = found or State(dict(key or {}))
        with clear_errors(f"write to {self.path}"):
            if found is None:
                publish.clear(self.path)
            self.path.mkdir(exist_ok=True)
            mark_incomplete(self.path, "a quantkit run has not finished writing this checkpoint; run it again")
            self._run.mkdir(exist_ok=True)

    def begin(self) -> None:
        """Record that the container's files are laid out; what else an earlier attempt put beside them goes."""
        with clear_errors(f"write to {self.path}"):
            for name in self._state.extras:
                (self.path / name).unlink(missing_ok=True)
            self._state.extras = []
            for leftovers in (self.path, self._run):
                remove_temporaries(leftovers)
            self._save()

    @property
    def finished(self) -> int:
        """Number of leading blocks that are recorded."""
        return next(i for i in range(len(self._state.blocks) + 1) if str(i) not in self._state.blocks)

    @property
    def changes(self) -> dict[str, Any]:
        """Facts about the steps that have changed finished blocks, by the name of the step."""
        return dict(self._state.changes)

    def record(self, index: int, digest: str, facts: Mapping[str, Any], chain: Sequence[Tensor], share: Share = ALL) -> None:
        """Record block ``index``, whose tensors are durable, as finished.

        Args:
            index: of the block.
            digest: of its tensors.
            facts: JSON-able; returned by :meth:`block`.
            chain: what the block hands on to the next one.
            share: which part of that it is; the other workers call :func:`quantkit.checkpoint.handed.write`.
        """
        files = handed.write(self.out, index, chain, share)
        self._state.blocks[str(index)] = Block(digest, dict(facts), files[0] if files else None, files[1:])
        self._save()
        handed.remove(self.out, index - 1)

    def block(self, index: int) -> tuple[str, dict[str, Any]]:
        """Return digest and facts of a recorded block."""
        block = self._state.blocks[str(index)]
        return block.digest, block.facts

    @property
    def handed(self) -> list[str]:
        """Digests of the files of what the last of the finished blocks handed on."""
        last = self._state.blocks[str(self.finished - 1)]
        return [one for one in (last.chain, *last.others) if one]

    def plan_changes(self, step: str, facts: Any, tensors: Mapping[str, Tensor], digests: Mapping[int, str]) -> None:
        """Decide that finished blocks are changed.

        Args:
            step: name of the step that changes them.
            facts: about the step, JSON-able.
            tensors: every tensor that changes.
            digests: of all blocks, after the change.
        """
        text = json.dumps({"step": step, "facts": facts, "digests": digests, "of": digest_of(tensors)})
        own = {name: _own(tensor) for name, tensor in tensors.items()}
        write_tensors(self._run / "changes.safetensors", own, {"changes": text})

    def planned_changes(self) -> dict[str, Tensor] | None:
        """Return the tensors of :meth:`plan_changes` until :meth:`record_changes`, else None."""
        path = self._run / "changes.safetensors"
        if not path.exists():
            return None
        tensors, planned = self._read(path)
        if set(planned.get("digests", {})) != set(self._state.blocks) or digest_of(tensors) != planned.get("of"):
            raise FormatError(f"{path} is not what was written; the disk lost bits; {start_over(self.path)}")
        return tensors

    def record_changes(self) -> None:
        """Record that the planned changes are carried out and durable."""
        path = self._run / "changes.safetensors"
        _, planned = self._read(path)
        for index, digest in planned["digests"].items():
            self._state.blocks[index].digest = digest
        self._state.changes[planned["step"]] = planned["facts"]
        self._save()
        with clear_errors(f"remove {path}"):
            path.unlink()

    @contextlib.contextmanager
    def extras(self) -> Iterator[Path]:
        """Yield an empty directory for files that go beside the container's, and put them there afterwards."""
        folder = self._run / "extras"
        with clear_errors(f"write to {self.path}"):
            folder.mkdir(exist_ok=True)
            for leftover in (path for path in folder.rglob("*") if path.is_file()):
                leftover.unlink()
            yield folder
            names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
            self._state.extras = sorted({*self._state.extras, *names})
            self._save()
            for name in names:
                (self.path / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).replace(self.path / name)

    @property
    def extra_names(self) -> list[str]:
        """Names of the files of :meth:`extras`, relative to the stage."""
        return list(self._state.extras)

    def publish(self, replaced: Sequence[str], key_file: str) -> None:
        """Move the finished files into place.

        Args:
            replaced: names of files of the old checkpoint, which go.
            key_file: the file that is moved last.
        """
        names = [*publish.container_files(self.path), *self._state.extras]
        publish.begin(self.out, self._state, key_file, names, replaced)

    def _read(self, path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the tensors in a file of this run, in the order of their names, and what it says of its changes."""
        try:
            with safe_open(path, "pt") as file:
                names = sorted(file.keys())
                found = {name: file.get_tensor(name) for name in names}
                changes = json.loads((file.metadata() or {}).get("changes", "{}"))
                return {name: one.clone() for name, one in found.items()}, changes
        except (OSError, SafetensorError, ValueError) as error:
            raise FormatError(f"{path} is damaged ({error}); {start_over(self.path)}") from error

    def _save(self) -> None:
        self._state.write(self.path)


def _own(tensor: Tensor) -> Tensor:
    """Return ``tensor`` in storage of its own: safetensors refuses views of shared memory."""
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()
