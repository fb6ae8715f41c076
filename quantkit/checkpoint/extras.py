"""What lies beside the weights: tokenizer, processor, chat template, licence, generation settings.

A model that was loaded from a directory keeps that directory's own files, byte for byte: what a library writes of a tokenizer
is not always what it has read, and a processor's files it does not read at all. Copied is what is on a list of names; weights
of other formats, hidden files, code that was not trusted and whatever a link outside the directory points at stay behind.
"""

import logging
import shutil
import tempfile
from pathlib import Path
from typing import Any, Final

from quantkit.hf.code import runs_own_code
from quantkit.hf.ledger import ledger_of
from quantkit.hf.load import PreTrainedModel, load_tokenizer, read_generation_config
from quantkit.system.files import atomic_path, write_atomic

TOKENIZER: Final = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "*.tiktoken",
    "*.spm",
    "spiece.model",
    "sentencepiece*.model",
    "tekken.json",
    "chat_template.json",
    "*.jinja",
)
OTHERS: Final = (
    "*preprocessor_config.json",
    "*processor_config.json",
    "LICENSE*",
    "LICENCE*",
    "COPYING*",
    "NOTICE*",
    "USE_POLICY*",
)
CODE: Final = ("*.py",)
GENERATION: Final = "generation_config.json"

log = logging.getLogger(__name__)


def write_extras(path: Path, model: PreTrainedModel, tokenizer: Any) -> None:
    """Put everything beside the weights into ``path``.

    Args:
        path: directory of the checkpoint.
        model: its generation settings are written, as its source's own file if they are the same.
        tokenizer: written, as its source's own files if it is the same; None writes none, unless the source has files of one.
    """
    ledger = ledger_of(model)
    source = ledger.path if ledger is not None and ledger.is_source and ledger.path.is_dir() else None
    if source is not None:
        for file in _found(source, OTHERS):
            _copy(file, path)
    if (code := _trusted(model)) is not None:
        for file in _found(code, CODE):
            _copy(file, path)
    if source is not None and (tokenizer is None or _is_the_sources(tokenizer, source)):
        for file in _found(source, TOKENIZER):
            _copy(file, path)
    elif tokenizer is not None:
        tokenizer.save_pretrained(path)
    generation = getattr(model, "generation_config", None)  # a model that cannot generate has none
    if source is not None and (source / GENERATION).is_file() and _same_generation(generation, source):
        _copy(source / GENERATION, path)
    elif generation is not None:
        write_atomic(path / GENERATION, generation.to_json_string(use_diff=True))


def _trusted(model: PreTrainedModel) -> Path | None:
    """Return the directory whose code goes with a model; None if there is none, or if it is not trusted."""
    ledger = ledger_of(model)
    place = ledger.path if ledger is not None else model.config.name_or_path
    trusted = runs_own_code(model) or (ledger is not None and ledger.trusts_code)
    return Path(place) if trusted and place and Path(place).is_dir() else None


def _found(source: Path, patterns: tuple[str, ...]) -> list[Path]:
    """Return the plain files of a directory whose names match, and that are really its own."""
    root = source.resolve()
    roots = [root, *([root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [])]  # the hub's cache has links
    found = []
    for file in sorted({file for pattern in patterns for file in source.glob(pattern) if not file.name.startswith(".")}):
        real = file.resolve()
        if not real.is_file():
            continue
        if not any(real.is_relative_to(one) for one in roots):
            log.warning("%s is not copied: it is a link to a file outside the directory", file)
            continue
        found.append(file)
    return found


def _copy(file: Path, path: Path) -> None:
    with atomic_path(path / file.name) as temporary:
        shutil.copyfile(file, temporary)


def _is_the_sources(tokenizer: Any, source: Path) -> bool:
    """Say whether a tokenizer is the one of a directory, unchanged: whether the two would be written as the same files."""
    own = load_tokenizer(source)
    return own is not None and type(own) is type(tokenizer) and _written(own) == _written(tokenizer)


def _written(tokenizer: Any) -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as directory:
        tokenizer.save_pretrained(directory)
        return {file.name: file.read_bytes() for file in Path(directory).iterdir() if file.is_file()}


def _same_generation(generation: Any, source: Path) -> bool:
    return generation is not None and generation.to_dict() == read_generation_config(source).to_dict()
