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
Publishing moves the files to ``<out>`` one by one; a run that finds it half done moves them back and publishes again.
"""

import hashlib
import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from quantkit.errors import FormatError
from quantkit.formats.containers.base import UNFINISHED
from quantkit.numerics.pack import as_bytes
from quantkit.system.files import atomic_path, read_json, remove_temporaries, sync_directory, write_atomic, write_json

INCOMPLETE = "INCOMPLETE.json"
"""Name of the marker: a directory that has it is not a checkpoint."""

Key = Mapping[str, str]
"""What decides the result of a run, by topic, as digests or versions: only state with the same key is continued."""

STAGE = "incomplete"

_EXPECTED = ("code", "versions")
"""Topics that change without the user having asked for another result: then the run starts over."""

log = logging.getLogger(__name__)


def mark_incomplete(path: Path, reason: str) -> None:
    """Put the marker into ``path``: from now on no quantkit loads it."""
    write_json(path / INCOMPLETE, {"incomplete": reason})


class Digest:
    """A SHA-256 over names, dtypes, shapes and bytes of tensors, in the order in which they are added."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        """Add CPU tensors."""
        for name, tensor in tensors.items():
            self._hash.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            content: Any = as_bytes(tensor).numpy()
            self._hash.update(memoryview(content))

    def hexdigest(self) -> str:
        """Return the digest of what was added."""
        return self._hash.hexdigest()


def stage_bytes(out: Path) -> int:
    """Return the disk space that an unfinished checkpoint at ``out`` takes (holes in its files take none)."""
    return sum(file.stat().st_blocks * 512 for file in (out / STAGE).rglob("*") if file.is_file())


def find_state(out: Path, key: Key) -> tuple[dict[str, Any] | None, str | None]:
    """Look for an unfinished run at ``out`` that can be continued under ``key``.

    Returns:
        Its state, or None; and if there is one that cannot be continued, the reason.

    Raises:
        FormatError: it is the state of a run with other settings, which the user may still want.
    """
    stage = out / STAGE
    if not (stage / "run" / "state.json").is_file():
        return None, None
    state = read_json(stage / "run" / "state.json")
    if state["publishing"] and not (out / INCOMPLETE).exists():  # published, and killed before the last files were removed
        return None, None
    other = sorted(topic for topic in {*key, *state["key"]} if key.get(topic) != state["key"].get(topic))
    if asked := [topic for topic in other if topic not in _EXPECTED]:
        raise FormatError(
            f"{stage} holds the unfinished state of another run (other {', '.join(asked)}); "
            "delete it, or pass resume=False to start over"
        )
    if other:
        changed = "the source code of quantkit or a plug-in" if "code" in other else f"versions ({state['key']['versions']})"
        count = len(state["blocks"])
        return (
            None,
            f"{stage}: {changed} changed after its {count} finished blocks were written, which do not mix with new ones",
        )
    return state, None


class Stage:
    """The directory of a checkpoint that is being written.

    Args:
        out: where the checkpoint goes; an existing directory.
        key: what decides the result; None for a checkpoint that is written in one go.
        resume: continue a run of the same key.

    Raises:
        FormatError: see :func:`find_state`.
    """

    def __init__(self, out: Path, key: Key | None, *, resume: bool) -> None:
        self.out, self.path, self._run = out, out / STAGE, out / STAGE / "run"
        self.key = key
        found, obstacle = find_state(out, key) if key is not None and resume else (None, None)
        if obstacle is not None:
            log.warning("%s; starting over", obstacle)
        self._state: dict[str, Any] = found or {"key": dict(key or {}), "blocks": {}, "changes": {}, "publishing": []}
        if found is None and self.path.exists():
            shutil.rmtree(self.path)
        self._run.mkdir(parents=True, exist_ok=True)
        for name in self._state["publishing"]:
            if not (self.path / name).exists() and (self.out / name).exists():
                (self.out / name).replace(self.path / name)
        self._state["publishing"] = []
        mark_incomplete(self.path, "a quantkit run has not finished writing this checkpoint; run it again")

    def begin(self) -> None:
        """Record that the container's files are laid out; what else an earlier attempt put beside them goes."""
        for file in self.path.iterdir():
            if file.is_file() and not file.name.endswith(UNFINISHED) and file.name != INCOMPLETE:
                file.unlink()
        for leftovers in (self.path, self._run):
            remove_temporaries(leftovers)
        self._save()

    @property
    def finished(self) -> int:
        """Number of leading blocks that are recorded."""
        return next(i for i in range(len(self._state["blocks"]) + 1) if str(i) not in self._state["blocks"])

    @property
    def changes(self) -> dict[str, Any]:
        """Facts about the steps that have changed finished blocks, by the name of the step."""
        return dict(self._state["changes"])

    def record(self, index: int, digest: str, facts: Mapping[str, Any], chain: Sequence[Tensor]) -> None:
        """Record block ``index``, whose tensors are durable, as finished.

        Args:
            index: of the block.
            digest: of its tensors.
            facts: JSON-able; returned by :meth:`block`.
            chain: what the block hands on to the next one.
        """
        if chain:
            with atomic_path(self._chain(index)) as temporary:
                save_file({f"{i:05d}": hidden.contiguous() for i, hidden in enumerate(chain)}, temporary)
        self._state["blocks"][str(index)] = {"digest": digest, "facts": dict(facts)}
        self._save()
        self._chain(index - 1).unlink(missing_ok=True)

    def block(self, index: int) -> tuple[str, dict[str, Any]]:
        """Return digest and facts of a recorded block."""
        block = self._state["blocks"][str(index)]
        return block["digest"], block["facts"]

    def chain(self) -> list[Tensor]:
        """Return what the last of the finished blocks handed on."""
        with safe_open(self._chain(self.finished - 1), "pt") as file:
            return [file.get_tensor(key).clone() for key in sorted(file.keys())]

    def plan_changes(self, step: str, facts: Any, tensors: Mapping[str, Tensor], digests: Mapping[int, str]) -> None:
        """Decide that finished blocks are changed.

        Args:
            step: name of the step that changes them.
            facts: about the step, JSON-able.
            tensors: every tensor that changes.
            digests: of all blocks, after the change.
        """
        text = json.dumps({"step": step, "facts": facts, "digests": digests})
        with atomic_path(self._run / "changes.safetensors") as temporary:
            save_file({name: _own(tensor) for name, tensor in tensors.items()}, temporary, metadata={"changes": text})

    def planned_changes(self) -> dict[str, Tensor] | None:
        """Return the tensors of :meth:`plan_changes` until :meth:`record_changes`, else None."""
        if not (self._run / "changes.safetensors").exists():
            return None
        with safe_open(self._run / "changes.safetensors", "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping

    def record_changes(self) -> None:
        """Record that the planned changes are carried out and durable."""
        with safe_open(self._run / "changes.safetensors", "pt") as file:
            planned = json.loads(file.metadata()["changes"])
        for index, digest in planned["digests"].items():
            self._state["blocks"][index]["digest"] = digest
        self._state["changes"][planned["step"]] = planned["facts"]
        self._save()
        (self._run / "changes.safetensors").unlink()

    def publish(self, replaced: Sequence[str], key_file: str) -> None:
        """Move the finished files into place.

        Args:
            replaced: globs of the old checkpoint's files, which go.
            key_file: the file that is moved last.
        """
        names = sorted(file.name for file in self.path.iterdir() if file.is_file() and file.name != key_file)
        for place in (self.out, self.path):
            mark_incomplete(place, "a quantkit run was stopped while it moved this checkpoint into place; run it again")
        self._state["publishing"] = [*names, key_file]
        self._save()
        for old in {file for pattern in replaced for file in self.out.glob(pattern)}:
            old.unlink()
        for name in self._state["publishing"]:
            (self.path / name).replace(self.out / name)
        sync_directory(self.out)
        remove_temporaries(self.out)
        (self.out / INCOMPLETE).unlink()
        shutil.rmtree(self.path)

    def _chain(self, index: int) -> Path:
        return self._run / f"chain-{index:05d}.safetensors"

    def _save(self) -> None:
        write_atomic(self._run / "state.json", json.dumps(self._state))


def _own(tensor: Tensor) -> Tensor:
    """Return ``tensor`` in storage of its own: safetensors refuses views of shared memory."""
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()
