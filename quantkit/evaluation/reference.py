"""Logits of a model, and logits of a base model that are reproduced exactly without being stored.

Logits are too large to store (200 MB per window of 1024 tokens for a vocabulary of 49152), and rounded logits would hide a
small KL. The input of the output head is much smaller (2.4 MB per window for 576 channels). It is stored, and the head is run
again, which takes a third to a fifth of a forward pass and gives the same bits. On the first batch, ``head(stored) == logits``
is checked for equality; a model that transforms the output of its head (soft-capped or scaled logits) is run again for every
comparison.
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
"""A function from int64 ids (B, T) to logits (B, T, V)."""


def run_model(model: nn.Module | LogitsFunction, ids: Tensor) -> Tensor:
    """Return the logits (B, T, V) of a module in the style of transformers, or of a function, for int64 ``ids`` (B, T)."""
    if not isinstance(model, nn.Module):
        return model(ids)
    parameter = next(model.parameters(), None)
    ids = ids if parameter is None else ids.to(parameter.device)
    output = model(input_ids=ids, use_cache=False) if hasattr(model, "config") else model(ids)
    logits: Tensor = getattr(output, "logits", output)
    return logits


class BaseLogits:
    """Logits of a base model, computed once and reproduced bit for bit for several comparisons.

    Args:
        model: a model in the style of transformers, or a function from ids to logits, which is called every time.
        max_bytes: largest amount of memory for stored inputs of the head; other batches are computed again.

    Attributes:
        nbytes: memory used by stored inputs.
    """

    def __init__(self, model: nn.Module | LogitsFunction, *, max_bytes: int = 1 << 30) -> None:
        find_head = getattr(model, "get_output_embeddings", None)
        self.max_bytes, self.nbytes = max_bytes, 0
        self._model: nn.Module | LogitsFunction | None = model
        self._head: nn.Module | None = find_head() if find_head is not None else None
        self._kept: dict[tuple[torch.Size, bytes], Tensor] = {}
        self._replays = False if self._head is None else None

    @property
    def model(self) -> nn.Module | LogitsFunction | None:
        """The base model; None after :meth:`release`."""
        return self._model

    def __call__(self, ids: Tensor) -> Tensor:
        """Return the logits (B, T, V) for int64 ``ids`` (B, T).

        Raises:
            CalibrationError: the model has been released, and ``ids`` were not among the released windows.
        """
        key = _key(ids)
        if key in self._kept and self._head is not None:
            with evaluation_mode(self._head):
                logits: Tensor = self._head(self._kept[key])
                return logits
        if self._model is None:
            raise CalibrationError(
                "the base model was released, and its logits for these windows are not stored; pass base=model instead"
            )
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
        """Compute all ``windows`` now and drop the model, so that it can be freed or quantized in place.

        The output head is still used and must not change.

        Args:
            windows: windows of later calls.
            batch_size: windows per call, which later calls must use as well.

        Raises:
            CalibrationError: the logits cannot be reproduced from the head, or do not fit in ``max_bytes``.
        """
        for ids in torch.split(windows.ids, batch_size):
            self(ids)
            if _key(ids) not in self._kept:
                why = f"its windows need more than max_bytes={self.max_bytes}"
                why = why if self._replays else "it transforms its logits after the output head"
                raise CalibrationError(f"the base cannot be released: {why}; pass base=model instead")
        self._model = None

    def _keep(self, key: tuple[torch.Size, bytes], entering: list[Tensor], logits: Tensor) -> None:
        if self._replays is None and self._head is not None:
            again = self._head(entering[0]) if len(entering) == 1 else logits[:0]
            self._replays = again.dtype == logits.dtype and torch.equal(again, logits)
            if not self._replays:
                logger.info("the base model transforms its logits after the output head; it is run again for every comparison")
        if self._replays and self.nbytes + entering[0].nbytes <= self.max_bytes:
            self._kept[key] = entering[0]
            self.nbytes += entering[0].nbytes


def _key(ids: Tensor) -> tuple[torch.Size, bytes]:
    return ids.shape, hashlib.sha256(ids.cpu().numpy().tobytes()).digest()
