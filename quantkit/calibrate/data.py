"""From text to batches of token ids, for calibration and for evaluation.

Two layouts. *Packed*: all texts become one long stream of tokens, cut into windows of ``length``; every row is full and
nothing is padding. *Ragged*: one text per row, padded on the right, with a mask, so that padding never enters a statistic.

Windows are spread over the whole stream rather than taken from its start, because text drifts: a calibration set of the
first pages knows one topic.

Without data of the user's own there is :func:`text_default`: the language reference that every CPython carries
(``pydoc_data.topics``). It is technical English with code, about 0.4 million characters: enough to calibrate a small
model, too narrow to judge a general one by.
"""

import hashlib
import importlib
import logging
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import AfterValidator
from torch import Tensor

from quantkit.errors import CalibrationError
from quantkit.nn.block_calls import stack_by_length
from quantkit.system.settings import AtLeastTwo, Flag, Positive, settings

logger = logging.getLogger(__name__)

Encode = Callable[[str], Sequence[int]]
"""Text to token ids, without special tokens."""

TEXT_SUFFIXES = (".txt", ".md", ".rst")
"""Files that :func:`load_texts` reads from a folder."""

_EVALUATION_SHARE = 48  # of 256: 3/16 of the topics by hash, about a quarter of the text, leave 128 x 512 tokens to calibrate
_RULE = re.compile(r"""\s*([*=\-~^"])\1{2,}\s*""")


@dataclass(frozen=True, slots=True)
class Batch:
    """Token ids for one forward pass.

    Attributes:
        ids: int64 (B, T).
        mask: bool (B, T), True for real tokens, padding on the right; None when every token is real.

    Raises:
        CalibrationError: shapes or dtypes differ from these, a row has no token, or padding stands before a token.
    """

    ids: Tensor
    mask: Tensor | None = None

    def __post_init__(self) -> None:
        if self.ids.ndim != 2 or self.ids.dtype != torch.int64 or not self.ids.numel():
            raise CalibrationError(f"batch ids: {self.ids.dtype} {tuple(self.ids.shape)}, want int64 (B, T), not empty")
        if self.mask is None:
            return
        if self.mask.dtype != torch.bool or self.mask.shape != self.ids.shape:
            raise CalibrationError(f"batch mask: {self.mask.dtype} {tuple(self.mask.shape)}, want bool {tuple(self.ids.shape)}")
        if not self.mask[:, 0].all() or (self.mask[:, 1:] & ~self.mask[:, :-1]).any():
            raise CalibrationError("batch mask: every row must begin with real tokens and end with its padding")

    @property
    def tokens(self) -> int:
        """Number of real tokens."""
        return self.ids.numel() if self.mask is None else int(self.mask.sum())

    def rows(self) -> list[Tensor]:
        """Return each row without its padding, int64 (T_row,)."""
        if self.mask is None:
            return list(self.ids)
        return [row[: int(mask.sum())] for row, mask in zip(self.ids, self.mask, strict=True)]


def text_default() -> tuple[list[str], list[str]]:
    """Return (calibration texts, evaluation texts) from the language reference inside this Python.

    One text per topic. A topic's half depends on a hash of its name alone, so other Python versions, whose wording
    differs, keep the split. Topics repeat parts of each other: every paragraph is kept once, in the alphabetically first
    topic that has it, so no paragraph is in both halves. Underlines of headings are removed. About 272 thousand
    characters to calibrate and 96 thousand to evaluate with Python 3.11; later versions have more.

    Raises:
        CalibrationError: this Python comes without the topics.
    """
    try:
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    except (ImportError, AttributeError) as error:
        raise CalibrationError(
            f"the default text is missing: this Python has no pydoc_data.topics ({error}); "
            "name a text file, a folder or a dataset"
        ) from error
    seen: set[str] = set()
    halves: tuple[list[str], list[str]] = ([], [])
    for name in sorted(topics):
        fresh = []
        for paragraph in _paragraphs(topics[name]):
            words = " ".join(paragraph.split())
            if words not in seen:
                seen.add(words)
                fresh.append(paragraph)
        if fresh:
            evaluates = hashlib.sha256(name.encode()).digest()[0] < _EVALUATION_SHARE
            halves[evaluates].append("\n\n".join(fresh) + "\n")
    return halves


