"""The vocabulary of a GGUF file, from the tokenizer.json that lies beside it.

llama.cpp has the way in which text is cut before merges apply in its code, under a name (``tokenizer.ggml.pre``); a wrong name
gives other tokens and no error. It is found here by what tokenizer.json says of that step: its regular expressions. A tokenizer
that says something else is refused. Merges, special tokens and the chat template are read by the ``gguf`` package.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from quantkit.errors import FormatError
from quantkit.formats.gguf.file import package
from quantkit.system.files import read_json

_CL100K: Final = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_GPT2: Final = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

PRE_TOKENIZERS: Final[dict[tuple[str, ...], str]] = {
    (_GPT2,): "gpt-2",
    ("digits", _GPT2): "smollm",
    (_CL100K % "{1,3}",): "llama-bpe",
    (_CL100K % "",): "qwen2",
}
"""What text is split by, one after the other, to llama.cpp's name of it."""

_BYTES: Final = "ByteLevel"


def pre_tokenizer(tokenizer: Mapping[str, Any]) -> str:
    """Return llama.cpp's name for the way a tokenizer splits text.

    Args:
        tokenizer: what tokenizer.json says.

    Raises:
        FormatError: it is no byte-level BPE, or splits in a way that is not known here.
    """
    model = tokenizer.get("model")
    kind = model.get("type") if isinstance(model, Mapping) else None
    if kind != "BPE" or (isinstance(model, Mapping) and model.get("byte_fallback")):
        raise FormatError(f"tokenizer.json: a tokenizer of kind {kind} is not written into a GGUF file, only byte-level BPE")
    normalizer = tokenizer.get("normalizer")
    if normalizer is not None and normalizer.get("type") != "NFC":  # which llama.cpp leaves out for all, and text has mostly
        raise FormatError(f"tokenizer.json: normalizer {normalizer.get('type')} is not written into a GGUF file")
    steps = tuple(_steps(tokenizer.get("pre_tokenizer")))
    if steps not in PRE_TOKENIZERS:
        known = ", ".join(PRE_TOKENIZERS.values())
        raise FormatError(f"tokenizer.json: text is split by {' then '.join(steps)[:200]!r}, which is none of {known}")
    return PRE_TOKENIZERS[steps]


def _steps(step: Any) -> Iterator[str]:
    """Yield what text is split by."""
    said = step if isinstance(step, Mapping) else {}
    kind, pattern = said.get("type"), said.get("pattern")
    if kind == "Sequence":
        for one in said.get("pretokenizers", []):
            yield from _steps(one)
    elif kind == "Split" and pattern and said.get("behavior") == "Isolated" and not said.get("invert"):
        yield str(pattern.get("Regex") or pattern.get("String"))
    elif kind == "Digits" and said.get("individual_digits"):
        yield "digits"
    elif kind != _BYTES or said.get("add_prefix_space"):
        yield str(step)
    elif said.get("use_regex", True):
        yield _GPT2


def add_tokenizer(writer: Any, path: Path, size: int) -> None:
    """Write the vocabulary, special tokens and chat template of a directory; nothing but its size where it has no tokenizer.

    Args:
        writer: a ``gguf.GGUFWriter``.
        path: the directory.
        size: rows of the embedding.

    Raises:
        FormatError: see :func:`pre_tokenizer`; or more tokens than rows.
    """
    if not (path / "tokenizer.json").is_file():
        writer.add_tokenizer_model("no_vocab")
        return
    gguf, tokenizer = package(), read_json(path / "tokenizer.json")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer(tokenizer))
    kinds = gguf.TokenType
    tokens, types = [f"[PAD{index}]" for index in range(size)], [kinds.UNUSED] * size
    entries = [(text, index, kinds.NORMAL) for text, index in tokenizer["model"]["vocab"].items()]
    for one in tokenizer.get("added_tokens") or ():
        entries.append((one["content"], one["id"], kinds.CONTROL if one.get("special") else kinds.USER_DEFINED))
    for text, index, kind in entries:
        if not 0 <= index < size:
            raise FormatError(f"tokenizer.json: token {index} ({text!r}), but the embedding has {size} rows")
        tokens[index], types[index] = text, kind
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    gguf.SpecialVocab(path, load_merges=True, n_vocab=size).add_to_gguf(writer, quiet=True)
