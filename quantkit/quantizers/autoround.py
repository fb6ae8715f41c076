r"""AutoRound: learn a block's codes and scales from the difference between its output and the float block's.

Layer-wise methods see one layer's error. Here all layers of a block are learned together, with x the block's input behind the
quantized blocks before it and x' its input in the float model:

.. math:: \min_{q, s} \sum_{\text{tokens}} \frac{\|B_{q,s}(x) - B(x')\|^2}{\|B(x')\|^2}

The codes move by signed gradient descent with straight-through rounding (Cheng, Zhang, Shen, Cai, He, Lv, Liu 2023, SignRound,
arXiv 2309.05516); scales by Adam over relative changes. SignRound starts from rounding to nearest; learning starts here from
GPTAQ (:mod:`quantkit.quantizers.gptaq`), which is closer, and learns only what is left. Dividing by the size of each token's
output keeps the few tokens with enormous activations from deciding everything. A block whose error did not fall keeps the
codes it started with.

Cost over GPTAQ: forward and backward of every block for ``iters * batch_size`` windows; memory for one block's weights in
floating point, its codes with two bytes each, and the float model's activations.
"""

from dataclasses import dataclass

from quantkit.errors import SpecError
from quantkit.quantizers.base import QUANTIZERS
from quantkit.quantizers.gptaq import GPTAQ


@QUANTIZERS.register("autoround")
@dataclass(frozen=True)
class AutoRound(GPTAQ):
    """Learned rounding and scales, block by block.

    Args:
        iters: updates per block.
        batch_size: calibration windows per update.
        lr: how far one update moves a code against the sign of its gradient, in steps of the grid; falls linearly to zero.
            None is 1 / (2 iters), so that a code can travel a quarter of a step and only those near a border change.
        scale_lr: highest learning rate of scales, as a relative change per update; 0 leaves them alone.
        seed: decides the order of the windows.

    Raises:
        SpecError: for a number out of range.
    """

    iters: int = 50
    batch_size: int = 2
    lr: float | None = None
    scale_lr: float = 0.002
    seed: int = 0

    def __post_init__(self) -> None:
        if self.iters < 1 or self.batch_size < 1 or not 0 <= self.code_rate < 1 or not 0 <= self.scale_lr < 1:
            raise SpecError(
                f"autoround: iters={self.iters}, batch_size={self.batch_size}, lr={self.lr}, scale_lr={self.scale_lr}; want at "
                "least 1, at least 1, and rates from 0 to below 1"
            )

    @property
    def code_rate(self) -> float:
        """The highest ``lr``, given or not."""
        return 1 / (2 * self.iters) if self.lr is None and self.iters else self.lr or 0.0
