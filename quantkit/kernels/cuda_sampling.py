"""The next token of each row, chosen on the device: one kernel reads the logits, and nothing waits for the host.

How a row is drawn stands in device memory (:class:`~quantkit.kernels.draw.Draw`): a recorded step follows it without being
recorded again. :func:`quantkit.kernels.draw.draw_plain` defines what is chosen.
"""

import torch
from torch import Tensor

from quantkit.kernels.build import DTYPE_CODES
from quantkit.kernels.cuda_calls import launch, pointer, struct
from quantkit.kernels.draw import Draw

SampleStruct = struct("SampleStruct", "logits temperature top_k rest min_p seed position chosen bests", "rows n dtype tiles")


def sample(logits: Tensor, draw: Draw, positions: Tensor, bests: Tensor | None = None) -> Tensor:
    """Return the chosen token of each row, int32 (rows,).

    A row without a finite number gets some token.

    Args:
        logits: float16 or bfloat16 (rows, vocabulary), contiguous.
        draw: how.
        positions: int32 (rows,), of the rows in their sequences.
        bests: of :func:`~quantkit.kernels.cuda_calls.tile_bests`; the most likely token is then found without the logits.
    """
    chosen = torch.empty(len(logits), dtype=torch.int32, device=logits.device)
    tiles = 0 if bests is None else bests.shape[1]
    pointers = map(pointer, (logits, *draw, positions, chosen, bests))
    filled = SampleStruct(*pointers, *logits.shape, DTYPE_CODES[logits.dtype], tiles)
    launch("qk_sample", filled, logits.device)
    return chosen
