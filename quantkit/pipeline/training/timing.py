"""How long training will take on this machine: the products and the attention of a step, timed with numbers that mean nothing.

No weight is read. Every matrix product of a step has a shape that the model's config tells; each shape is run here, and so is
the attention of one block. What is not timed (norms, activations, rounding, the optimizer) is added as the share that it has
of a step of a small model. A machine that is busy now is taken for a slower one.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quantkit.nn.sites import Site
from quantkit.pipeline.training.settings import Training

REST = 1.25
"""A step in units of its products and attention: measured on a model of 135 million weights, on a CPU."""

_MOST_PRODUCTS = 1 << 31
"""Multiplications that a shape is timed with; of larger products some rows are run, and the time is scaled."""
_ROUNDS = 4


def training_seconds(
    training: Training, model: nn.Module, sites: Iterable[Site], length: int, text: int | None = None
) -> float | None:
    """Return the expected seconds of all updates and evaluations; None for a mixture whose tokens' experts are not known.

    Predictions that are stored cost a forward of every window that is seen; blocks that are trained by themselves two forwards
    of theirs and the float model's, beside their updates.

    Args:
        training: the settings.
        model: an empty model; its config has the sizes.
        sites: the layers of its blocks that are trained.
        length: tokens per window.
        text: windows of the text; None for as many as are needed.
    """
    config: Any = model.config.get_text_config()  # type: ignore[operator, union-attr]
    shapes = Counter[tuple[int, int]]()
    for site in sites:
        stacked = len(site.shape) == 3
        if stacked and not getattr(config, "num_experts_per_tok", None):
            return None
        shapes[(site.shape[-2], site.shape[-1])] += config.num_experts_per_tok if stacked else 1
    dtype = training.compute_dtype(torch.device("cpu"))
    rows = training.together * length
    forward = backward = 0.0
    for (out, features), count in shapes.items():
        once = _timed_product(rows, out, features, dtype)
        forward, backward = forward + count * once, backward + 2 * count * once
    vocabulary, hidden = model.get_input_embeddings().weight.shape  # type: ignore[operator]
    head = _timed_product(rows, vocabulary, hidden, dtype)
    there, back = _timed_attention(config, training.together, length, dtype)
    blocks_forward, blocks_backward = forward + there, backward + back
    forward, backward = blocks_forward + head, blocks_backward + head
    windows = training.steps * training.windows
    stored = training.teacher == "stored"
    forwards = forward * (2 if training.asks_teacher and not stored else 1)
    evaluated = (1 + bool(training.block_steps) + -(-training.steps // training.evaluate_every)) * training.held_out
    total = windows * (forwards + backward) + evaluated * forwards
    if stored:
        total += (min(text or windows, windows) + training.held_out) * forward
    alone = training.block_steps * training.windows
    total += alone * (blocks_forward + blocks_backward) + 4 * min(text or alone, alone) * blocks_forward
    return REST * total / training.together


def _timed_product(rows: int, out: int, features: int, dtype: torch.dtype) -> float:
    run = max(1, min(rows, _MOST_PRODUCTS // (out * features)))
    x, weight = torch.ones(run, features, dtype=dtype), torch.ones(out, features, dtype=dtype)
    return _fastest(lambda: F.linear(x, weight)) * rows / run


def _timed_attention(config: Any, batch: int, length: int, dtype: torch.dtype) -> tuple[float, float]:
    """Return the seconds of the attention of all blocks, forwards and backwards."""
    heads = getattr(config, "num_attention_heads", None)
    if not isinstance(heads, int):
        return 0.0, 0.0
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    one = torch.ones(batch, heads, length, width, dtype=dtype, requires_grad=True)

    def forward() -> Tensor:
        return F.scaled_dot_product_attention(one, one, one, is_causal=True)

    with torch.enable_grad():
        there = _fastest(forward)
        slope = torch.ones_like(one)
        both = _fastest(lambda: forward().backward(slope))
    blocks = config.num_hidden_layers
    return blocks * there, blocks * max(both - there, 0.0)


def _fastest(run: Callable[[], object]) -> float:
    run()
    seconds = []
    for _ in range(_ROUNDS):
        began = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - began)
    return min(seconds)  # other programs only ever add to it
