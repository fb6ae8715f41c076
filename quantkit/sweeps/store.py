"""What a sweep leaves on the disk, so that it can be killed at any instant and continued to the same table::

    sweep.json                  which model and tokens its rows are about, and which rows there are, in order
    rows/<id>.json              a finished row, with the key of what decides it; written whole or not at all
    rows/<id>.begun             how often a row was begun that is not finished: the least often begun is next
    plans/<digest>.json         what was found for a budget
    statistics-<digest>/        of the float model's inputs, a file per block
    checkpoints/<id>/           models that are kept

One process at a time works there (:func:`quantkit.checkpoint.claim`).
"""

import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from quantkit.checkpoint import Key
from quantkit.checkpoint.state import EXPECTED
from quantkit.errors import FormatError
from quantkit.sweeps.axes import Entry
from quantkit.sweeps.rows import SweepRow
from quantkit.system.files import clear_errors, read_json, write_json
from quantkit.system.lock import NAME

log = logging.getLogger(__name__)

MANIFEST, ROWS, PLANS, CHECKPOINTS, STATISTICS = "sweep.json", "rows", "plans", "checkpoints", "statistics-"
_SWEEP, _ROW = "quantkit.sweep/1", "quantkit.sweep-row/1"


class Store:
    """The directory of a sweep, which this process has claimed or only reads.

    Args:
        path: an existing directory.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def refuse_strangers(self) -> None:
        """Raise what is in the directory that is no sweep.

        Raises:
            FormatError: it holds something else.
        """
        with clear_errors(f"look into {self.path}"):
            names = {one.name for one in self.path.iterdir()} if self.path.is_dir() else set()
        others = sorted(name for name in names - {NAME, ROWS, PLANS} if not name.startswith(STATISTICS))
        if others and MANIFEST not in others:
            raise FormatError(f"{self.path} holds something that is no sweep ({others[0]}); choose another directory")

    def remove(self) -> None:
        """Remove what a sweep left here."""
        with clear_errors(f"remove the sweep in {self.path}"):
            for name in (ROWS, PLANS, CHECKPOINTS, *(one.name for one in self.path.glob(f"{STATISTICS}*"))):
                shutil.rmtree(self.path / name, ignore_errors=True)
            (self.path / MANIFEST).unlink(missing_ok=True)

    def check(self, about: Key, *, overwrite: bool = False) -> None:
        """Make sure that the directory is free for a sweep, or holds one of the same model and tokens.

        Args:
            about: what all rows have in common.
            overwrite: remove another sweep.

        Raises:
            FormatError: it holds a sweep of something else, which the user may still want.
        """
        if not (self.path / MANIFEST).exists():
            return
        if other := _differing(self._read(MANIFEST, _SWEEP).get("about", {}), about):
            self._refuse_other(f"all of it is of another {', '.join(other)}", overwrite)

    def begin(self, about: Key, entries: Sequence[Entry], keys: Sequence[Key], *, overwrite: bool = False) -> None:
        """Record which rows are to be made.

        Args:
            about: what all rows have in common: the model and the tokens they are scored on.
            entries: the rows.
            keys: what decides each.
            overwrite: remove another sweep.

        Raises:
            FormatError: a row that is there was made otherwise.
        """
        for entry, key in zip(entries, keys, strict=True):
            known = self._row(entry)
            if known is not None and (other := _differing(known["key"], key)):
                self._refuse_other(f"row {entry.row.name!r} is of another {', '.join(other)}", overwrite)
        with clear_errors(f"write to {self.path}"):
            (self.path / ROWS).mkdir(exist_ok=True)
        rows = [{"id": entry.id, "row": entry.row.to_dict()} for entry in entries]
        write_json(self.path / MANIFEST, {"schema": _SWEEP, "about": dict(about), "rows": rows})

    def has(self, entry: Entry) -> bool:
        """Say whether the file of a row is there."""
        return self._file(entry.id).exists()

    def finished(self, entry: Entry, key: Key) -> bool:
        """Say whether a row is done, by the same code and versions."""
        known = self._row(entry)
        if known is None or SweepRow.from_dict(known["row"]).status != "done":
            return False
        if known["key"] != dict(key):
            log.warning(
                "%s is measured again: the source code of quantkit or a plug-in, or a version, has changed", entry.row.name
            )
        return bool(known["key"] == dict(key))

    def begun(self, entry: Entry) -> int:
        """Return how often a row was begun without being finished."""
        file = self._begun(entry)
        return int(read_json(file).get("times", 0)) if file.exists() else 0

    def mark_begun(self, entry: Entry) -> None:
        """Record that a row is begun."""
        write_json(self._begun(entry), {"times": self.begun(entry) + 1})

    def write(self, entry: Entry, row: SweepRow, key: Key) -> None:
        """Record a row, done or failed, durably."""
        write_json(self._file(entry.id), {"schema": _ROW, "key": dict(key), "row": row.to_dict()})
        with clear_errors(f"remove {self._begun(entry)}"):
            self._begun(entry).unlink(missing_ok=True)

    def rows(self) -> list[tuple[str, SweepRow]]:
        """Return id and row of every row of the sweep, in order, as far as they are made.

        Raises:
            FormatError: the directory holds no sweep, or a damaged one.
        """
        found = []
        for listed in self._read(MANIFEST, _SWEEP)["rows"]:
            file = self._file(listed["id"])
            data = self._read(f"{ROWS}/{file.name}", _ROW)["row"] if file.exists() else listed["row"]
            row, kept = self._parsed(data, file), self.checkpoint(listed["id"])
            found.append((str(listed["id"]), replace(row, checkpoint=kept if (kept / "config.json").exists() else None)))
        return found

    def checkpoint(self, id: str) -> Path:
        """Return where the model of a row is kept, if it is."""
        return self.path / CHECKPOINTS / id

    def drop_checkpoint(self, id: str) -> None:
        """Remove the model of a row."""
        shutil.rmtree(self.checkpoint(id), ignore_errors=True)

    def _row(self, entry: Entry) -> dict[str, Any] | None:
        file = self._file(entry.id)
        return self._read(f"{ROWS}/{file.name}", _ROW) if file.exists() else None

    def _file(self, id: str) -> Path:
        return self.path / ROWS / f"{id}.json"

    def _begun(self, entry: Entry) -> Path:
        return self.path / ROWS / f"{entry.id}.begun"

    def _read(self, name: str, schema: str) -> dict[str, Any]:
        file = self.path / name
        data = read_json(file)
        if data.get("schema") != schema or not isinstance(data.get("row" if schema == _ROW else "rows"), dict | list):
            raise FormatError(f"{file}: schema is {data.get('schema')!r}, this version reads {schema!r}; delete the file")
        return data

    def _parsed(self, data: dict[str, Any], file: Path) -> SweepRow:
        try:
            return SweepRow.from_dict(data)
        except FormatError as error:
            raise FormatError(f"{file}: not a row of a sweep: {error}; delete it, and the row is measured again") from error

    def _refuse_other(self, why: str, overwrite: bool) -> None:
        if not overwrite:
            raise FormatError(
                f"{self.path} holds another sweep: {why}; choose another directory, or replace it (output: overwrite=True)"
            )
        log.warning("%s held another sweep, which is replaced: %s", self.path, why)
        self.remove()


def _differing(there: Mapping[str, str], here: Key) -> list[str]:
    """Return the topics of two keys that differ, apart from those that nobody asked to change."""
    return sorted(topic for topic in {*there, *here} - {*EXPECTED} if there.get(topic) != here.get(topic))
