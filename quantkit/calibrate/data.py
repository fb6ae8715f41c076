"""From text to batches of token ids, for calibration and for evaluation.

Two layouts. *Packed*: all texts become one long stream of tokens, cut into windows of ``length``; every row is full and
nothing is padding. *Ragged*: one text per row, padded on the right, with a mask, so that padding never enters a statistic.
Either way a row begins with what the model sees before every text in use (:func:`quantkit.calibrate.texts.opening`).

Windows are spread over the whole stream rather than taken from its start, because text drifts: a calibration set of the
first pages knows one topic.
"""

import hashlib
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import AfterValidator, Strict
from torch import Tensor, nn

from quantkit.calibrate.chat import Passage
from quantkit.calibrate.texts import UNCOUNTED, Encode, chosen_opening, encode_one, encode_passages, read_texts, text_default
from quantkit.errors import CalibrationError
from quantkit.nn.block_calls import stack_by_length
from quantkit.nn.embedding import input_table, max_positions
from quantkit.system.settings import AtLeastTwo, Flag, Positive, settings

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Batch:
    """Token ids for one forward pass.

    Attributes:
        ids: int64 (B, T).
        mask: bool (B, T), True for real tokens, padding on the right; None when every token is real.
        counted: bool (B, T), True for tokens whose inputs enter the statistics of layers; None when all real ones do.

    Raises:
        CalibrationError: shapes or dtypes differ from these, a row has no token, or padding stands before a token.
    """

    ids: Tensor
    mask: Tensor | None = None
    counted: Tensor | None = None

    def __post_init__(self) -> None:
        if self.ids.ndim != 2 or self.ids.dtype != torch.int64 or not self.ids.numel():
            raise CalibrationError(f"batch ids: {self.ids.dtype} {tuple(self.ids.shape)}, want int64 (B, T), not empty")
        for name, marks in (("mask", self.mask), ("counted", self.counted)):
            if marks is not None and (marks.dtype != torch.bool or marks.shape != self.ids.shape):
                raise CalibrationError(f"batch {name}: {marks.dtype} {tuple(marks.shape)}, want bool {tuple(self.ids.shape)}")
        if self.mask is None:
            return
        if not self.mask[:, 0].all() or (self.mask[:, 1:] & ~self.mask[:, :-1]).any():
            raise CalibrationError("batch mask: every row must begin with real tokens and end with its padding")

    @property
    def tokens(self) -> int:
        """Number of real tokens."""
        return self.ids.numel() if self.mask is None else int(self.mask.sum())

    def rows(self, of: Tensor | None = None) -> list[Tensor]:
        """Return each row of the ids, or of another tensor (B, T), without its padding: (T_row,)."""
        whole = self.ids if of is None else of
        if self.mask is None:
            return list(whole)
        return [row[: int(mask.sum())] for row, mask in zip(whole, self.mask, strict=True)]


def token_batches(
    texts: Sequence[str],
    encode: Encode,
    *,
    samples: int | None = 128,
    length: int = 512,
    mode: Literal["packed", "ragged"] = "packed",
    batch_size: int = 8,
    shortfall: Literal["error", "warn"] = "error",
    prefix: Sequence[int] = (),
) -> list[Batch]:
    """Cut texts into ``samples`` rows of token ids.

    Packed: the texts' tokens, one text after the other, are cut into windows that do not overlap; a last window that is
    not full is left out. Ragged: one text per row, cut off after ``length`` tokens; texts without a token are left out.

    Args:
        texts: see :func:`quantkit.calibrate.texts.load_texts` and :func:`quantkit.calibrate.texts.text_default`.
        encode: text to token ids, without special tokens; see :func:`quantkit.calibrate.texts.encoder`.
        samples: number of rows, spread evenly over those there are, in their order; None takes all.
        length: tokens per row (packed), or at most so many (ragged).
        batch_size: rows per batch; the last may be smaller.
        shortfall: with fewer rows than ``samples``: an error, or a warning in the log and all there are.
        prefix: ids at the start of every row, which its length includes; see :func:`quantkit.calibrate.texts.opening`.

    Raises:
        CalibrationError: no text, too little of it (says how much there is and how much would be enough), or an argument
            out of range.
    """
    rows = [encode_one(text, encode, f"text {number}") for number, text in enumerate(texts, start=1)]
    return cut_batches(
        rows, samples=samples, length=length, mode=mode, batch_size=batch_size, shortfall=shortfall, prefix=prefix
    )


