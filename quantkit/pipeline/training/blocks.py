r"""The first phase of training, if asked for: every block by itself against the float model's block, then the next.

.. math:: \min_{w, s} \operatorname{mean}_{\text{tokens}} \frac{\|B_{w,s}(x) - B(x')\|^2}{\|B(x')\|^2}

x is the block's input behind the trained blocks before it, x' its input in the float model. All that the block's layers learn
is learned: weights or adapters, scales, zero points if they are (Chen, Shao, Xu, Wang, Gao, Zhang, Qiao, Luo 2024,
EfficientQAT, arXiv 2407.11062, section 3.2, Block-AP); the whole model is trained from there. A block whose distance did not
fall stays what it was, and the best codes may be those of before this phase.

A run that was interrupted sends the text again through the blocks that are finished, and goes on with the next. Memory: two
hidden states of every window that is used, and the calls of the blocks.
"""

import math
import time
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from quantkit.calibrate.chain import Chain, relative_distance
from quantkit.errors import CalibrationError
from quantkit.nn.block_calls import why_entangled
from quantkit.nn.sites import Structure
from quantkit.pipeline.training.loop import Learner, SaveState
from quantkit.pipeline.training.loss import by_length
from quantkit.pipeline.training.updates import Updates, order_of, rise_and_fall, seen
from quantkit.system.compute import Compute
from quantkit.system.progress import Progress, ProgressCallback


def refuse_entangled(model: nn.Module, structure: Structure) -> None:
    """Refuse a model whose blocks cannot be run one by one.

    Raises:
        CalibrationError: it is one.
    """
    if (reason := why_entangled(model, structure)) is not None:
        raise CalibrationError(f"block_steps: blocks are trained by themselves, and these cannot: {reason}; use block_steps=0")


def train_blocks(
    learner: Learner, teacher: nn.Module, structure: Structure, save: SaveState, progress: ProgressCallback
) -> None:
    """Train the blocks that have not been trained yet, one after the other, between two evaluations.

    Args:
        learner: fresh, or restored; its model computes in the dtype that the teacher has.
        teacher: the float model.
        structure: its blocks.
        save: called after a block when a state is due.
        progress: gets one event per block, with its distance afterwards.

    Raises:
        CalibrationError: an output of a block is not finite.
    """
    history, training = learner.history, learner.training
    if learner.done or len(history.evaluations) > 1:
        return
    if not history.evaluations:
        learner.evaluate()
    batches = by_length(seen(training, learner.windows, training.block_steps), training.together)
    device = next(learner.model.parameters()).device
    compute = Compute(device, training.compute_dtype(device))
    mine, theirs = (Chain(model, structure, batches, compute) for model in (learner.model, teacher))
    last_saved = time.monotonic()
    for index, block in enumerate(structure.blocks):
        theirs.replace(_outputs(theirs, index))
        if index >= len(history.blocks):
            history.blocks.append(_train_block(learner, mine, index, theirs.hidden))
            progress(Progress("train-blocks", index + 1, len(structure.blocks), block.name, history.blocks[-1][1]))
            if time.monotonic() - last_saved >= training.save_every_s:
                save(learner)
                last_saved = time.monotonic()
        mine.replace(_outputs(mine, index))
    learner.evaluate()


def _train_block(learner: Learner, chain: Chain, index: int, targets: Sequence[Tensor]) -> tuple[float, float]:
    """Train one block; return its distance from the float model's block before and after."""
    training, block = learner.training, chain.structure.blocks[index].name
    before = relative_distance(_outputs(chain, index), targets)
    layers = [layer for name, layer in learner.layers.items() if name.startswith(f"{block}.")]
    if not any(layer.tied_to is None for layer in layers):
        return before, before
    updates = Updates(layers, training)
    kept = [parameter.detach().clone() for parameter in [*updates.parameters, *(layer.weight for layer in layers)]]
    each = max(1, training.windows // training.together)
    count = len(targets)
    with torch.enable_grad():
        for step in range(training.block_steps):
            places = range(step * each, (step + 1) * each)
            chosen = [order_of(count, training.seed, at // count)[at % count] for at in places]
            _add_gradient(chain, index, chosen, targets)
            updates.carry_out(rise_and_fall(step, training.block_steps, min(training.warm_steps, training.block_steps // 10)))
    after = relative_distance(_outputs(chain, index), targets)
    if after < before:
        return before, after
    for parameter, value in zip([*updates.parameters, *(layer.weight for layer in layers)], kept, strict=True):
        parameter.data.copy_(value)
    return before, before


def _add_gradient(chain: Chain, index: int, chosen: Sequence[int], targets: Sequence[Tensor]) -> None:
    tokens = sum(targets[batch].shape[:2].numel() for batch in chosen)
    for batch in chosen:
        output = chain.call(index, batch, chain.hidden[batch])
        target = targets[batch].float()
        difference = output.detach().float() - target
        if not math.isfinite(float(difference.sum())):
            name = chain.structure.blocks[index].name
            raise CalibrationError(f"block_steps: the output of {name} is not finite; use lower rates, or dtype float32")
        slope = difference / target.square().sum(-1, keepdim=True).clamp(min=1e-30)
        output.backward(slope.mul_(2 / tokens).to(output.dtype))


@torch.no_grad()
def _outputs(chain: Chain, index: int) -> list[Tensor]:
    return [chain.call(index, batch, hidden) for batch, hidden in enumerate(chain.hidden)]