def _paragraphs(text: str) -> list[str]:
    lines = [line.rstrip() for line in text.splitlines()]
    kept = "\n".join(line for line in lines if not _RULE.fullmatch(line))
    return [paragraph.strip("\n") for paragraph in re.split(r"\n{2,}", kept) if paragraph.strip()]


def load_texts(source: str | os.PathLike[str] | Sequence[str]) -> list[str]:
    """Return texts from a list of strings, a text file, a folder of text files, or a ``datasets`` name.

    Args:
        source: a list is taken as it is. A path wins over a name. A folder gives its .txt, .md and .rst files at any depth,
            sorted by path. A name is ``"name[:config[:split[:column]]]"``; parts left empty mean the default config, split
            ``train``, and the column ``text`` or else the only column of strings.

    Raises:
        CalibrationError: nothing there, not UTF-8, no text in it, ``datasets`` not installed or the dataset not reachable.
    """
    if isinstance(source, str | os.PathLike):
        if isinstance(source, str) and ("\n" in source or len(source) > 1000):
            raise CalibrationError(f"{source[:40]!r}...: this looks like text itself; give it in a list: [text]")
        path = Path(source)
        if os.path.isdir(path):
            texts = _read_folder(path)
        elif os.path.exists(path):
            texts = [_read_file(path)]
        elif isinstance(source, str) and path.suffix not in TEXT_SUFFIXES:
            texts = _read_dataset(source)
        else:
            raise CalibrationError(f"{path}: no such file or folder")
    else:
        texts = list(source)
        if not all(isinstance(text, str) for text in texts):
            raise CalibrationError("texts: want a list of strings; use from_ids for token ids")
    texts = [text for text in texts if text.strip()]
    if not texts:
        where = source if isinstance(source, str | os.PathLike) else "the list of texts"
        raise CalibrationError(f"{where}: there is no text in it")
    return texts


