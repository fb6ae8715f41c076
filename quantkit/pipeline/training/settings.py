"""What :func:`quantkit.train` is told beside model and scheme: how long, how fast, towards what."""

from typing import Annotated, Literal

import torch
from pydantic import Field, Strict
from pydantic_core import PydanticCustomError

from quantkit.errors import CalibrationError
from quantkit.system.settings import Flag, Positive, settings

START_WINDOWS = 128
"""Windows, of those that are trained on, that the start is calibrated with: more cost time and hardly make it better."""

Rate = Annotated[float, Field(gt=0, lt=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Strict(), Field(ge=0, le=10**9)]


@settings(CalibrationError)
class Training:
    """How a model is trained behind its rounding.

    Every step takes ``windows`` windows of the text, one round through it after the other, each in another order. AdamW
    (Loshchilov, Hutter 2019, arXiv 1711.05101); rates rise over the first ``warm_steps`` and then fall along half a cosine.

    Args:
        steps: updates.
        windows: windows of text per update, whose gradients are added up.
        together: windows per forward; more are a little faster and take more memory.
        rate: highest learning rate of weights, in steps of their grid: an update moves a weight by about so much of the mean
            step of its layer.
        scale_rate: the same of scales, relative to the mean scale of their layer.
        weight_decay: of weights; scales have none.
        warm_steps: updates until the highest rate.
        clip: largest norm of all gradients together; larger ones are scaled down to it. 0 never does.
        loss: ``"distill"``: the KL divergence from the float model's predictions; ``"next-token"``: the text's own tokens;
            ``"mixed"``: both.
        mix: share of the next token in a mixed loss.
        hidden: share of the loss that is the distance of every block's output from the float model's, relative to its size.
        teacher: ``"live"``: the float model runs beside every update; ``"stored"``: it runs once over the windows, and its
            ``top_k`` likeliest tokens are kept on the disk. Later rounds through the text, and continued runs, do not need it.
        top_k: tokens that are kept of a stored prediction; all others count as one. 8 bytes each.
        share: see :func:`quantkit.prepare`.
        learn_zero: learn zero points, too.
        adapters: rank of low-rank changes that are learned in place of weights, which stay frozen; 0 learns weights. They are
            folded in before rounding, and only they and scales have an optimizer's state.
        block_steps: updates of every block against the float model's, before the first update of the whole; 0 for none.
        evaluate_every: updates between two evaluations on windows that are not trained on; the best is kept.
        held_out: so many windows of the text are only evaluated on.
        patience: stop after so many evaluations without a better one; 0 never does.
        save_every_s: seconds between two states on the disk, from which an interrupted run goes on.
        dtype: of everything but the trained weights; ``"auto"`` is bfloat16 where the processor multiplies it natively.
        seed: decides the order of the windows.

    Raises:
        CalibrationError: a value of the wrong type or out of range.
    """

    steps: Positive = 200
    windows: Positive = 4
    together: Positive = 1
    rate: Rate = 0.01
    scale_rate: Rate = 0.002
    weight_decay: Share = 0.0
    warm_steps: Count = 10
    clip: Annotated[float, Field(ge=0)] = 1.0
    loss: Literal["distill", "next-token", "mixed"] = "distill"
    mix: Share = 0.5
    hidden: Annotated[float, Field(ge=0, lt=1)] = 0.0
    teacher: Literal["live", "stored"] = "live"
    top_k: Positive = 128
    share: Share = 0.5
    learn_zero: Flag = False
    adapters: Count = 0
    block_steps: Count = 0
    evaluate_every: Positive = 25
    held_out: Positive = 4
    patience: Count = 0
    save_every_s: Annotated[float, Field(ge=0)] = 120.0
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    seed: Annotated[int, Strict()] = 0

    def __post_init__(self) -> None:
        if self.teacher == "stored" and self.hidden:
            raise PydanticCustomError(
                "teacher",
                "hidden={h} with teacher='stored': outputs of blocks are not stored; use teacher='live'",
                {"h": self.hidden},
            )
        if self.teacher == "stored" and not self.asks_teacher:
            raise PydanticCustomError("teacher", "teacher='stored' with a loss that asks no teacher; use loss='distill'", {})

    @property
    def asks_teacher(self) -> bool:
        """Whether the float model is needed while updates are made."""
        return self.next_token_share < 1 or self.hidden > 0

    @property
    def next_token_share(self) -> float:
        """Weight of the next token in the loss; that of the divergence is the rest."""
        return {"distill": 0.0, "next-token": 1.0, "mixed": self.mix}[self.loss]

    def compute_dtype(self, device: torch.device) -> torch.dtype:
        """Return the dtype that products run in."""
        if self.dtype != "auto":
            return {"float32": torch.float32, "bfloat16": torch.bfloat16}[self.dtype]
        fast = torch.cpu._is_avx512_bf16_supported() if device.type == "cpu" else torch.cuda.is_bf16_supported()
        return torch.bfloat16 if fast else torch.float32
