"""Learn the codes and scales of one block from its float output; :mod:`quantkit.quantizers.autoround` says what and why."""

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from quantkit.compute import Compute
from quantkit.errors import CalibrationError
from quantkit.nn.sites import Site
from quantkit.nn.tuned import TunedWeight, substituted
from quantkit.numerics.schedule import rise_and_fall
from quantkit.qtensor import QTensor
from quantkit.quantizers.autoround import AutoRound
from quantkit.spec import QuantSpec


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
