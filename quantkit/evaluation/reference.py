"""Running a model for its logits, and remembering a base model's logits exactly without storing them.

Logits are too big to keep (200 MB per window of 1024 tokens at 49152 words), and storing them rounded would drown a small
KL. What enters the output head is small (2.4 MB per window at width 576), so that is kept and the head is run again: a
third to a fifth of the forward, and the same bits. Whether ``head(kept) == logits`` holds exactly is checked on the first
batch; a model that does more after its head (soft-capped or scaled logits) is run again for every comparison.
"""

import hashlib
import logging
from collections.abc import Callable

import torch
from torch import Tensor, nn

from quantkit.errors import CalibrationError
from quantkit.evaluation.windows import Windows
from quantkit.system.compute import evaluation_mode

logger = logging.getLogger(__name__)

LogitsFunction = Callable[[Tensor], Tensor]
"""ids int64 (B, T) -> logits (B, T, vocabulary)."""


def run_model(model: nn.Module | LogitsFunction, ids: Tensor) -> Tensor:
    """Return logits (B, T, vocabulary) for ``ids`` (B, T): a transformers-style module, or anything that returns logits."""
    if not isinstance(model, nn.Module):
        return model(ids)
    parameter = next(model.parameters(), None)
    ids = ids if parameter is None else ids.to(parameter.device)
    output = model(input_ids=ids, use_cache=False) if hasattr(model, "config") else model(ids)
    logits: Tensor = getattr(output, "logits", output)
    return logits


class BaseLogits:
    """A base model's logits, computed once and reused for several models, bit for bit.

    Args:
        model: a transformers-style model, or any function from ids to logits (which is then called every time).
        max_bytes: bound on what is kept; batches beyond it are computed again.
    """

    def __init__(self, model: nn.Module | LogitsFunction, *, max_bytes: int = 1 << 30) -> None:
        find_head = getattr(model, "get_output_embeddings", None)
        self.max_bytes, self.nbytes = max_bytes, 0
        self._model: nn.Module | LogitsFunction | None = model
        self._head: nn.Module | None = find_head() if find_head is not None else None
        self._kept: dict[tuple[torch.Size, bytes], Tensor] = {}
        self._replays = False if self._head is None else None

    def __call__(self, ids: Tensor) -> Tensor:
        """Return logits (B, T, vocabulary) for ``ids`` (B, T)."""
        key = _key(ids)
        if key in self._kept and self._head is not None:
            with evaluation_mode(self._head):
                logits: Tensor = self._head(self._kept[key])
                return logits
        if self._model is None:
            raise CalibrationError("these windows were not among those the base model saw before it was released")
        with evaluation_mode(self._model):
            if self._head is None or self._replays is False:
                return run_model(self._model, ids)
            entering: list[Tensor] = []
            hook = self._head.register_forward_pre_hook(lambda _, args: entering.append(args[0]))
            try:
                logits = run_model(self._model, ids)
            finally:
                hook.remove()
            self._keep(key, entering, logits)
        return logits

    def release(self, windows: Windows, *, batch_size: int = 1) -> None:
        """Compute all ``windows`` now and let go of the model, so that it may be freed or quantized in place.

        The output head is still used, so it must stay as it is. Later calls must use the same ``batch_size``.

        Raises:
            CalibrationError: if the logits cannot be replayed from the head, or do not fit in ``max_bytes``.
        """
        for ids in torch.split(windows.ids, batch_size):
            self(ids)
            if _key(ids) not in self._kept:
                why = "its windows need more" if self._replays else "it works on its logits after the head"
                raise CalibrationError(
                    f"the base cannot be released: {why} (max_bytes={self.max_bytes}); pass base=model instead"
                )
        self._model = None

    def _keep(self, key: tuple[torch.Size, bytes], entering: list[Tensor], logits: Tensor) -> None:
        if self._replays is None and self._head is not None:
            again = self._head(entering[0]) if len(entering) == 1 else logits[:0]
            self._replays = again.dtype == logits.dtype and torch.equal(again, logits)
            if not self._replays:
                logger.info("the base model works on its logits after the output head; it is run again for every comparison")
        if self._replays and self.nbytes + entering[0].nbytes <= self.max_bytes:
            self._kept[key] = entering[0]
            self.nbytes += entering[0].nbytes


def _key(ids: Tensor) -> tuple[torch.Size, bytes]:
    return ids.shape, hashlib.sha256(ids.cpu().numpy().tobytes()).digest()
