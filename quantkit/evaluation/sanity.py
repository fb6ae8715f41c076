"""The sanity check of a quantized model: a short comparison with the float model that it was made from.

A few windows of held-out text are run through the float model before it is changed, through the quantized model in memory, and
through the checkpoint after it was read back from the disk. This verifies the files and gives a first estimate of the quality;
:func:`quantkit.evaluation.evaluate` gives accurate numbers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from quantkit.calibrate.chat import Passage
from quantkit.calibrate.data import Batch, check_fit, cut_batches
from quantkit.calibrate.texts import chosen_opening, encode_passages, text_default
from quantkit.checkpoint.check import converted_buffers
from quantkit.errors import CalibrationError, FormatError, KernelError
from quantkit.evaluation.quality import score
from quantkit.evaluation.reference import run_model
from quantkit.evaluation.windows import Windows, from_batches
from quantkit.nn.block_calls import running_alone
from quantkit.nn.embedding import input_table, max_positions
from quantkit.nn.install import set_compute
from quantkit.nn.lean import leaving, side_by_side
from quantkit.system.compute import evaluation_mode

WINDOWS, LENGTH = 2, 128
"""Number of windows and tokens per window. The float logits of the windows stay in memory during quantization."""

MAX_RELOAD_KL = 1e-4
"""Largest KL in nats per token between the model in memory and the reloaded checkpoint, which have the same weights."""


@dataclass(frozen=True)
class SanityCheck:
    """Recorded logits of a model.

    Attributes:
        windows: token windows.
        text: description of the text.
        logits: logits (1, T, V) of each window, by its tokens.
        blocks: paths of the blocks that leave memory once they have run (:mod:`quantkit.nn.lean`); of a small model none.
    """

    windows: Windows
    text: str
    logits: Mapping[bytes, Tensor]
    blocks: tuple[str, ...] = ()

    @classmethod
    def start(cls, model: nn.Module, tokenizer: Any, bos: bool | None = None, blocks: Sequence[str] = ()) -> "SanityCheck":
        """Record the logits of ``model`` on held-out text, or on fixed random tokens without a tokenizer.

        Args:
            model: the float model.
            tokenizer: its tokenizer, or None.
            bos: whether windows begin with BOS; None does what the tokenizer does with a text, as the model is used.
            blocks: see the class.
        """
        with leaving(model, blocks):
            windows, text = _windows(model, tokenizer, bos)
        with running_alone(model):
            return cls(windows, text, _logits(model, windows, blocks), tuple(blocks))

    def recorded_of(self, model: nn.Module) -> "SanityCheck":
        """Record the logits of another model on the same windows."""
        return SanityCheck(self.windows, self.text, _logits(model, self.windows, self.blocks), self.blocks)

    def measure(self, other: "SanityCheck") -> dict[str, Any]:
        """Compare another model, recorded on the same windows, with this one.

        Returns:
            A mapping for JSON: text, tokens, kl_mean and kl_p99 (KL(this || other) in nats per token), same_top1 (fraction of
            equal most likely tokens), perplexity, base_perplexity.
        """
        quality = score(other._answer, self.windows, self._answer)
        divergence = quality.divergence
        if divergence is None:
            raise CalibrationError("the sanity check has no windows to compare")
        return {
            "text": self.text,
            "tokens": divergence.tokens,
            "kl_mean": divergence.mean,
            "kl_p99": divergence.p99,
            "same_top1": divergence.same_top1,
            "perplexity": quality.perplexity,
            "base_perplexity": divergence.base_perplexity,
        }

    def check_reloaded(self, in_memory: nn.Module, reloaded: nn.Module) -> float:
        """Return KL(recorded || reloaded) in nats per token; ``in_memory`` is the model that was recorded.

        Raises:
            FormatError: it is larger than :data:`MAX_RELOAD_KL`.
        """
        kl = float(self.measure(self.recorded_of(reloaded))["kl_mean"])
        if not kl <= MAX_RELOAD_KL:
            why = "".join(f"; {text}" for text in converted_buffers(in_memory, reloaded)[:1])
            raise FormatError(
                f"the checkpoint read back differs from the model in memory: KL {kl:.3g}, want <= {MAX_RELOAD_KL:g}{why}"
            )
        return kl

    def cost_of_int8(self, floating: "SanityCheck", model: nn.Module) -> dict[str, Any]:
        """Measure what int8 activations add to a quantized model, whose exact predictions are recorded here.

        Args:
            floating: predictions of the float model on the same windows.
            model: the quantized model, on a CPU; it multiplies exactly before and after.

        Returns:
            A mapping for JSON, as :mod:`quantkit.checkpoint.activations` reads it: kl_mean and kl_p99 (KL(exact || rounded) in
            nats per token), tokens, kl_to_float (KL(float || rounded)), layers (how many round); or the reason why not.
        """
        try:
            layers = set_compute(model, "int8")
            rounded = self.recorded_of(model)
            added, whole = self.measure(rounded), floating.measure(rounded)
        except (KernelError, CalibrationError) as error:
            return {"unmeasured": str(error).partition("\n")[0]}
        finally:
            set_compute(model, "float")
        if not layers:
            return {"unmeasured": "no layer multiplies by a quantized weight"}
        kept = {name: added[name] for name in ("tokens", "kl_mean", "kl_p99")}
        return {**kept, "kl_to_float": whole["kl_mean"], "layers": layers}

    def _answer(self, ids: Tensor) -> Tensor:
        return self.logits[_key(ids)]


def _logits(model: nn.Module, windows: Windows, blocks: Sequence[str]) -> dict[bytes, Tensor]:
    each = windows.ids.split(1)
    with evaluation_mode(model):
        found = side_by_side(model, blocks, [partial(run_model, model, ids) for ids in each])
    return {_key(ids): logits for ids, logits in zip(each, found, strict=True)}


def _key(ids: Tensor) -> bytes:
    return bytes(ids.cpu().numpy().tobytes())


def _windows(model: nn.Module, tokenizer: Any, bos: bool | None) -> tuple[Windows, str]:
    length = min(LENGTH, max_positions(model) or LENGTH)
    if tokenizer is None:
        ids = torch.randint(_vocabulary(model), (WINDOWS, length), generator=torch.Generator().manual_seed(0))
        return from_batches([Batch(ids, None)]), "random tokens"
    batches = cut_batches(
        encode_passages([Passage(text, "the default text") for text in text_default()[1]], tokenizer),
        samples=WINDOWS,
        length=length,
        mode="packed",
        batch_size=WINDOWS,
        shortfall="error",
        prefix=chosen_opening(tokenizer, bos),
    )
    check_fit(batches, model)
    return from_batches(batches), "held-out Python documentation"


def _vocabulary(model: nn.Module) -> int:
    """Return how many tokens a model both reads and predicts; some embed tokens, as those of images, that none predicts."""
    with evaluation_mode(model), running_alone(model):
        predicted = run_model(model, torch.zeros(1, 1, dtype=torch.int64)).shape[-1]
    return min(input_table(model)[0], predicted)
