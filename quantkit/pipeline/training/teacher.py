"""What the float model predicts, for a model that is trained towards it: asked in every step, or once and kept.

A float model that runs beside every update costs a forward each time and stays in memory. If the text is seen more than once,
or a run may be interrupted, its predictions can be stored instead: of every token the K likeliest next ones with their log
probabilities, and the probability of all others together (:func:`quantkit.numerics.divergence.bucket_divergence_gradient`).

    training/teacher/part-00003.safetensors   windows 24 to 31: tokens.<n> int32 (T, K), log_p.<n> float32 (T, K),
                                              log_rest.<n> float32 (T,); n counts the windows of the part

A part is wholly there or not at all. It says which run it belongs to and the digest of what it holds; one that belongs to
another run, or whose digest differs, is made again. Size: 8 K + 4 bytes a token.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from quantkit.calibrate.chain import relative_distance
from quantkit.checkpoint.digests import digest_of
from quantkit.errors import CalibrationError
from quantkit.kernels.functions.learning import divergence_gradient
from quantkit.nn.hooks import inputs_of, outputs_of
from quantkit.numerics.divergence import bucket_divergence_gradient
from quantkit.system.compute import evaluation_mode
from quantkit.system.files import clear_errors
from quantkit.system.progress import Progress, ProgressCallback, ignore
from quantkit.system.tensors import write_tensors

PART_WINDOWS = 8
"""Windows in a file: what a killed run loses at most."""
PATTERN = "part-*.safetensors"
_ANOTHER_STREAM = 1.0
"""Relative squared distance of two streams: a rotated one is at 2, one behind embeddings of 2 bits far below 1."""
_NAMES = ("tokens", "log_p", "log_rest")


class Teacher(Protocol):
    """What a model is trained towards."""

    def divergence(self, logits: Tensor, ids: Tensor) -> tuple[float, Tensor, list[Tensor]]:
        """Compare a model's predictions with the teacher's.

        Args:
            logits: floating (B T, V), the model's, of windows ``ids`` (B, T).
            ids: token ids.

        Returns:
            The summed divergence in nats, its gradient by ``logits``, and the outputs (B, T, H) of the teacher's blocks if they
            are asked for.
        """


class Live:
    """The float model, run whenever it is asked.

    Args:
        model: the float model, in the dtype of the products.
        blocks: paths of the blocks whose outputs are wanted.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[str] = ()) -> None:
        self.model, self.blocks = model, tuple(blocks)

    def divergence(self, logits: Tensor, ids: Tensor) -> tuple[float, Tensor, list[Tensor]]:
        """Run the float model, and compare."""
        with torch.no_grad(), outputs_of(self.model, self.blocks) as outputs:
            wanted = self.model(input_ids=ids, use_cache=False).logits.to(logits.dtype).flatten(0, 1)
        return *divergence_gradient(logits, wanted), outputs


