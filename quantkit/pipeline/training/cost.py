"""What training takes, estimated from a model's config before it starts."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from quantkit.nn.fake import NARROW
from quantkit.nn.sites import Site
from quantkit.nn.sizes import RunSize
from quantkit.numerics import grid
from quantkit.pipeline.training.settings import Training
from quantkit.pipeline.training.teacher import stored_bytes
from quantkit.qtensor import empty_qtensor
from quantkit.spec import Plan
from quantkit.transforms.base import StepCost

_PER_NUMBER = 16
"""Bytes: the number, its gradient and AdamW's two moments, each in float32."""

_LOGITS = 4
"""Matrices of tokens and vocabulary that are there at a time."""

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


def scratch_bytes(training: Training, sites: Iterable[Site], plan: Plan, tokens: int) -> int:
    """Return what lies on the disk beside checkpoints while ``tokens`` of text are trained on.

    Two states, since one is written before the other goes, and predictions of the float model if they are stored.
    """
    stored = stored_bytes(training.top_k, tokens) if training.teacher == "stored" else 0
    return 2 * state_bytes(training, sites, plan) + stored


@dataclass(frozen=True, slots=True)
class Trained:
    """What is trained, as far as a config and a plan tell.

    Attributes:
        numbers: see :func:`trained_numbers`.
        codes: bytes of the codes.
        dtype: of the float model.
        windows: of the text.
    """

    numbers: int
    codes: int
    dtype: torch.dtype
    windows: int


def training_cost(training: Training, size: RunSize, trained: Trained) -> StepCost:
    """Return the passes, and the memory while weights are trained, beside the float model.

    The sum of 16 bytes per trained number (itself, its gradient, two moments), beside adapters 4 per frozen weight; the rounded
    copy of weights, which the backward needs; the best codes, and those that may replace them; what is not trained and the
    teacher, if it runs beside, in the dtype of the products, where that is not the float model's; what blocks keep of the
    windows of one forward; and their logits: the model's, the teacher's, and the gradients of both steps through the head. Of
    blocks that are trained by themselves the hidden states of all their windows, twice.
    """
    products = training.compute_dtype(torch.device("cpu"))
    width, live = products.itemsize, training.asks_teacher and training.teacher == "live"
    tokens, windows = training.together * size.length, training.steps * training.windows
    kept = tokens * size.blocks * (_PER_TOKEN[0] * size.hidden + _PER_TOKEN[1] * size.widest)
    table = size.vocabulary * size.hidden
    copies = 0 if products == trained.dtype else table + (size.weights + table if live or training.block_steps else 0)
    learned = _PER_NUMBER * trained.numbers + (4 * size.weights if training.adapters else 0) + 2 * trained.codes
    alone = min(trained.windows, training.block_steps * training.windows) * size.length * size.hidden * 2
    beside = " beside the float model" if live else ""
    stored = min(trained.windows, windows + training.held_out)
    first = (f"the float model: one forward of {stored} windows, {training.top_k} likeliest tokens kept",)
    blocks = (f"each of {size.blocks} blocks: {training.block_steps} updates of {training.windows} windows",)
    evaluations = 1 + bool(training.block_steps) + -(-training.steps // training.evaluate_every)
    return StepCost(
        first=first if training.teacher == "stored" else (),
        last=(
            *(blocks if training.block_steps else ()),
            f"{training.steps} updates: {windows:,} windows of {size.length} tokens forwards and backwards{beside}",
            f"{evaluations} evaluations on {training.held_out} windows",
        ),
        nbytes=learned + width * (size.weights + copies + kept + _LOGITS * tokens * size.vocabulary + alone),
    )