def _read_file(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CalibrationError(
            f"{path}: not UTF-8 text (byte {error.start} is {error.object[error.start]:#04x}); convert it first"
        ) from error
    except OSError as error:
        raise CalibrationError(f"{path}: cannot be read: {error.strerror}") from error


def _read_folder(path: Path) -> list[str]:
    files = sorted(
        (f for f in path.rglob("*") if f.suffix in TEXT_SUFFIXES and f.is_file()), key=lambda f: f.relative_to(path).as_posix()
    )
    if not files:
        raise CalibrationError(f"{path}: no {', '.join(TEXT_SUFFIXES)} file in this folder")
    return [_read_file(file) for file in files]


def _read_dataset(source: str) -> list[str]:
    parts = re.split(r":(?![^\[]*\])", source, maxsplit=3)  # a split may hold a slice: train[:1000]
    name, config, split, column = (*parts, "", "", "")[:4]
    try:
        datasets: Any = importlib.import_module("datasets")
    except ImportError as error:
        raise CalibrationError(
            f"{source!r} is neither a file nor a folder, and to read it as a dataset needs `pip install datasets`"
        ) from error
    try:
        rows = datasets.load_dataset(name, config or None, split=split or "train")
    except Exception as error:  # the library raises many kinds; all mean that the data could not be had
        raise CalibrationError(
            f"{source!r} is neither a file nor a folder, and the dataset {name!r} (config {config or 'default'}, split "
            f"{split or 'train'}) could not be loaded: {type(error).__name__}: {error}"
        ) from error
    strings = [key for key, feature in rows.features.items() if getattr(feature, "dtype", None) in ("string", "large_string")]
    chosen = column or ("text" if "text" in strings else strings[0] if len(strings) == 1 else "")
    if chosen not in strings:
        raise CalibrationError(
            f"{source!r}: {f'no text column {column!r}' if column else 'which column is the text is not clear'}; "
            f"columns of strings: {', '.join(strings) or 'none'}; name one as {name}:{config}:{split or 'train'}:<column>"
        )
    return [text for text in rows[chosen] if text]


def encoder(tokenizer: Any) -> Encode:
    """Return ``tokenizer``'s text -> ids without special tokens, as :func:`token_batches` wants it."""
    return lambda text: tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def token_batches(
    texts: Sequence[str],
    encode: Encode,
    *,
    samples: int | None = 128,
    length: int = 512,
    mode: Literal["packed", "ragged"] = "packed",
    batch_size: int = 8,
    shortfall: Literal["error", "warn"] = "error",
) -> list[Batch]:
    """Cut texts into ``samples`` rows of token ids.

    Packed: the texts' tokens, one text after the other, are cut into windows that do not overlap; a last window that is
    not full is left out. Ragged: one text per row, cut off after ``length`` tokens; texts without a token are left out.

    Args:
        texts: see :func:`load_texts` and :func:`text_default`.
        encode: text to token ids, without special tokens; see :func:`encoder`.
        samples: number of rows, spread evenly over those there are, in their order; None takes all.
        length: tokens per row (packed), or at most so many (ragged).
        batch_size: rows per batch; the last may be smaller.
        shortfall: with fewer rows than ``samples``: an error, or a warning in the log and all there are.

    Raises:
        CalibrationError: no text, too little of it (says how much there is and how much would be enough), or an argument
            out of range.
    """
    _check_cut(samples, length, mode, batch_size, shortfall)
    encoded = [torch.as_tensor(encode(text), dtype=torch.int64).flatten() for text in texts]
    tokens = sum(len(ids) for ids in encoded)
    if mode == "packed":
        stream = torch.cat(encoded) if encoded else torch.empty(0, dtype=torch.int64)
        rows = list(stream[: tokens // length * length].view(-1, length))
    else:
        rows = [ids[:length] for ids in encoded if len(ids)]
    if not rows or (samples is not None and len(rows) < samples):
        message = _too_short(len(texts), tokens, len(rows), samples or 1, length, mode)
        if shortfall == "error" or not rows:
            raise CalibrationError(message)
        logger.warning("%s; going on with the %d there are", message, len(rows))
    count = min(samples or len(rows), len(rows))
    return from_ids([rows[i * len(rows) // count] for i in range(count)], batch_size=batch_size)


def from_ids(rows: Iterable[Sequence[int] | Tensor], *, batch_size: int = 8, pad_id: int = 0) -> list[Batch]:
    """Return batches of rows that are token ids already, in their order.

    Args:
        rows: ids of one row each, (T,) integers; rows may differ in length.
        batch_size: rows per batch; the last may be smaller.
        pad_id: what stands where the mask is False; any id the model knows.

    Raises:
        CalibrationError: no row, an empty row, or ids that are not integers.
    """
    tensors = [torch.as_tensor(row) for row in rows]
    if not tensors:
        raise CalibrationError("there is no row of token ids; give at least one")
    for i, row in enumerate(tensors):
        if row.ndim != 1 or not len(row) or row.is_floating_point() or row.dtype == torch.bool:
            raise CalibrationError(f"row {i} of token ids: {row.dtype} {tuple(row.shape)}, want integers (T,), not empty")
    batches = []
    for start in range(0, len(tensors), batch_size):
        part = [row.to(torch.int64) for row in tensors[start : start + batch_size]]
        lengths = torch.tensor([len(row) for row in part])
        ids = torch.nn.utils.rnn.pad_sequence(part, batch_first=True, padding_value=pad_id)
        mask = torch.arange(ids.shape[1]) < lengths[:, None]
        batches.append(Batch(ids, None if bool(mask.all()) else mask))
    return batches


def fingerprint(batches: Iterable[Batch]) -> str:
    """Return a sha256 over the real tokens, row by row: the same rows give the same however they are batched and padded."""
    digest = hashlib.sha256()
    for batch in batches:
        for row in batch.rows():
            digest.update(len(row).to_bytes(8, "little"))
            digest.update(row.cpu().numpy().astype("<i8").tobytes())
    return digest.hexdigest()


def _too_short(texts: int, tokens: int, rows: int, samples: int, length: int, mode: str) -> str:
    if mode == "ragged":
        return (
            f"{samples} rows need {samples} texts with tokens, there are {rows} among {texts}; use more text or fewer samples"
        )
    fewer = f"samples={rows}" if rows else "no whole window fits"
    shorter = f"length={tokens // samples}" if tokens // samples > 0 else "no length is short enough"
    return (
        f"{samples} windows of {length} tokens need {samples * length} tokens, the {texts} text(s) have {tokens}; "
        f"use more text, fewer samples ({fewer}) or shorter windows ({shorter})"
    )


def _check_cut(samples: int | None, length: int, mode: str, batch_size: int, shortfall: str) -> None:
    checks = [
        ("samples", samples, samples is None or samples >= 1, "at least 1, or None for all"),
        ("length", length, length >= 1, "at least 1 token"),
        ("mode", mode, mode in ("packed", "ragged"), "'packed' or 'ragged'"),
        ("batch_size", batch_size, batch_size >= 1, "at least 1"),
        ("shortfall", shortfall, shortfall in ("error", "warn"), "'error' or 'warn'"),
    ]
    for name, value, good, want in checks:
        if not good:
            raise CalibrationError(f"{name}={value!r}: want {want}")


def _check_data(data: Any) -> Any:
    if isinstance(data, bool | int | float | Mapping):
        raise ValueError("want a file, folder, dataset name, list of texts, or batches of token ids")
    return data


@settings(CalibrationError)
class Calibration:
    """Which text calibrates: ``samples`` windows of ``length`` tokens of ``data``, run ``batch_size`` at a time.

    Args:
        data: see :func:`quantkit.calibrate.data.load_texts`; a list of batches or of int64 tensors (B, T) is used as it is;
            None is the text that every Python carries.
        samples: number of windows (packed) or of texts (ragged).
        length: tokens per window, or the longest a text may be.
        batch_size: windows per forward.
        mode: ``"packed"`` (one stream cut in windows) or ``"ragged"`` (one text per row; rows of equal length run together,
            so there is never any padding).
        statistics: from :func:`quantkit.collect` or a file of :func:`quantkit.save_statistics`, used instead of text; layers
            then do not see the rounding of those before them.
        all_experts: let every expert of a mixture see every token while statistics are taken, not only those the router sends
            to it: no expert is left without, at the cost of running all of them. The model computes what it always computes.

    Raises:
        CalibrationError: a value of the wrong type or out of range.
    """

    data: Annotated[Any, AfterValidator(_check_data)] = None
    samples: Positive = 128
    length: AtLeastTwo = 512
    batch_size: Positive = 8
    mode: Literal["packed", "ragged"] = "packed"
    statistics: Any = None
    all_experts: Flag = False

    def batches(self, tokenizer: Any) -> list[Batch]:
        """Tokenize and cut the text.

        Raises:
            CalibrationError: if there is no tokenizer for text, or too little text.
        """
        if isinstance(self.data, Sequence) and self.data and isinstance(self.data[0], Batch | Tensor):
            return [item if isinstance(item, Batch) else Batch(item, None) for item in self.data]
        if tokenizer is None:
            raise CalibrationError(
                "calibration text needs a tokenizer; pass tokenizer=, or data= as tensors of token ids (B, T)"
            )
        texts = text_default()[0] if self.data is None else load_texts(self.data)
        return token_batches(
            texts,
            encoder(tokenizer),
            samples=self.samples,
            length=self.length,
            batch_size=self.batch_size,
            mode=self.mode,
            shortfall="warn" if self.data is None else "error",
        )


def unpadded(batches: Sequence[Batch]) -> list[Tensor]:
    """Return the batches as int64 ids (B, T) without padding: rows of equal length together, in order of first appearance.

    Running sequences without padding keeps it out of every statistic, wherever in a block it is taken.
    """
    return [ids for batch in batches for ids in stack_by_length(batch.rows())]
