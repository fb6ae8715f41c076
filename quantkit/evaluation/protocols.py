"""Perplexity as papers and other programs measure it, by name, so that numbers can be compared.

Every protocol takes the text as one string, encodes it once, and cuts it into adjacent windows; a rest at the end is left out.

- ``gptq-N`` (2048 in most papers: GPTQ, AWQ, QuIP#, QuaRot): windows of N tokens, every token but the first of each is
  scored. What the tokenizer puts before a text stands before the first window only.
- ``llama.cpp-N`` (512 by default there): windows of N tokens, of which the second half is scored, from position N/2 + 1 on.
  Where the tokenizer begins texts with BOS, the first token of every window is *replaced* by it.

Sources: gptq/opt.py of Frantar et al. (2022, arXiv 2210.17323); tools/perplexity/perplexity.cpp of llama.cpp.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantkit.calibrate.texts import opening, read_texts
from quantkit.errors import CalibrationError
from quantkit.evaluation.windows import Windows

PROTOCOLS = ("gptq-2048", "llama.cpp-512")
"""Names, with the usual lengths; other lengths may follow the dash."""


def protocol_windows(
    name: str, data: Any, tokenizer: Any, positions: int | None, count: int | None = None, **columns: str | None
) -> tuple[Windows, str]:
    """Return the windows of a text by a protocol, and a description of the text.

    Args:
        name: one of :data:`PROTOCOLS`, or with another length.
        data: a file of plain text; or what :func:`~quantkit.calibrate.texts.read_texts` reads, whose texts are joined by empty
            lines; or token ids (n,), with BOS if there is one.
        tokenizer: for text.
        positions: longest window that the model takes; None for any.
        count: score the first windows only, this many; None for all.
        **columns: ``column`` and ``template`` of rows.

    Raises:
        CalibrationError: an unknown name, no text or tokenizer, too little text, or windows that the model cannot take.
    """
    kind, _, digits = name.rpartition("-")
    known = {one.rpartition("-")[0] for one in PROTOCOLS}
    if kind not in known or not digits.isdecimal() or int(digits) < 4:
        raise CalibrationError(
            f"protocol {name!r}: want one of {', '.join(PROTOCOLS)}, or one with another length of 4 or more"
        )
    length = int(digits)
    if positions is not None and length > positions:
        raise CalibrationError(
            f"protocol {name}: windows of {length} tokens, the model takes {positions}; a shorter one gives other numbers: "
            f"choose {kind}-{positions} to have them"
        )
    if data is None:
        raise CalibrationError(
            f"protocol {name}: give the text that others measured with (data), such as WikiText-2's test set"
        )
    tokens, begin, source = _tokens(data, tokenizer, columns)
    available = len(tokens) // length
    if available < 1:
        raise CalibrationError(f"protocol {name}: the text has {len(tokens)} tokens, one window needs {length}; give more text")
    kept = available if count is None else min(count, available)
    ids = tokens[: kept * length].view(kept, length).clone()
    scored = torch.ones_like(ids, dtype=torch.bool)
    scored[:, 0] = False
    if kind == "llama.cpp":
        scored[:, : length // 2 + 1] = False
        if begin:
            ids[:, 0] = begin[0]
    return Windows(ids, scored, length, bool(begin) and kind == "llama.cpp", available), f"{source}, protocol {name}"


def _tokens(data: Any, tokenizer: Any, columns: dict[str, str | None]) -> tuple[Tensor, tuple[int, ...], str]:
    """Return the ids of a text with what the tokenizer puts before it, what that is, and a description of the text."""
    if isinstance(data, Tensor):
        if data.ndim != 1:
            raise CalibrationError(f"protocol: token ids have shape {tuple(data.shape)}; want (n,), the whole text")
        return data.to(torch.int64), opening(tokenizer) if tokenizer is not None else (), "token ids"
    if tokenizer is None:
        raise CalibrationError("text needs a tokenizer: give tokenizer=, or token ids as data")
    if isinstance(data, str | Path) and str(data).endswith((".txt", ".raw", ".md")) and Path(data).is_file():
        text, source = Path(data).read_text(encoding="utf-8"), Path(data).name  # as it is: every character counts
    else:
        texts = read_texts(data, tokenizer=tokenizer, **columns)
        text, source = "\n\n".join(passage.text for passage in texts.passages), texts.name
    begin = opening(tokenizer)
    return torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.int64), begin, source