class Stored:
    """Predictions of the float model for windows (T,), made once.

    Args:
        windows: token ids; others cannot be asked for.
        top_k: likeliest tokens that are kept, at most the vocabulary.
        folder: where parts lie; None keeps them in memory.
        key: what decides the predictions, beside the windows and ``top_k``.
    """

    def __init__(
        self, windows: Sequence[Tensor], top_k: int, folder: Path | None = None, key: Mapping[str, Any] | None = None
    ) -> None:
        self.windows, self.top_k, self.folder = list(windows), top_k, folder
        self._places = {_name_of(row): number for number, row in enumerate(self.windows)}
        self._held: dict[int, dict[str, Tensor]] = {}
        text = json.dumps({"key": dict(key or {}), "top_k": top_k, "windows": list(self._places)}, sort_keys=True, default=str)
        self._run = hashlib.sha256(text.encode()).hexdigest()

    def missing(self) -> list[int]:
        """Return the numbers of the parts that are not there yet, after reading those that are."""
        parts = range(-(-len(self.windows) // PART_WINDOWS))
        return [part for part in parts if not (part in self._held if self.folder is None else self._is_whole(part))]

    @torch.no_grad()
    def make(self, model: nn.Module, progress: ProgressCallback = ignore) -> None:
        """Run the float model over the windows of the parts that are missing."""
        missing = self.missing()
        if self.folder is not None:
            with clear_errors(f"write to {self.folder}"):
                self.folder.mkdir(parents=True, exist_ok=True)
        for count, part in enumerate(missing):
            tensors: dict[str, Tensor] = {}
            for n, row in enumerate(self.windows[part * PART_WINDOWS : (part + 1) * PART_WINDOWS]):
                log_p = model(input_ids=row.unsqueeze(0), use_cache=False).logits[0].float().log_softmax(-1)
                tensors |= {f"{name}.{n}": value for name, value in zip(_NAMES, _likeliest(log_p, self.top_k), strict=True)}
            self._keep(part, tensors)
            progress(Progress("teacher", count + 1, len(missing), f"windows of {model.__class__.__name__}"))

    def divergence(self, logits: Tensor, ids: Tensor) -> tuple[float, Tensor, list[Tensor]]:
        """Read what the float model said, and compare."""
        rows = [self._read(self._places[_name_of(row)]) for row in ids]
        tokens, log_p, log_rest = (torch.cat(parts).to(logits.device) for parts in zip(*rows, strict=True))
        return *bucket_divergence_gradient(logits, tokens, log_p, log_rest), []

    def _keep(self, part: int, tensors: dict[str, Tensor]) -> None:
        if self.folder is None:
            self._held[part] = tensors
        else:
            write_tensors(self._file(part), tensors, {"run": self._run, "digest": digest_of(tensors)})

    def _read(self, number: int) -> tuple[Tensor, ...]:
        part, n = divmod(number, PART_WINDOWS)
        if self.folder is None:
            return tuple(self._held[part][f"{name}.{n}"] for name in _NAMES)
        with safe_open(self._file(part), "pt") as file:  # type: ignore[no-untyped-call]
            return tuple(file.get_tensor(f"{name}.{n}") for name in _NAMES)

    def _is_whole(self, part: int) -> bool:
        try:
            with safe_open(self._file(part), "pt") as file:  # type: ignore[no-untyped-call]
                said = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError):
            return False
        return said == {"run": self._run, "digest": digest_of(tensors)}

    def _file(self, part: int) -> Path:
        assert self.folder is not None
        return self.folder / PATTERN.replace("*", f"{part:05d}")


def refuse_another_stream(teacher: nn.Module, model: nn.Module, block: str, ids: Tensor) -> None:
    """Refuse to compare blocks of two models whose hidden states mean something else, as after a rotation.

    Raises:
        CalibrationError: the first ``block`` does not see in ``model`` what it sees in the teacher.
    """
    seen: list[Tensor] = []
    for one in (model, teacher):
        with evaluation_mode(one), inputs_of(one, block) as inputs:
            one(input_ids=ids.unsqueeze(0), use_cache=False)
        seen.append(inputs[0])
    away = relative_distance(seen[:1], seen[1:])
    if away > _ANOTHER_STREAM:
        raise CalibrationError(
            f"hidden: {block} is given another hidden state than in the float model (squared distance {away:.3g} of its size), "
            "as after a rotation, so that blocks cannot be compared; use hidden=0, or begin without the step that rotates"
        )


def stored_bytes(top_k: int, tokens: int) -> int:
    """Return the size of stored predictions."""
    return (8 * top_k + 4) * tokens


def _likeliest(log_p: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return tokens and log probabilities of the likeliest of (T, V), and the log probability of all others together."""
    kept, tokens = log_p.topk(min(top_k, log_p.shape[-1]), -1)
    rest = log_p.scatter(-1, tokens, -torch.inf).logsumexp(-1)
    return tokens.to("cpu", torch.int32), kept.cpu(), rest.cpu()


def _name_of(row: Tensor) -> str:
    return hashlib.sha256(row.cpu().numpy().tobytes()).hexdigest()
