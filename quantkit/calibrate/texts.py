"""Texts as a tokenizer wants them: the default text, texts of the user, and what every text begins with in use.

Without data of the user's own there is :func:`text_default`: the language reference that every CPython carries
(``pydoc_data.topics``). It is technical English with code, about 0.4 million characters: enough to calibrate a small
model, too narrow to judge a general one by.

Many models are trained, and run, with a special token before every text (BOS). What their first layers do without it is another
thing: scales calibrated so do not fit the activations in use. So the tokenizer is asked what it puts before a text
(:func:`opening`), and calibration and measurement begin with that, too.
"""

import hashlib
import importlib
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantkit.calibrate.chat import Chat, Passage
from quantkit.calibrate.columns import passages_of
from quantkit.calibrate.sources import read_parts
from quantkit.errors import CalibrationError

Encode = Callable[[str], Sequence[int]]
"""Text to token ids, without special tokens."""

UNCOUNTED = 1 << 40
"""Added to ids of tokens that do not enter statistics, while texts are cut; far above any vocabulary."""

_EVALUATION_SHARE = 48  # of 256: 3/16 of the topics by hash, about a quarter of the text, leave 128 x 512 tokens to calibrate
_RULE = re.compile(r"""\s*([*=\-~^"])\1{2,}\s*""")


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


@dataclass(frozen=True, slots=True)
class Texts:
    """Texts of one source.

    Attributes:
        passages: the texts, none of them blank.
        name: file, folder or dataset without the folders it lies in, or how many rows were given.
        columns: the columns that were read, in order of first use; empty for plain text.
        template: the template conversations went through: ``"tokenizer"``, its name, or its SHA-256; None for plain text.
    """

    passages: list[Passage]
    name: str
    columns: tuple[str, ...] = ()
    template: str | None = None

    def facts(self) -> dict[str, Any]:
        """Return what a checkpoint records of them, for JSON."""
        facts: dict[str, Any] = {"data": self.name, "texts": len(self.passages)}
        if self.columns:
            facts["columns"] = list(self.columns)
        return facts if self.template is None else facts | {"template": self.template}


def read_texts(source: Any, *, column: str | None = None, template: str | None = None, tokenizer: Any = None) -> Texts:
    """Return the texts of a source: files of text, rows of a table, conversations through a chat template.

    Args:
        source: a file, a folder, a dataset's name, or a list; see :func:`quantkit.calibrate.sources.read_parts`.
        column: which column is read, where that is not clear; see :mod:`quantkit.calibrate.columns`.
        template: another chat template than the tokenizer's: its name, a file, or the template itself.
        tokenizer: needed for conversations.

    Raises:
        CalibrationError: nothing there, not readable, not clear which column, or no text in it.
    """
    chat, passages, columns = Chat(tokenizer, template), [], []
    for part in read_parts(source):
        found, read = passages_of(part, column, chat)
        passages += found
        columns += [read] if read else []
    placed = isinstance(source, str | os.PathLike)
    if not passages:
        raise CalibrationError(f"{source if placed else 'the list of texts'}: there is no text in it")
    if not columns and (column is not None or template is not None):
        what = "column" if column is not None else "template"
        raise CalibrationError(f"{what}={column or template!r}: the data is plain text, without columns; leave {what} out")
    name = (Path(source).name if os.path.exists(source) else str(source)) if placed else f"{len(source)} texts"
    chats = any(passage.answers is not None for passage in passages)
    return Texts(passages, name, tuple(dict.fromkeys(columns)), _template_name(chat) if chats else None)


def load_texts(source: Any, *, column: str | None = None, template: str | None = None, tokenizer: Any = None) -> list[str]:
    """Return the texts of a source as strings; arguments and errors as for :func:`read_texts`."""
    return [passage.text for passage in read_texts(source, column=column, template=template, tokenizer=tokenizer).passages]


def _template_name(chat: Chat) -> str:
    used, own = chat.source(), chat.tokenizer.chat_template
    if used is None:
        return "tokenizer"
    return used if isinstance(own, Mapping) and used in own else f"sha256:{hashlib.sha256(used.encode()).hexdigest()}"


