"""Moving a finished checkpoint into place, so that a kill at any instant loses neither the old files nor the new ones.

When a checkpoint is whole, checked and durable in its stage, its state says ``publishing`` and names every file that moves.
From then on nothing is decided any more, and whoever finds the state, this run or any later one, carries the move out:

1. the output directory is marked, so that no quantkit loads a mixture;
2. the files that are replaced move to ``incomplete/run/replaced``, the config first, so that no other program loads one either;
3. the new files move into place, the config last;
4. the mark is removed, the state says ``published``;
5. the replaced files and the rest of the stage are removed, the state and then the mark of the stage last.

Every step can be done again where it was done already. Until step 5 both checkpoints are whole on the disk, and until the state
says ``publishing`` the old one is untouched.

Only files with quantkit's names are removed, in a directory that bears quantkit's mark; what else lies there stays.
"""

import contextlib
import errno
import logging
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from quantkit.checkpoint.card import CARD, is_users_card
from quantkit.checkpoint.state import RUN, STAGE, State, has_state, read_state, remove_state
from quantkit.errors import FormatError
from quantkit.formats.base import FORMATS
from quantkit.formats.containers.base import UNFINISHED
from quantkit.system.files import TEMPORARY, clear_errors, read_json, remove_temporaries, sync_directory, sync_file, write_json

INCOMPLETE = "INCOMPLETE.json"
"""Name of the marker: a directory that has it is not a checkpoint."""

_REPLACED = f"{RUN}/replaced"
_RUN_FILES = ("chain-*.safetensors", "changes.safetensors")

log = logging.getLogger(__name__)


def mark_incomplete(path: Path, reason: str) -> None:
    """Put the marker into ``path``: from now on no quantkit loads it."""
    write_json(path / INCOMPLETE, {"incomplete": reason})


def container_files(path: Path) -> list[str]:
    """Return the names of the files in a directory that make it a checkpoint of any format."""
    patterns = dict.fromkeys(pattern for _, rule in FORMATS for pattern in rule.container.patterns)
    return [file.name for pattern in patterns for file in sorted(path.glob(pattern)) if file.is_file()]


def refuse_foreign(stage: Path, owner: int) -> None:
    """Make sure that what lies where the stage of a checkpoint goes is one.

    Args:
        stage: the directory.
        owner: number of the user that new files beside it belong to.

    Raises:
        FormatError: it is something of the user's, or somebody else's.
    """
    way_out = "move it away, or choose another directory for the checkpoint"
    with clear_errors(f"look into {stage}"):
        if stage.is_symlink() or (stage.exists() and not stage.is_dir()):
            raise FormatError(f"{stage} is not quantkit's, want a directory of unfinished files; {way_out}")
        if not stage.exists():
            return
        if stage.stat().st_uid != owner:
            raise FormatError(f"{stage} belongs to another user ({stage.stat().st_uid}, files here to {owner}); {way_out}")
        if has_state(stage) or (stage / INCOMPLETE).is_file():
            return
        found = [p.relative_to(stage).as_posix() for p in stage.rglob("*") if p.is_file() and not p.name.endswith(TEMPORARY)]
        if found:
            raise FormatError(f"{stage} is not quantkit's: it has no mark, and holds {found[0]}; {way_out}")


def begin(out: Path, state: State, key_file: str, names: Iterable[str], old: Sequence[str]) -> None:
    """Decide that a checkpoint is published, and do it.

    Args:
        out: where it goes; it is whole in its stage.
        state: of its run.
        key_file: the file that moves last.
        names: the files that move.
        old: files of ``out`` that go.
    """
    stage = out / STAGE
    kept = [CARD] if is_users_card(out) else []
    files = sorted(set(names) - {key_file, *kept})
    with clear_errors(f"move the checkpoint into {out}"):
        for name in (*files, key_file):
            sync_file(stage / name)
        sync_directory(stage)
        mark_incomplete(stage, "a quantkit run was stopped while it moved this checkpoint into place; run it again")
        same = [name for name in (*files, key_file) if (out / name).is_file()]
        state.replaced = sorted({*old, *same}, key=lambda name: (name != key_file, name))
        state.files, state.phase = [*files, key_file], "publishing"
        state.write(stage)
        _carry_out(out, state)