def cut_batches(
    encoded: Sequence[Tensor],
    *,
    samples: int | None,
    length: int,
    mode: str,
    batch_size: int,
    shortfall: str,
    prefix: Sequence[int] = (),
) -> list[Batch]:
    """Cut encoded texts, as :func:`quantkit.calibrate.texts.encode_passages` returns them; the rest as for
    :func:`token_batches`."""
    _check_cut(samples, length - len(prefix), mode, batch_size, shortfall)
    tokens = sum(len(ids) for ids in encoded)
    start = torch.tensor(prefix, dtype=torch.int64) + UNCOUNTED * any(bool((ids >= UNCOUNTED).any()) for ids in encoded)
    rows = _packed(encoded, length, start) if mode == "packed" else [_opened(ids, length, start) for ids in encoded if len(ids)]
    if not rows or (samples is not None and len(rows) < samples):
        message = _too_short(len(encoded), tokens, len(rows), samples or 1, length, mode)
        if shortfall == "error" or not rows:
            raise CalibrationError(message)
        logger.warning("%s; going on with the %d there are", message, len(rows))
    count = min(samples or len(rows), len(rows))
    chosen = [rows[i * len(rows) // count] for i in range(count)]
    batches = from_ids([row % UNCOUNTED for row in chosen], batch_size=batch_size)
    if all(bool((row < UNCOUNTED).all()) for row in chosen):
        return batches
    counted = from_ids([(row < UNCOUNTED).long() for row in chosen], batch_size=batch_size)
    if not any(bool(marks.ids.any()) for marks in counted):
        raise CalibrationError("answers_only=True: no token of an answer is in the windows; use more samples or longer ones")
    return [Batch(batch.ids, batch.mask, marks.ids.bool()) for batch, marks in zip(batches, counted, strict=True)]


def _opened(ids: Tensor, length: int, start: Tensor) -> Tensor:
    """Return the first ``length`` tokens of a text, which begins with ``start``; a chat template may have put it there."""
    if torch.equal(ids[: len(start)] % UNCOUNTED, start % UNCOUNTED):
        return ids[:length]
    return torch.cat([start, ids[: length - len(start)]])


def _packed(encoded: Sequence[Tensor], length: int, start: Tensor) -> list[Tensor]:
    """Return the windows (length,) of the texts' stream, one after the other, each beginning with ``start``."""
    stream = torch.cat(list(encoded)) if encoded else torch.empty(0, dtype=torch.int64)
    if not len(start):
        return list(stream[: len(stream) // length * length].view(-1, length))
    rows, at = [], 0
    while len(row := _opened(stream[at : at + length], length, start)) == length:
        rows.append(row)
        at += length if torch.equal(row, stream[at : at + length]) else length - len(start)
    return rows


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
        for marks in [] if batch.counted is None else batch.rows(batch.counted):
            digest.update(marks.cpu().numpy().tobytes())
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


def check_fit(batches: Iterable[Batch], model: nn.Module) -> None:
    """Refuse token ids that the model's embedding does not have, and rows longer than its positions, by name.

    Raises:
        CalibrationError: an id or a length out of range.
    """
    known, _ = input_table(model)
    positions = max_positions(model)
    for batch in batches:
        refuse_ids(batch.ids, known)
        if positions is not None and batch.ids.shape[1] > positions:
            raise CalibrationError(
                f"a row of {batch.ids.shape[1]} tokens is longer than the {positions} positions of the model; "
                f"use length={positions}"
            )


def refuse_ids(ids: Tensor, known: int) -> None:
    """Raise CalibrationError for token ids (...) outside 0 to ``known - 1``."""
    low, high = (int(bound) for bound in torch.aminmax(ids))
    if low < 0 or high >= known:
        raise CalibrationError(
            f"token id {high if high >= known else low}: the model's embedding knows ids 0 to {known - 1}; is the tokenizer "
            "another model's? give the one that belongs to this model"
        )


def _check_data(data: Any) -> Any:
    if isinstance(data, bool | int | float | complex | bytes | set | Mapping):
        raise ValueError("want a file, folder, dataset name, list of texts or rows, or batches of token ids")
    return data


@settings(CalibrationError)
class Calibration:
    """Which text calibrates: ``samples`` windows of ``length`` tokens of ``data``, run ``batch_size`` at a time.

    Args:
        data: a file or folder of text, JSON, JSON lines, CSV, TSV or Parquet (also compressed), a name of ``datasets``
            (``"name:config:split:column"``), or a list of texts or of rows (mappings of column names to values); a list of
            batches or of int64 tensors (B, T) is used as it is; None is the text that every Python carries.
        samples: number of windows (packed) or of texts (ragged).
        length: tokens per window, or the longest a text may be.
        batch_size: windows per forward.
        mode: ``"packed"`` (one stream cut in windows) or ``"ragged"`` (one text per row; rows of equal length run together,
            so there is never any padding).
        statistics: from :func:`quantkit.collect` or a file of :func:`quantkit.save_statistics`, used instead of text; layers
            then do not see the rounding of those before them.
        all_experts: let every expert of a mixture see every token while statistics are taken, not only those the router sends
            to it: no expert is left without, at the cost of running all of them. The model computes what it always computes.
        column: which column of rows is read where that is not clear: a text, a list of messages (which goes through the chat
            template), or question and answer joined by ``+`` (``"prompt+response"``).
        template: chat template of conversations instead of the tokenizer's: the name of one of its own, a file, or the
            template itself.
        bos: whether windows begin with the tokenizer's BOS; None does what the tokenizer does itself with a text.
        answers_only: of conversations, only tokens of the assistant's messages enter the statistics of layers; layers of
            experts count every token.

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
    column: Annotated[str, Strict()] | None = None
    template: Annotated[str, Strict()] | None = None
    bos: Flag | None = None
    answers_only: Flag = False

    def batches(self, tokenizer: Any) -> list[Batch]:
        """Tokenize and cut the text; see :meth:`read`."""
        return self.read(tokenizer)[0]

    def read(self, tokenizer: Any) -> tuple[list[Batch], dict[str, Any]]:
        """Tokenize and cut the text.

        Returns:
            The batches, and what a checkpoint records of them beside their fingerprint, for JSON.

        Raises:
            CalibrationError: if there is no tokenizer for text, or too little text.
        """
        if (given := _given_batches(self.data)) is not None:
            return given, {"data": "token ids given"}
        if tokenizer is None:
            raise CalibrationError(
                "calibration text needs a tokenizer; pass tokenizer=, or data= as tensors of token ids (B, T)"
            )
        if self.data is None:
            passages = [Passage(text, "the default text") for text in text_default()[0]]
            facts: dict[str, Any] = {"data": "language reference of Python"}
        else:
            texts = read_texts(self.data, column=self.column, template=self.template, tokenizer=tokenizer)
            passages, facts = texts.passages, texts.facts()
        prefix = chosen_opening(tokenizer, self.bos)
        batches = cut_batches(
            encode_passages(passages, tokenizer, answers_only=self.answers_only),
            samples=self.samples,
            length=self.length,
            batch_size=self.batch_size,
            mode=self.mode,
            shortfall="warn" if self.data is None else "error",
            prefix=prefix,
        )
        shape = {"rows": sum(len(batch.ids) for batch in batches), "length": self.length, "mode": self.mode}
        counted = {"answers_only": True} if self.answers_only else {}
        return batches, {**facts, **shape, "begins_with": list(prefix), **counted}


def _given_batches(data: Any) -> list[Batch] | None:
    """Return data that is token ids already as batches; None for data that is text.

    Raises:
        CalibrationError: a list that is only partly token ids.
    """
    items = [data] if isinstance(data, Batch | Tensor) else data
    if not isinstance(items, list | tuple) or not any(isinstance(item, Batch | Tensor) for item in items):
        return None
    if odd := [item for item in items if not isinstance(item, Batch | Tensor)]:
        raise CalibrationError(
            f"data is a list of token ids with a {type(odd[0]).__name__} in it; want batches or tensors (B, T) only"
        )
    return [item if isinstance(item, Batch) else Batch(item) for item in items]


def unpadded(batches: Sequence[Batch]) -> list[Tensor]:
    """Return the batches as int64 ids (B, T) without padding: rows of equal length together, in order of first appearance.

    Running sequences without padding keeps it out of every statistic, wherever in a block it is taken.
    """
    return [ids for batch in batches for ids in stack_by_length(batch.rows())]


def unpadded_counts(batches: Sequence[Batch]) -> list[Tensor | None]:
    """Return for every tensor of :func:`unpadded` which of its tokens count, bool (B, T); None where all do."""
    found: list[Tensor | None] = []
    for batch in batches:
        none = [None] * len(stack_by_length(batch.rows()))
        found += none if batch.counted is None else stack_by_length(batch.rows(batch.counted))
    return found
