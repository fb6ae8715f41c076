"""``quantkit.json``: what quantkit notes beside a checkpoint, and no other program reads.

The SHA-256 of every tensor's bytes, so that a file can be checked years later on another machine; what decided the result
(:data:`~quantkit.checkpoint.state.Key`), so that the same command, given again, knows that it is done; the names of the files,
so that they can be told from the user's; and what became of every layer.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from quantkit.checkpoint.digests import sums
from quantkit.checkpoint.state import Key, Sha256
from quantkit.errors import FormatError
from quantkit.formats.containers.base import Reader
from quantkit.system.files import clear_errors, read_json

RECORD = "quantkit.json"
"""Name of the file."""


@dataclass
class Record:
    """What the file says.

    Attributes:
        version: of quantkit.
        format: name in the registry of formats.
        files: names of all files of the checkpoint, this one included.
        tensors: SHA-256 of every tensor's bytes, by its name in the files.
        key: what decided the result; empty for a model that was saved as it was.
        run: JSON-able facts of the run, for its result.
    """

    version: str
    format: str
    files: list[str]
    tensors: dict[str, Sha256]
    key: dict[str, str] = field(default_factory=dict)
    run: dict[str, Any] = field(default_factory=dict)

    def text(self) -> str:
        """Return the content of the file."""
        return json.dumps(asdict(self), indent=1, ensure_ascii=False, allow_nan=False) + "\n"

    def differs(self, key: Key, ignore: tuple[str, ...] = ()) -> list[str]:
        """Return what a run with ``key`` would do otherwise, in words."""
        topics = sorted({*key, *self.key} - set(ignore))
        pairs = [(topic, self.key.get(topic, "none"), key.get(topic, "none")) for topic in topics]
        return [
            topic if _DIGEST.fullmatch(there) or _DIGEST.fullmatch(here) else f"{topic} (there {there}, here {here})"
            for topic, there, here in pairs
            if there != here
        ]


_RECORDS = TypeAdapter(Record)
_DIGEST = re.compile("[0-9a-f]{64}")  # says nothing to a reader


def read_record(path: Path) -> Record | None:
    """Return what is noted beside a checkpoint; None if nothing is.

    Raises:
        FormatError: the file is damaged.
    """
    file = path / RECORD
    with clear_errors(f"read {file}"):
        if not file.is_file():
            return None
    try:
        return _RECORDS.validate_python(read_json(file))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise FormatError(f"{file} is damaged ({where}: {first['msg']}); copy it again, or delete it") from None


def tensor_sums(reader: Reader) -> dict[str, str]:
    """Return the SHA-256 of every tensor of a checkpoint, by name."""
    found = {}
    for name, digest in sums((name, reader.read(name, copy=False)) for name in sorted(reader.headers)):
        found[name] = digest
        reader.release()
    reader.release()
    return found


def check_sums(path: Path, reader: Reader) -> None:
    """Compare every tensor with its checksum.

    Raises:
        FormatError: one differs, is missing or is new, or there are no checksums.
    """
    record = read_record(path)
    if record is None:
        raise FormatError(
            f"{path} cannot be verified: it has no {RECORD} with checksums, it was written by something else; "
            "load it without verify, or quantize the float model again"
        )
    found = tensor_sums(reader)
    wrong = sorted(name for name in {*found, *record.tensors} if found.get(name) != record.tensors.get(name))
    if wrong:
        more = f" (and {len(wrong) - 1} more tensors)" if len(wrong) > 1 else ""
        raise FormatError(f"{path}: {wrong[0]}{more} does not have the checksum in {RECORD}; copy the checkpoint again")


def matches(key: Mapping[str, str], record: Record, ignore: tuple[str, ...]) -> bool:
    """Say whether a checkpoint is what a run with ``key`` would write."""
    return bool(record.key) and not record.differs(key, ignore)