def recover(out: Path) -> bool:
    """Carry out what a killed run has decided to publish at ``out``; whoever calls this holds the lock of ``out``.

    Returns:
        Whether there was something to be done.
    """
    stage = out / STAGE
    if stage.is_symlink() or not stage.is_dir() or stage.stat().st_uid != owner_of_new_files(out):
        return False  # another user's is neither carried on nor removed; who wants to write here is told
    if not has_state(stage):
        if (stage / INCOMPLETE).is_file() or not any(path.is_file() for path in stage.rglob("*")):
            clear(stage)  # the state goes last, and comes first: what is left is nobody's
        return False
    try:
        state = read_state(stage)
    except FormatError as error:
        log.info("%s", error)  # whoever wants to continue it is told
        return False
    if state is None or state.phase == "writing":
        return False
    with clear_errors(f"move the checkpoint into {out}"):
        log.warning("%s: a run was stopped while it moved its checkpoint into place; going on with that", out)
        _carry_out(out, state) if state.phase == "publishing" else clear(stage)
    return True


def _carry_out(out: Path, state: State) -> None:
    stage, aside = out / STAGE, out / STAGE / _REPLACED
    mark_incomplete(out, "a quantkit run was stopped while it moved this checkpoint into place; run it again")
    for name in state.replaced:
        if (out / name).is_file() and not (aside / name).exists():
            _move(out / name, aside / name)
    _sync(out, aside)
    for name in state.files:
        if (stage / name).is_file():
            _move(stage / name, out / name)
    _sync(out, stage)
    (out / INCOMPLETE).unlink(missing_ok=True)
    sync_directory(out)
    state.phase = "published"
    state.write(stage)
    clear(stage)
    remove_temporaries(out)


def _move(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    source.replace(target)


def _sync(*folders: Path) -> None:
    for folder in folders:
        sync_directory(folder)


def clear(stage: Path) -> None:
    """Remove a stage: what quantkit put there, and the directories if nothing else is left in them."""
    if not stage.exists():
        return
    run, aside = stage / RUN, stage / _REPLACED
    state = _readable_state(stage)
    with clear_errors(f"remove {stage}"):
        known = [*container_files(stage), *(f"{name}{UNFINISHED}" for name in _unfinished(stage))]
        for file in (
            *(stage / name for name in (*known, *(state.extras if state else ()))),
            *_below(run / "extras"),
            *_below(aside),
        ):
            file.unlink(missing_ok=True)
        for pattern in _RUN_FILES:
            for file in run.glob(pattern):
                file.unlink(missing_ok=True)
        for folder in (stage, run):
            remove_temporaries(folder)
        nested = {stage / parent for name in (state.extras if state else ()) for parent in Path(name).parents[:-1]}
        inner = [run / "extras", aside, *(p for top in (run / "extras", aside) for p in top.rglob("*") if p.is_dir()), *nested]
        _remove_empty(sorted(inner, key=lambda folder: -len(folder.parts)))
        remove_state(stage)
        _remove_empty([run])
        (stage / INCOMPLETE).unlink(missing_ok=True)
        _remove_empty([stage])
        if stage.exists():
            log.warning("%s stays, because it holds files that are not quantkit's", stage)


def _readable_state(stage: Path) -> State | None:
    with contextlib.suppress(FormatError):
        return read_state(stage) if has_state(stage) else None
    return None


def _unfinished(stage: Path) -> list[str]:
    """Return the names that the unfinished files of a container will have."""
    patterns = dict.fromkeys(pattern for _, rule in FORMATS for pattern in rule.container.patterns)
    return [file.name.removesuffix(UNFINISHED) for pattern in patterns for file in stage.glob(f"{pattern}{UNFINISHED}")]


def _below(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if not path.is_dir()]


def _remove_empty(folders: Iterable[Path]) -> None:
    for folder in folders:
        try:
            folder.rmdir()
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTEMPTY, errno.EEXIST):
                raise


def owner_of_new_files(path: Path) -> int:
    """Return the number of the user that files made in a directory belong to; on some file systems it is not the process's."""
    probe = path / f".{os.getpid()}{TEMPORARY}"
    with clear_errors(f"write to {path}"):
        probe.touch()
        try:
            return probe.stat().st_uid
        finally:
            probe.unlink()


def is_marked(path: Path) -> str | None:
    """Return the reason why a directory is marked as incomplete; None if it is not.

    Raises:
        FormatError: the mark cannot be read.
    """
    with clear_errors(f"look into {path}"):
        if not (path / INCOMPLETE).exists():
            return None
    return str(read_json(path / INCOMPLETE).get("incomplete", "unknown reason"))
