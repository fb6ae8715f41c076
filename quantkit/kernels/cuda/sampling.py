"""The next token of each row, chosen on the device: one kernel reads the logits, and nothing waits for the host.

How a row is drawn stands in device memory (:class:`~quantkit.kernels.functions.sampling.Draw`): a recorded step follows it
without being recorded again. :func:`quantkit.kernels.functions.sampling.draw_plain` defines what is chosen.
"""

import torch
from torch import Tensor

from quantkit.kernels.build import DTYPE_CODES
from quantkit.kernels.cuda.calls import launch, pointer, struct
from quantkit.kernels.functions.sampling import Draw, draw_plain

SampleStruct = struct(
    "SampleStruct", "logits temperature top_k rest min_p seed position bests slot chosen newest", "rows n dtype tiles"
)


def sample(
    logits: Tensor,
    draw: Draw,
    positions: Tensor,
    slots: Tensor | None = None,
    newest: Tensor | None = None,
    bests: Tensor | None = None,
) -> Tensor:
    """Return the chosen token of each row, int32 (rows,); -1 where the largest logit is not a finite number.

    Args:
        logits: float16 or bfloat16 (rows, vocabulary), contiguous.
        draw: how.
        positions: int32 (rows,), of the rows in their sequences; below 0 for rows that are nowhere.
        slots: int32 (rows,): where in ``newest`` the last row of a slot writes its token, 0 instead of -1. Rows of a slot are
            neighbours; those that are nowhere write nothing.
        newest: int32 (slots,).
        bests: int32 (rows, tiles, 2), what :func:`quantkit.kernels.cuda.calls.matmul` says of the logits: the largest ones are
            looked for there.
    """
    chosen = torch.empty(len(logits), dtype=torch.int32, device=logits.device)
    parts = (logits, *draw, positions, bests, slots, chosen, newest)
    tiles = 0 if bests is None else bests.shape[1]
    launch("qk_sample", SampleStruct(*map(pointer, parts), *logits.shape, DTYPE_CODES[logits.dtype], tiles), logits.device)
    return chosen


def sample_plain(
    logits: Tensor,
    draw: Draw,
    positions: Tensor,
    slots: Tensor | None = None,
    newest: Tensor | None = None,
    bests: Tensor | None = None,
) -> Tensor:
    """Define :func:`sample` in plain torch, for logits of any float dtype; ``bests`` say nothing new."""
    chosen = draw_plain(logits, draw, positions)
    if slots is not None and newest is not None:
        there = torch.nn.functional.pad(positions >= 0, (0, 1))
        last = there[:-1] & ~(there[1:] & (slots == slots.roll(-1)))
        newest[slots[last].long()] = chosen[last].clamp(min=0)
    return chosen
