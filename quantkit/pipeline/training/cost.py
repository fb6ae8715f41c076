"""What training takes, estimated from a model's config before it starts."""

from collections.abc import Iterable

import torch

from quantkit.nn.fake import NARROW
from quantkit.nn.sites import Site
from quantkit.nn.sizes import RunSize
from quantkit.numerics import grid
from quantkit.pipeline.training.settings import Training
from quantkit.qtensor import empty_qtensor
from quantkit.spec import Plan
from quantkit.transforms.base import StepCost

_PER_WEIGHT = 16
"""Bytes: the weight, its gradient and AdamW's two moments, each in float32."""

_PER_TOKEN = (20, 8)
"""Numbers that a block keeps for its backward, in hidden sizes and in widths of its widest layer: inputs and outputs of its
layers, norms, attention."""


def trained_numbers(training: Training, sites: Iterable[Site], plan: Plan) -> int:
    """Return how many numbers an optimizer changes: weights or adapters, and scales and zero points where they are learned."""
    total = 0
    for site in sites:
        spec, (out, features) = plan[site.name].weight, site.shape[-2:]
        experts = site.numel // (out * features)
        rows, columns = grid.block_size(spec, site.shape)
        total += experts * training.adapters * (out + features) if training.adapters else site.numel
        per_scale = (spec.scale_dtype not in NARROW) + (training.learn_zero and not spec.symmetric and spec.is_integer)
        total += per_scale * site.numel // (rows * columns)
    return total


def state_bytes(training: Training, sites: Iterable[Site], plan: Plan) -> int:
    """Return the size of a state of training: what is learned, two moments of each number, and the best codes so far."""
    sites = list(sites)
    codes = sum(empty_qtensor(plan[site.name].weight, site.shape).nbytes for site in sites)
    return 3 * 4 * trained_numbers(training, sites, plan) + codes


def training_cost(training: Training, size: RunSize) -> StepCost:
    """Return the passes, and the memory while weights are trained.

    The sum of 16 bytes per trained weight; its rounded copy, which the backward needs; the teacher, and the trained model's
    table, in the dtype of the products; what blocks keep of the windows of one forward; and four times their logits: the
    model's, the teacher's, and the gradients of both steps through the head.
    """
    width = training.compute_dtype(torch.device("cpu")).itemsize
    tokens = training.together * size.length
    kept = tokens * size.blocks * (_PER_TOKEN[0] * size.hidden + _PER_TOKEN[1] * size.widest)
    logits = 4 * tokens * size.vocabulary
    table = size.vocabulary * size.hidden
    teacher = size.weights + table if training.next_token_share < 1 else 0
    windows = training.steps * training.windows
    evaluations = 1 + -(-training.steps // training.evaluate_every)
    beside = " beside the float model" if teacher else ""
    return StepCost(
        last=(
            f"{training.steps} updates: {windows:,} windows of {size.length} tokens forwards and backwards{beside}",
            f"{evaluations} evaluations on {training.held_out} windows",
        ),
        nbytes=_PER_WEIGHT * size.weights + width * (size.weights + teacher + table + kept + logits),
    )
