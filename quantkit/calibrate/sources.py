"""Rows from where a user has them: text files, JSON, JSON lines, CSV, TSV and Parquet, folders that mix them, datasets, lists.

A row is a text, or a mapping of column names to values; which column is the text is decided in
:mod:`quantkit.calibrate.columns`. What a file is says its name (``chat.jsonl``, ``chat.jsonl.gz``); one whose name says nothing
is text, unless it looks like rows, which is an error: calibrating with the raw file would be a silent mistake.
"""

import bz2
import csv
import gzip
import importlib
import io
import json
import lzma
import os
import re
import sys
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantkit.errors import CalibrationError

Row = str | Mapping[str, Any]
"""A text, or the values of a row by the name of their column."""

TEXT_SUFFIXES = (".txt", ".md", ".rst")
"""Files of a folder that are one text each."""

_DECOMPRESS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.decompress,
    ".bz2": bz2.decompress,
    ".xz": lzma.decompress,
}
_ROWS = re.compile(r"[\s\[]*\{")
_WRAPPERS = ("data", "rows", "examples", "train", "instances", "conversations", "items")
"""Keys under which a JSON file may hold its list of rows."""


@dataclass(frozen=True, slots=True)
class Part:
    """Rows of one origin.

    Attributes:
        name: file, dataset or argument, for messages.
        rows: texts or mappings, in order.
        column: the column that the name of a dataset asks for; empty if it asks for none.
    """

    name: str
    rows: Sequence[Row]
    column: str = ""


def read_parts(source: Any) -> list[Part]:
    """Return the rows of a file, a folder, a dataset or a list, one part per file.

    Args:
        source: a path wins over a name. A folder gives its files with a suffix that is known here, at any depth, sorted by
            path. A name is ``"name[:config[:split[:column]]]"`` of the ``datasets`` library; parts left empty mean the default
            config and split ``train``. A list holds texts, or mappings of column names to values.

    Raises:
        CalibrationError: nothing there, not readable, damaged, or neither texts nor rows.
    """
    if isinstance(source, str | os.PathLike):
        return _read_place(source)
    library: Any = sys.modules.get("datasets")  # whoever hands over a dataset has imported it
    if library is not None and isinstance(source, library.Dataset):
        return [_of_dataset("data", source, "")]
    if not isinstance(source, list | tuple):
        raise CalibrationError(f"data is a {type(source).__name__}; want a path, a dataset's name, or a list of texts or rows")
    return [Part("data", _check_rows("data", source))]


def _read_place(source: str | os.PathLike[str]) -> list[Part]:
    if isinstance(source, str) and ("\n" in source or len(source) > 1000):
        raise CalibrationError(f"{source[:40]!r}...: this looks like text itself; give it in a list: [text]")
    path = Path(source)
    if os.path.isdir(path):
        return _read_folder(path)
    if os.path.exists(path):
        return [_read_file(path)]
    named = isinstance(source, str) and _kind(path) is None and not source.startswith((".", "~", "/", "\\")) and source.strip()
    if not named or str(source).partition(":")[0].count("/") > 1:
        raise CalibrationError(f"{path}: no such file or folder")
    return [_read_dataset(str(source))]


def _kind(path: Path) -> str | None:
    """Return the suffix that says what a file is, without that of a compressed one; None for a suffix unknown here."""
    name = path.with_suffix("") if path.suffix.lower() in _DECOMPRESS else path
    suffix = name.suffix.lower()
    return suffix if suffix in _READERS or suffix in TEXT_SUFFIXES else None


def _read_folder(path: Path) -> list[Part]:
    if any((path / name).is_file() for name in ("dataset_info.json", "dataset_dict.json")):  # what save_to_disk leaves
        return [_load_saved(path)]
    known = (file for file in path.rglob("*") if _kind(file) and file.is_file())
    files = sorted(known, key=lambda file: file.relative_to(path).as_posix())
    if not files:
        raise CalibrationError(f"{path}: no {', '.join((*TEXT_SUFFIXES, *_READERS))} file in this folder")
    return [_read_file(file) for file in files]


def _read_file(path: Path) -> Part:
    kind = _kind(path)
    try:
        content = path.read_bytes()
        content = _DECOMPRESS.get(path.suffix.lower(), bytes)(content)
    except OSError as error:
        raise CalibrationError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (EOFError, zlib.error, lzma.LZMAError, ValueError) as error:
        raise CalibrationError(f"{path}: damaged: {error}; compress it again") from error
    if kind in _READERS:
        return Part(str(path), _check_rows(str(path), _READERS[kind](path, content)))
    text = _decode(path, content)
    if _looks_like_rows(text):
        raise CalibrationError(f"{path}: it is named as text and holds JSON; name it .jsonl or .json to have its columns read")
    return Part(str(path), [text])


def _decode(path: Path, content: bytes) -> str:
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise CalibrationError(
            f"{path}: not UTF-8 text (byte {error.start} is {error.object[error.start]:#04x}); convert it first"
        ) from error
    if "\0" in text:
        raise CalibrationError(f"{path}: not UTF-8 text (character {text.index(chr(0))} is NUL); convert it first")
    return text


def _looks_like_rows(text: str) -> bool:
    """Return whether a text begins with a JSON object, or a list that does; what comes after may be damaged."""
    start = _ROWS.match(text)
    if start is None:
        return False
    try:
        return bool(json.JSONDecoder().raw_decode(text, start.end() - 1)[0])
    except (ValueError, RecursionError):
        return False


def _try_json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _parse_json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CalibrationError(f"{where}: not valid JSON: {error}") from error


def _read_lines(path: Path, content: bytes) -> list[Any]:
    lines = enumerate(_decode(path, content).split("\n"), start=1)  # not splitlines: text may hold other separators
    return [_parse_json(line, f"{path}, line {number}") for number, line in lines if line.strip()]


