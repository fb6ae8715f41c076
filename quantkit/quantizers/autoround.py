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

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch

from quantkit.errors import SpecError
from quantkit.nn.learned import TunedWeight, substituted
from quantkit.nn.sites import Site
from quantkit.nn.sizes import RunSize
from quantkit.nn.training import Schedule, train
from quantkit.qtensor import QTensor, as_grid
from quantkit.quantizers.base import QUANTIZERS, BlockCost, QuantizedBlock
from quantkit.quantizers.gptaq import GPTAQ
from quantkit.spec import Scheme


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
    refines_blocks: ClassVar[bool] = True

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

    def rejects(self, scheme: Scheme) -> str | None:
        """Say why layers of a scheme cannot be learned: only integer grids, and no static scales of inputs."""
        if not scheme.weight.is_integer or scheme.weight.blocks is not None:
            return f"autoround learns integer grids, not {scheme.weight.describe()}; use quantizer gptq"
        if scheme.static:
            return "autoround does not keep static input scales; leave it out, or use a dynamic scheme"
        return None

    def refine_block(self, block: QuantizedBlock) -> dict[Site, QTensor]:
        """Learn codes and scales of all layers of a block together.

        Raises:
            CalibrationError: if the block's output is not finite.
        """
        compute = block.compute
        dtype = compute.products or compute.dtype
        tuned = {
            site: TunedWeight(
                as_grid(start).to(compute.device), dtype, code_rate=self.code_rate, activation=activation, origin=weight
            )
            for site, (start, weight, activation) in block.layers.items()
        }
        order = _batch_numbers(len(block.targets), self.seed)

        def loss(step: int) -> float:
            batch = next(order)
            output = block.forward(batch)
            target = block.targets[batch].to(output.device, torch.float32)
            difference = output.detach().float() - target
            slope = difference / target.square().sum(-1, keepdim=True).clamp(min=1e-30)
            output.backward(slope.to(output.dtype))
            return float((slope * difference).sum(-1).mean())

        schedule = Schedule(self.iters, self.scale_lr, "autoround: a block's output is not finite; use lower rates")
        with substituted(block.model, tuned), compute.rounding_products():
            train(block.model, tuned.values(), loss, schedule)
        return {site: weight.result() for site, weight in tuned.items()}

    def cost(self, size: RunSize) -> BlockCost:
        """Return GPTAQ's cost and that of learning: the block's input and float weights are kept, codes and drifts added."""
        start = super().cost(size)
        learning = f"then {self.iters} forwards and backwards of {self.batch_size} windows and a last forward"
        return BlockCost((*start.passes, learning), start.nbytes + 4 * (size.tokens * size.hidden + 3 * size.block))


def _batch_numbers(count: int, seed: int) -> Iterator[int]:
    """Yield batch numbers for ever, every one once per round, in an order that the seed decides."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(count, generator=generator).tolist()
