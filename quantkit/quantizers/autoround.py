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

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from quantkit.errors import CalibrationError, SpecError
from quantkit.nn.learned import TunedWeight, rise_and_fall, substituted
from quantkit.nn.sites import Site
from quantkit.qtensor import QTensor
from quantkit.quantizers.base import QUANTIZERS
from quantkit.quantizers.gptaq import GPTAQ
from quantkit.spec import QuantSpec
from quantkit.system.compute import Compute


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


def learn_block(
    model: nn.Module,
    sites: Mapping[Site, tuple[QTensor, Tensor | None, QuantSpec | None]],
    forward: Callable[[int], Tensor],
    targets: Sequence[Tensor],
    settings: AutoRound,
    compute: Compute,
) -> dict[Site, QTensor]:
    """Return learned codes and scales of the sites of a block; the model is as before when it is done.

    Args:
        model: holds the block, resident on the compute device.
        sites: every site of the block: where learning starts, the float weight, and the grid of its inputs or None.
        forward: batch number to the block's output (B, T, H), through whatever weights the model holds.
        targets: the float model's output of the block, one (B, T, H) per batch.
        settings: updates and rates.
        compute: device and dtypes.

    Raises:
        CalibrationError: if the output is not finite.
    """
    dtype = compute.products or compute.dtype
    tuned = {
        site: TunedWeight(start.to(compute.device), dtype, codes=settings.code_rate > 0, activation=activation, origin=weight)
        for site, (start, weight, activation) in sites.items()
    }
    changes = [weight.change for weight in tuned.values()]
    optimizer = torch.optim.Adam(changes, betas=(0.9, 0.95), eps=1e-12)
    order = _batch_numbers(len(targets), settings.seed)
    frozen = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(False)
    try:
        with substituted(model, tuned), compute.rounding_products(), torch.enable_grad():
            for step in range(settings.iters):
                factor = rise_and_fall(step, settings.iters)
                for weight in tuned.values():
                    weight.code_rate = settings.code_rate * factor
                batch = next(order)
                output = forward(batch)
                target = targets[batch].to(output.device, torch.float32)
                error = (output.detach().float() - target) / target.square().sum(-1, keepdim=True).clamp(min=1e-30)
                if not bool(torch.isfinite(error.sum())):
                    raise CalibrationError("autoround: a block's output is not finite; use lower rates")
                output.backward(error.to(output.dtype))
                optimizer.param_groups[0]["lr"] = settings.scale_lr * factor
                optimizer.step()
                optimizer.zero_grad()
                for weight in tuned.values():
                    weight.refresh()
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)
    return {site: weight.result() for site, weight in tuned.items()}


def relative_distance(outputs: Sequence[Tensor], targets: Sequence[Tensor]) -> float:
    """Return the mean over tokens of ||output - target||^2 / ||target||^2."""
    total, tokens = 0.0, 0
    for output, target in zip(outputs, targets, strict=True):
        size = target.float().square().sum(-1).clamp(min=1e-30)
        total += float(((output.float() - target.float()).square().sum(-1) / size).sum(dtype=torch.float64))
        tokens += size.numel()
    return total / tokens


def _batch_numbers(count: int, seed: int) -> Iterator[int]:
    """Yield batch numbers for ever, every one once per round, in an order that the seed decides."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(count, generator=generator).tolist()