def _read_json(path: Path, content: bytes) -> list[Any]:
    text = _decode(path, content)
    lines = [line for line in text.split("\n") if line.strip()]
    if len(lines) > 1 and _try_json(lines[0]) is not None and isinstance(_try_json(lines[1]), dict | str):
        return _read_lines(path, content)  # JSON lines are often named .json
    found = _parse_json(text, str(path))
    if isinstance(found, dict):
        lists = [key for key in _WRAPPERS if isinstance(found.get(key), list) and found[key]]
        wraps = lists and all(isinstance(row, dict) and not {"role", "from"} & row.keys() for row in found[lists[0]])
        found = found[lists[0]] if wraps else [found]
    if not isinstance(found, list):
        raise CalibrationError(f"{path}: it holds a {type(found).__name__}; want a list of rows, or one row per line")
    return found


def _read_table(path: Path, content: bytes, delimiter: str) -> list[Any]:
    text = _decode(path, content)
    before = csv.field_size_limit(max(len(text) + 1, csv.field_size_limit()))  # a text may be longer than csv's limit
    try:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        head = next(reader, [])
        if len(head) == 1 and (mark := next((one for one in ";\t|," if one in head[0] and one != delimiter), None)):
            raise CalibrationError(
                f"{path}: the first line is one column, {head[0]!r}; its columns seem to be parted by {mark!r}, want "
                f"{delimiter!r}; convert the file, or name it .csv for commas and .tsv for tabs"
            )
        if len(set(head)) < len(head):
            raise CalibrationError(f"{path}: the first line names a column twice ({', '.join(head)}); rename one")
        rows = []
        for values in reader:
            if values and len(values) != len(head):
                raise CalibrationError(
                    f"{path}, line {reader.line_num}: {len(values)} values, the first line names {len(head)} columns "
                    f"({', '.join(head)}); quote values that hold a {'tab' if delimiter != ',' else 'comma'}"
                )
            rows += [dict(zip(head, values, strict=True))] if values else []
    except csv.Error as error:
        raise CalibrationError(f"{path}, line {reader.line_num}: {error}; quote texts, double quotes inside them") from error
    finally:
        csv.field_size_limit(before)
    return rows


def _read_parquet(path: Path, content: bytes) -> list[Any]:
    try:
        parquet: Any = importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise CalibrationError(f"{path}: reading Parquet needs `pip install datasets`, which brings pyarrow") from error
    try:
        return parquet.read_table(io.BytesIO(content)).to_pylist()  # type: ignore[no-any-return]
    except Exception as error:  # pyarrow raises many kinds; all mean a damaged file
        raise CalibrationError(f"{path}: cannot be read as Parquet: {error}") from error


_READERS: dict[str, Callable[[Path, bytes], list[Any]]] = {
    ".jsonl": _read_lines,
    ".ndjson": _read_lines,
    ".json": _read_json,
    ".csv": lambda path, content: _read_table(path, content, ","),
    ".tsv": lambda path, content: _read_table(path, content, "\t"),
    ".parquet": _read_parquet,
}


def _check_rows(name: str, rows: Sequence[Any]) -> list[Row]:
    """Return rows as they are; an error for one that is neither text nor a mapping of names."""
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, str | Mapping) or (isinstance(row, Mapping) and not all(isinstance(key, str) for key in row)):
            hint = "; for token ids give tensors, or use from_ids" if isinstance(row, list | tuple) else ""
            raise CalibrationError(
                f"{name}, row {number} is a {type(row).__name__}; want a list of strings, or of mappings of column names{hint}"
            )
    return list(rows)


def _datasets(why: str) -> Any:
    try:
        return importlib.import_module("datasets")
    except ImportError as error:
        raise CalibrationError(f"{why} needs `pip install datasets`") from error


def _load_saved(path: Path) -> Part:
    library = _datasets(f"{path} is a saved dataset, and to read it")
    try:
        rows = library.load_from_disk(str(path))
    except Exception as error:  # as below
        raise CalibrationError(f"{path}: cannot be read as a saved dataset: {type(error).__name__}: {error}") from error
    if isinstance(rows, Mapping):
        if len(rows) != 1 and "train" not in rows:
            raise CalibrationError(f"{path}: which split is not clear ({', '.join(rows)}); give the folder of one")
        rows = rows["train"] if "train" in rows else next(iter(rows.values()))
    return _of_dataset(str(path), rows, "")


def _read_dataset(source: str) -> Part:
    parts = re.split(r":(?![^\[]*\])", source, maxsplit=3)  # a split may hold a slice: train[:1000]
    name, config, split, column = (*parts, "", "", "")[:4]
    library = _datasets(f"{source!r} is neither a file nor a folder, and to read it as a dataset")
    try:
        rows = library.load_dataset(name, config or None, split=split or "train")
    except Exception as error:  # the library raises many kinds; all mean that the data could not be had
        raise CalibrationError(
            f"{source!r} is neither a file nor a folder, and the dataset {name!r} (config {config or 'default'}, split "
            f"{split or 'train'}) could not be loaded: {type(error).__name__}: {error}"
        ) from error
    return _of_dataset(f"dataset {source}", rows, column)


def _of_dataset(name: str, rows: Any, column: str) -> Part:
    """Return the columns of a dataset that can hold text or conversations; pictures and numbers are not even decoded."""
    features = rows.features
    kept = [
        key
        for key, feature in features.items()
        if isinstance(feature, list | dict)
        or hasattr(feature, "feature")  # a list of a later release
        or getattr(feature, "dtype", None) in ("string", "large_string")
    ]
    return Part(name, list(rows.select_columns(kept)), column)
