"""Sample the next token of each row on the device, with one kernel and without the host.

The sampling parameters are in device memory (:class:`~quantkit.kernels.functions.sampling.Draw`), so they can change without a
new capture of the step. :func:`quantkit.kernels.functions.sampling.draw_plain` is the definition.
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
    """Sample a token for each row.

    Args:
        logits: float16 or bfloat16 (rows, V), contiguous.
        draw: sampling parameters.
        positions: int32 (rows,), position of each row in its sequence; negative for padding rows.
        slots: int32 (rows,), index in ``newest`` to which the last row of a slot writes its token (0 instead of -1). Rows of a
            slot are neighbours; padding rows write nothing.
        newest: int32 (slots,), or None.
        bests: int32 (rows, tiles, 2), the largest logit of every tile from :func:`quantkit.kernels.cuda.calls.matmul`, which
            saves searching the logits for their maximum.

    Returns:
        int32 (rows,); -1 where the largest logit is not finite.
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
    """Compute :func:`sample` in plain torch, for logits of any float dtype; ``bests`` is redundant and not used."""
    chosen = draw_plain(logits, draw, positions)
    if slots is not None and newest is not None:
        there = torch.nn.functional.pad(positions >= 0, (0, 1))
        last = there[:-1] & ~(there[1:] & (slots == slots.roll(-1)))
        newest[slots[last].long()] = chosen[last].clamp(min=0)
    return chosen
