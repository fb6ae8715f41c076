"""Token windows: which tokens of a text are scored, and with how much context. Perplexities depend on both.

A text of n tokens is cut into windows of ``length`` tokens that start every ``stride`` tokens. The model sees one window at a
time, without the text before it. The first window of the text scores all its tokens; later windows score only their last
``stride`` tokens, so no token is scored twice if windows overlap:

    text      a b c d e f g h          length 4, stride 2, no BOS
    window 0  a B C D                  upper case: scored; ``a`` has no context and is not
    window 1      c d E F
    window 2          e f G H

With ``stride == length`` (the default), windows do not overlap, and a token has 1 to length - 1 tokens of context. A smaller
stride gives every scored token after the first window at least ``length - stride`` tokens of context, and takes ``length /
stride`` times as long. With a BOS token, each window starts with it, the length includes it, and the first token is scored too.

Perplexities are comparable only if length, stride, BOS and text are equal; :class:`~quantkit.evaluation.record.Protocol` has
them.
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
    """Token windows and the positions in them that are scored.

    Attributes:
        ids: int64 (windows, length); padding at the end may be any valid token, which causal models do not see.
        scored: bool (windows, length), True where the prediction of the token from those before it is scored.
        stride: tokens between the starts of windows; 0 if the windows were given.
        bos: whether every window starts with a BOS token.
        available: number of windows in the whole text, of which these are spread evenly over it.

    Raises:
        CalibrationError: wrong shapes or dtypes, position 0 is scored, or no token is scored.
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
            raise CalibrationError("windows: position 0 is marked as scored, but it has no context; set scored[:, 0] to False")
        if not self.scored.any():
            raise CalibrationError("windows: no token is scored; give more text, longer windows, or a mask with more tokens")

    def __len__(self) -> int:
        return self.ids.shape[0]

    @property
    def length(self) -> int:
        """Tokens per window, including BOS."""
        return self.ids.shape[1]

    @property
    def tokens(self) -> int:
        """Number of scored tokens."""
        return int(self.scored.sum())

    def first(self, count: int) -> "Windows":
        """Return the first ``count`` windows."""
        return Windows(self.ids[:count], self.scored[:count], self.stride, self.bos, self.available)

    def fingerprint(self) -> str:
        """Return a SHA-256 of the ids and the scored positions; equal fingerprints mean equal data."""
        digest = hashlib.sha256(repr(tuple(self.ids.shape)).encode())
        digest.update(self.ids.cpu().numpy().astype("<i8").tobytes())
        digest.update(self.scored.cpu().numpy().astype("u1").tobytes())
        return digest.hexdigest()


def cut_windows(
    tokens: Tensor,
    *,
    length: int,
    count: int | None = None,
    stride: int | None = None,
    bos_id: int | Sequence[int] | None = None,
) -> Windows:
    """Cut a text into windows. The end of the text is left out if it is shorter than a window.

    Args:
        tokens: int64 (n,), without special tokens.
        length: tokens per window, including BOS.
        count: number of windows to keep, spread evenly over the text, including the first and the last; None, or more than
            there are, keeps all.
        stride: tokens between the starts of windows, at most the text tokens of a window; None for adjacent windows.
        bos_id: token, or several, at the start of every window; None for none.

    Raises:
        CalibrationError: an invalid number, or a text shorter than one window.
    """
    opening = [] if bos_id is None else [bos_id] if isinstance(bos_id, int) else list(bos_id)
    body = length - len(opening)  # tokens of text in a window
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
    if opening:
        ids = torch.cat([torch.tensor(opening).expand(kept, -1), ids], 1)
        scored = torch.cat([torch.zeros(kept, len(opening), dtype=torch.bool), scored], 1)
    else:
        scored[:, 0] = False
    return Windows(ids, scored, stride, bool(opening), available)


def from_batches(batches: Sequence[Batch]) -> Windows:
    """Return windows of batches, possibly of different widths, that score every token after the first of a row except padding.

    Raises:
        CalibrationError: no batches.
    """
    if not batches:
        raise CalibrationError("the evaluation data has no batches; give at least one")
    width = max(batch.ids.shape[1] for batch in batches)
    ids, scored = [], []
    for batch in batches:
        mask = torch.ones_like(batch.ids, dtype=torch.bool) if batch.mask is None else batch.mask.clone()
        mask[:, 0] = False  # padding is at the end, so the predecessor of a token is not padding
        pad = (0, width - batch.ids.shape[1])
        ids.append(torch.nn.functional.pad(batch.ids.cpu(), pad))
        scored.append(torch.nn.functional.pad(mask.cpu(), pad))
    return Windows(torch.cat(ids), torch.cat(scored), available=sum(len(part) for part in ids))
