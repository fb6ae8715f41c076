"""What a run records of itself while it writes: ``incomplete/run/state.json``, the header of everything else there.

Without it, the other files of an unfinished checkpoint are nobody's: it is written last and removed last. It names the run it
belongs to, has a digest of every finished block and of what that block handed on, and says how far the publishing has come, so
that nothing is taken for what it is not.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import StringConstraints, TypeAdapter, ValidationError

from quantkit.errors import FormatError
from quantkit.system.files import clear_errors, read_json, write_atomic

STAGE = "incomplete"
"""Name of the directory, in the output directory, where a checkpoint is built."""

RUN = "run"
"""Name of the directory, in :data:`STAGE`, for what no reader of a checkpoint wants."""

Key = Mapping[str, str]
"""What decides the result of a run, by topic, as digests or versions: only state with the same key is continued."""

EXPECTED = ("code", "versions")
"""Topics that change without the user having asked for another result: then the run starts over."""

LAYOUT = 2
"""Number of the layout of the file; another is of another version of quantkit."""

Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]


@dataclass
class Block:
    """A finished block.

    Attributes:
        digest: of its tensors.
        facts: about it.
        chain: digest of what it handed on; None: nothing.
        others: the same of the other workers, by number, where several carried out the run.
    """

    digest: Sha256
    facts: dict[str, Any]
    chain: Sha256 | None
    others: list[Sha256] = field(default_factory=list)


@dataclass
class State:
    """All of it.

    Attributes:
        key: of the run.
        blocks: finished blocks by number.
        changes: facts about the steps that have changed finished blocks, by the name of the step.
        extras: files beside the container's, relative to the stage.
        phase: ``"publishing"`` from the moment on which the checkpoint is whole and moves into place.
        files: what is published, in the order in which it is moved.
        replaced: files of the output directory that it takes the place of.
    """

    key: dict[str, str]
    blocks: dict[str, Block] = field(default_factory=dict)
    changes: dict[str, Any] = field(default_factory=dict)
    extras: list[str] = field(default_factory=list)
    phase: Literal["writing", "publishing", "published"] = "writing"
    files: list[str] = field(default_factory=list)
    replaced: list[str] = field(default_factory=list)

    def write(self, stage: Path) -> None:
        """Write it into a stage, durably."""
        write_atomic(_file(stage), json.dumps({"layout": LAYOUT, **asdict(self)}))


_STATES = TypeAdapter(State)


def has_state(stage: Path) -> bool:
    """Say whether there is a header."""
    with clear_errors(f"look into {stage}"):
        return _file(stage).is_file()


def remove_state(stage: Path) -> None:
    """Remove the header: from now on the rest of the stage is nobody's."""
    _file(stage).unlink(missing_ok=True)


def read_state(stage: Path) -> State | None:
    """Return the state of the run that a stage belongs to; None if it is another version's.

    Raises:
        FormatError: it is damaged.
    """
    try:
        values = read_json(_file(stage))
    except FormatError as error:
        raise FormatError(f"{error}; {start_over(stage)}") from error
    if values.pop("layout", None) != LAYOUT:
        return None
    try:
        state = _STATES.validate_python(values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise FormatError(f"{_file(stage)} is damaged ({where}: {first['msg']}); {start_over(stage)}") from None
    names = [*state.extras, *state.files, *state.replaced]
    if odd := next((name for name in names if not _is_inside(name)), None):
        raise FormatError(f"{_file(stage)} is damaged ({odd!r} is no name of a file in it); {start_over(stage)}")
    return state


def start_over(stage: Path) -> str:
    """Return the way out of a stage that cannot be continued."""
    return f"delete {stage}, or pass resume=False to start over"


def _is_inside(name: str) -> bool:
    path = Path(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts and "\0" not in name


def _file(stage: Path) -> Path:
    return stage / RUN / "state.json"