def encoder(tokenizer: Any) -> Encode:
    """Return ``tokenizer``'s text -> ids without special tokens, as :func:`token_batches` wants it."""
    return lambda text: tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def opening(tokenizer: Any) -> tuple[int, ...]:
    """Return the ids that ``tokenizer`` puts before every text in use: usually BOS or nothing."""
    probe = "a"
    bare = list(tokenizer(probe, add_special_tokens=False, verbose=False)["input_ids"])
    used = list(tokenizer(probe, verbose=False)["input_ids"])
    starts = (start for start in range(len(used) - len(bare) + 1) if used[start : start + len(bare)] == bare)
    return tuple(used[: next(starts, 0)]) if bare else ()


def chosen_opening(tokenizer: Any, bos: bool | None) -> tuple[int, ...]:
    """Return what windows begin with: as :func:`opening` says (None), with BOS (True), or nothing (False).

    Raises:
        CalibrationError: BOS is wanted of a tokenizer that has none.
    """
    if bos is None:
        return opening(tokenizer)
    if not bos:
        return ()
    token = getattr(tokenizer, "bos_token_id", None)
    if token is None:
        raise CalibrationError("bos=True needs a tokenizer with a BOS token; use bos=False, or None for what it does itself")
    return (token,)


def encode_passages(passages: Sequence[Passage], tokenizer: Any, *, answers_only: bool = False) -> list[Tensor]:
    """Return every passage as int64 ids (tokens,).

    Args:
        passages: texts; the template has written the special tokens of a conversation already.
        tokenizer: whose ids.
        answers_only: mark tokens that are not of the assistant's words: their ids are :data:`UNCOUNTED` larger.

    Raises:
        CalibrationError: half a surrogate pair, a tokenizer that knows none of the text, or, for ``answers_only``, text that is
            no conversation and a tokenizer that does not know where its tokens stand.
    """
    if answers_only:
        encoded = [_encode_answers(passage, tokenizer) for passage in passages]
    else:
        encode = encoder(tokenizer)
        encoded = [encode_one(passage.text, encode, passage.place) for passage in passages]
    _refuse_empty_tokenizer(encoded, tokenizer)
    return encoded


def encode_one(text: str, encode: Encode, place: str) -> Tensor:
    """Return a text as int64 ids (tokens,).

    Raises:
        CalibrationError: the text holds half a surrogate pair, which is no character.
    """
    _refuse_surrogates(text, place)
    return torch.as_tensor(encode(text), dtype=torch.int64).flatten()


def _refuse_surrogates(text: str, place: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise CalibrationError(
            f"{place}: character {error.start} is {text[error.start]!r}, half a surrogate pair, which is no text; mend the data"
        ) from None


def _encode_answers(passage: Passage, tokenizer: Any) -> Tensor:
    """Return a conversation's ids, marked outside of :attr:`Passage.answers`."""
    if passage.answers is None:
        raise CalibrationError(f"{passage.place}: answers_only=True wants conversations, and this is text; leave it out")
    if not getattr(tokenizer, "is_fast", False):
        raise CalibrationError("answers_only=True needs a fast tokenizer, which knows where its tokens stand; leave it out")
    _refuse_surrogates(passage.text, passage.place)
    found = tokenizer(passage.text, add_special_tokens=False, verbose=False, return_offsets_mapping=True)
    spans = found["offset_mapping"]
    outside = [not any(start < last and first < end for first, last in passage.answers) for start, end in spans]
    return torch.as_tensor(found["input_ids"], dtype=torch.int64).flatten() + UNCOUNTED * torch.tensor(outside).long()


def _refuse_empty_tokenizer(encoded: Sequence[Tensor], tokenizer: Any) -> None:
    """Refuse a tokenizer without a vocabulary: libraries make one of a directory that has no tokenizer files."""
    ids = torch.cat(list(encoded)) if encoded else torch.empty(0, dtype=torch.int64)
    unknown = getattr(tokenizer, "unk_token_id", None)
    if not len(ids) or (unknown is not None and bool((ids % UNCOUNTED == unknown).all())):
        raise CalibrationError(
            f"the tokenizer knows nothing of the text (its vocabulary has {len(tokenizer)} tokens): were its files missing "
            "beside the model? pass tokenizer=, or data= as tensors of token ids (B, T)"
        )
