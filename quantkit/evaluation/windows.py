"""Which tokens are scored, and with how much context: the part of a perplexity that papers forget to state.

A text of n tokens is cut into windows of ``length`` tokens that start every ``stride`` tokens. The model sees one window at
a time and knows nothing before it. The window at the start of the text scores all its tokens; every later one scores only
its last ``stride`` tokens, so no token is scored twice, however the windows overlap:

    text      a b c d e f g h          length 4, stride 2, no BOS
    window 0  a B C D                  upper case = scored; ``a`` has no context and cannot be
    window 1      c d E F
    window 2          e f G H

With ``stride == length`` (the default) windows do not overlap and a token has between 1 and length - 1 tokens of context;
a smaller stride gives every scored token at least ``length - stride`` and costs ``length / stride`` times as much. With a
BOS token, each window begins with it, the length includes it, and the first token of the text is scored too.

Perplexities are comparable only if length, stride, BOS and text agree; :class:`Protocol` carries all of them.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.calibrate.data import Batch
from quantkit.errors import CalibrationError


@dataclass(frozen=True, slots=True)
class Windows:
    """Token windows and the positions in them that count.

    Attributes:
        ids: int64 (windows, length); a padded tail may hold any valid token, causal models cannot see it.
        scored: bool (windows, length); True where the token is predicted from the position before it and counted.
        stride: tokens between the starts of neighbouring windows; 0 when the windows came ready-made.
        bos: every window starts with a BOS token.
        available: windows the text would have given; ``len(self)`` of them are spread evenly over it.
    """

    ids: Tensor
    scored: Tensor
    stride: int = 0
    bos: bool = False
    available: int = 0

    def __post_init__(self) -> None:
        if self.ids.ndim != 2 or self.ids.shape != self.scored.shape or self.ids.dtype != torch.int64:
            raise CalibrationError(
                f"windows: ids {self.ids.dtype} {tuple(self.ids.shape)} and scored {tuple(self.scored.shape)}; "
                "want int64 (windows, length) and bool of the same shape"
            )
        if self.scored[:, :1].any():
            raise CalibrationError("windows: position 0 is marked as scored, but nothing predicts it; clear scored[:, 0]")
        if not self.scored.any():
            raise CalibrationError("windows: no token is scored; give longer text, longer windows or a mask that keeps more")

    def __len__(self) -> int:
        return self.ids.shape[0]

    @property
    def length(self) -> int:
        """Tokens of one window, BOS included."""
        return self.ids.shape[1]

    @property
    def tokens(self) -> int:
        """Scored tokens."""
        return int(self.scored.sum())

    def first(self, count: int) -> "Windows":
        """Return the first ``count`` windows."""
        return Windows(self.ids[:count], self.scored[:count], self.stride, self.bos, self.available)

    def fingerprint(self) -> str:
        """Return a SHA-256 over the ids and the scored positions: equal fingerprints mean equal data."""
        digest = hashlib.sha256(repr(tuple(self.ids.shape)).encode())
        digest.update(self.ids.cpu().numpy().astype("<i8").tobytes())
        digest.update(self.scored.cpu().numpy().astype("u1").tobytes())
        return digest.hexdigest()


def cut_windows(
    tokens: Tensor, *, length: int, count: int | None = None, stride: int | None = None, bos_id: int | None = None
) -> Windows:
    """Cut one long text into windows.

    Args:
        tokens: int64 (n,), without special tokens.
        length: tokens the model sees at once, BOS included.
        count: windows to keep, spread evenly over the text with the first and the last among them; None, or more than
            there are, keeps all.
        stride: tokens between window starts, at most the text part of a window; None means windows that just touch.
        bos_id: token put in front of every window; None for none.

    Raises:
        CalibrationError: for sizes that make no sense or a text shorter than one window. A tail too short for a last
            window is left out.
    """
    body = length - (bos_id is not None)  # tokens of text in a window
    stride = body if stride is None else stride
    if body < 1 or length < 2 or not 1 <= stride <= body:
        raise CalibrationError(f"length={length}, stride={stride}: want length >= 2 and a stride from 1 to {max(body, 1)}")
    if count is not None and count < 1:
        raise CalibrationError(f"windows={count}: want at least 1, or None for all")
    if tokens.ndim != 1 or len(tokens) < body:
        raise CalibrationError(
            f"evaluation text: {tuple(tokens.shape)} tokens, one window of length {length} needs {body}; "
            "give more text or a smaller length"
        )
    available = 1 + (len(tokens) - body) // stride
    kept = available if count is None else min(count, available)
    index = torch.linspace(0, available - 1, kept, dtype=torch.float64).floor().long()
    ids = tokens.to(torch.int64)[index[:, None] * stride + torch.arange(body)]  # (kept, body)
    scored = torch.arange(body).expand(kept, body) >= body - stride
    scored = scored | (index[:, None] == 0)
    if bos_id is None:
        scored[:, 0] = False
    else:
        ids = torch.cat([torch.full((kept, 1), bos_id), ids], 1)
        scored = torch.cat([torch.zeros(kept, 1, dtype=torch.bool), scored], 1)
    return Windows(ids, scored, stride, bos_id is not None, available)


def from_batches(batches: Sequence[Batch]) -> Windows:
    """Turn batches into windows that score every real token after the first of its row; widths may differ."""
    if not batches:
        raise CalibrationError("evaluation data is empty: no batches")
    width = max(batch.ids.shape[1] for batch in batches)
    ids, scored = [], []
    for batch in batches:
        mask = torch.ones_like(batch.ids, dtype=torch.bool) if batch.mask is None else batch.mask.clone()
        mask[:, 0] = False  # padding stands behind the tokens, so a real token's predecessor is real too
        pad = (0, width - batch.ids.shape[1])
        ids.append(torch.nn.functional.pad(batch.ids.cpu(), pad))
        scored.append(torch.nn.functional.pad(mask.cpu(), pad))
    return Windows(torch.cat(ids), torch.cat(scored), available=sum(len(part) for part in ids))
