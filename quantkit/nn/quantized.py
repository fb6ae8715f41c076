"""What becomes of a layer that is quantized."""

from dataclasses import dataclass

from torch import Tensor

from quantkit.qtensor import QTensor

LARGE_ERROR = 0.5
"""A layer whose output is off by more than this share of its size is named."""


@dataclass(frozen=True, slots=True)
class Quantized:
    """A quantized layer.

    Attributes:
        qtensor: the codes.
        loss: relative squared error of the layer's output over the calibration inputs, ||(W - Q) x||^2 / ||W x||^2, or of the
            weight itself where no statistics exist; of its block's output where the block was learned as a whole.
        notes: what was unusual.
        fell_back: the quantizer wanted statistics and there were none.
        tokens: calibration tokens that the weight multiplied, for a stack one number per expert; empty without statistics.
        bias: (out,), the layer's bias corrected for the rounding of the weight; None leaves it alone.
    """

    qtensor: QTensor
    loss: float
    notes: tuple[str, ...] = ()
    fell_back: bool = False
    bias: Tensor | None = None
    tokens: tuple[int, ...] = ()

    @property
    def warnings(self) -> tuple[str, ...]:
        """What its user must know, because the layer is hardly what it was."""
        if self.loss <= LARGE_ERROR**2:
            return ()
        return (f"relative error {self.loss**0.5:.2f}: give it more bits, or leave it in float by a rule",)
