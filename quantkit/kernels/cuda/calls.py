"""The CUDA functions as Python functions on tensors: check, fill a struct, launch on the current stream.

Everything is allocated by torch, nothing synchronizes, so every call can be captured in a CUDA graph (after one call before the
capture, which loads the library and makes the counters). A token's result does not depend on the tokens beside it, as long as
a call takes the same way: few tokens straight from the codes, many (:data:`DENSE_TOKENS` and more) through a dense product.
"""

import ctypes
import functools
from typing import Any, Final

import torch
from torch import Tensor

from quantkit.errors import KernelError
from quantkit.kernels.build import DTYPE_CODES
from quantkit.kernels.cuda import nvcc
from quantkit.kernels.cuda.layout import STEP, TILE_ROWS, Fragments
from quantkit.kernels.program.reference import ACTIVATIONS

WARPS: Final = 4
LARGEST_SPLITS: Final = 16
DENSE_TOKENS: Final = 160
"""From so many tokens on a weight is expanded and multiplied densely. To be measured: a guess from bytes and arithmetic."""
SLICE_BYTES: Final = 8 << 20
"""At least so much of an expanded weight is made at a time; half of the second cache where that is more."""


def struct(name: str, pointers: str, integers: str, floats: str = "") -> type[ctypes.Structure]:
    """Return a ctypes structure of pointers, then 32-bit integers, then floats: what the launches take."""
    kinds = ((ctypes.c_void_p, pointers), (ctypes.c_int32, integers), (ctypes.c_float, floats))
    fields = [(field, kind) for kind, names in kinds for field in names.split()]
    return type(name, (ctypes.Structure,), {"_fields_": fields})


MatmulStruct = struct(
    "MatmulStruct",
    "x codes scales zeros bias x_scales offsets y partial arrived bests",
    "tokens n k experts group_shift splits zero_code scales_are_bfloat16 dtype activation",
)
ExpandStruct = struct(
    "ExpandStruct",
    "codes scales zeros out",
    "tiles first_tile rows k group_shift zero_code scales_are_bfloat16 bits dtype fp8",
)


def launch(name: str, filled: ctypes.Structure, device: torch.device, *middle: int) -> None:
    """Call a launching function of the library on the current stream of ``device``.

    Raises:
        KernelError: the library is not there, or CUDA refused.
    """
    lib = nvcc.library()
    with on_device(device):
        status = getattr(lib, name)(ctypes.addressof(filled), *middle, stream_of(device))
    if status:
        raise KernelError(f"{name}: CUDA error {status}: {lib.qk_error_text(status).decode()}")


def runs_on(x: Tensor) -> bool:
    """Say whether the kernels can read this tensor."""
    return x.is_cuda


def on_device(device: torch.device) -> Any:
    """Return a context in which launches go to ``device``."""
    return torch.cuda.device(device)


def stream_of(device: torch.device) -> int:
    """Return the current stream's handle, asked at run time so that a captured stream is found too."""
    return int(torch.cuda.current_stream(device).cuda_stream)


def multiprocessors(device: torch.device) -> int:
    """Return how many blocks can have a multiprocessor of their own."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@functools.cache
def slice_bytes(device: torch.device) -> int:
    """Return how much of an expanded weight is made at a time, so that it stays in the second cache."""
    return max(SLICE_BYTES, torch.cuda.get_device_properties(device).L2_cache_size // 2)


def capturing() -> bool:
    """Say whether the current stream is being captured in a graph."""
    return torch.cuda.is_current_stream_capturing()


def pointer(tensor: Tensor | None) -> int | None:
    """Return the address of a tensor's data; None for None."""
    return None if tensor is None else tensor.data_ptr()


_COUNTERS: Final = 1 << 16
_counters: dict[tuple[torch.device, int], Tensor] = {}


def counters(device: torch.device, wanted: int) -> Tensor:
    """Return int32 zeros that kernels count arrivals in and leave as zeros; one set per stream.

    Raises:
        KernelError: during a capture without a call before it, or if more are wanted than there are.
    """
    key = (device, stream_of(device))
    if key not in _counters:
        if capturing():
            raise KernelError("the first matmul on a stream cannot be captured in a graph; run it once before")
        _counters[key] = torch.zeros(_COUNTERS, dtype=torch.int32, device=device)
    if wanted > _COUNTERS:
        raise KernelError(f"a matmul of {wanted} tiles that share sums: want at most {_COUNTERS}")
    return _counters[key]


@functools.cache
def choose_splits(tiles: int, steps: int, processors: int) -> int:
    """Return over how many blocks K is split: the fewest steps of the busiest multiprocessor, with a price per split.

    A model, not a measurement: a block keeps 24 KB under way, a multiprocessor wants 40 KB, up to four blocks share one, and
    handing sums on takes a block as long as two steps. It depends on the weight alone, so that a token's sums are the same in
    every batch.
    """

    def cost(splits: int) -> float:
        blocks = -(-tiles * splits // processors)  # of the busiest multiprocessor
        under_way = min(1.0, min(blocks, 4) * 24 / 40)
        return blocks * (steps / splits / under_way + (2 if splits > 1 else 0)) + 3 * splits

    return min(range(1, max(1, min(LARGEST_SPLITS, steps // WARPS)) + 1), key=cost)


def group_shift(group: int, columns: int) -> int:
    """Return what a column is shifted by to give its group: 31 for one scale per row."""
    return 31 if group >= columns else group.bit_length() - 1


def activation_code(activation: str | None) -> int:
    """Return the kernels' number of a key of :data:`~quantkit.kernels.program.reference.ACTIVATIONS`; -1 for None."""
    return -1 if activation is None else list(ACTIVATIONS).index(activation)


def matmul(
    x: Tensor,
    weight: Fragments,
    bias: Tensor | None = None,
    *,
    x_scales: Tensor | None = None,
    offsets: Tensor | None = None,
    kind: str = "",
    dtype: torch.dtype | None = None,
    activation: str | None = None,
    bests: Tensor | None = None,
) -> Tensor:
    """Return ``x @ w.T + bias`` straight from the codes, (tokens, N).

    Args:
        x: (tokens, K), contiguous; of float16 or bfloat16, or bytes with ``x_scales``.
        weight: one matrix, or experts with ``offsets``.
        bias: (N,) of the output's dtype.
        x_scales: float32 (tokens,) of rounded activations.
        offsets: int32 (experts + 1,): expert e multiplies tokens ``offsets[e]`` to ``offsets[e + 1]``.
        kind: ``"int8"`` or ``"fp8"`` for rounded activations.
        dtype: of the output, if not x's.
        activation: the rows (and the bias) are gate and up in turn, and the result is ``activation(gate) * up``,
            (tokens, N / 2): bit for bit what :func:`~quantkit.kernels.cuda.norms.activate` makes of the product, both rounded
            to ``dtype`` first.
        bests: int32 (tokens, tiles, 2), to be filled: of every 64 rows the largest result (the bits of a float32) and its row.

    Raises:
        KernelError: an activation, and an odd number of rows.
    """
    dtype = dtype or x.dtype
    tokens, columns = x.shape
    if columns % 16:
        x = torch.nn.functional.pad(x, (0, -columns % 16))
    elif x.data_ptr() % 16:
        x = x.clone()
    width = weight.rows if activation is None else weight.rows // 2
    y = torch.empty((tokens, width), dtype=dtype, device=x.device)
    if not tokens:
        return y
    tokens8 = 1 if tokens <= 8 else 2 if tokens <= 16 else 4
    splits = 1 if offsets is not None else choose_splits(weight.tiles, steps_of(columns), multiprocessors(x.device))
    parts = {"x": x, "bias": bias, "x_scales": x_scales, "offsets": offsets, "y": y, "bests": bests}
    filled = fill_matmul(weight, parts, 8 * tokens8, splits, activation)
    launch(f"qk_matmul_{kind or f'codes{weight.bits}'}", filled, x.device, tokens8)
    return y


def steps_of(columns: int) -> int:
    """Return how many steps a weight has."""
    return -(-columns // STEP)


def fill_matmul(
    weight: Fragments, parts: dict[str, Tensor | None], block_tokens: int, splits: int, activation: str | None
) -> ctypes.Structure:
    """Return the struct of a product, with memory for the parts of its sums if K is split.

    Args:
        weight: what is multiplied.
        parts: tensors by the struct's fields, x as the kernel reads it (its last dimension counts only where that is K), y.
        block_tokens: how many tokens a block takes.
        splits: over how many blocks K is split.
        activation: of gates that lie in turn.
    """
    y = parts["y"]
    assert y is not None
    device, tokens, partial, arrived = y.device, len(y), None, None
    if splits > 1:
        places = -(-tokens // block_tokens) * weight.tiles
        partial = torch.empty(places * splits * block_tokens * TILE_ROWS, dtype=torch.float32, device=device)
        arrived = counters(device, places)
    columns = -(-weight.columns // 16) * 16
    tensors = parts | {
        "codes": weight.codes,
        "scales": weight.scale,
        "zeros": weight.zero,
        "partial": partial,
        "arrived": arrived,
    }
    filled = MatmulStruct(
        **{name: pointer(tensor) for name, tensor in tensors.items()},
        **{"tokens": tokens, "n": weight.rows, "k": columns, "experts": weight.experts, "splits": splits},
        **{"group_shift": group_shift(weight.group, weight.columns), "zero_code": weight.zero_code},
        **{"scales_are_bfloat16": weight.scale.dtype == torch.bfloat16, "dtype": DTYPE_CODES[y.dtype]},
        activation=activation_code(activation),
    )
    filled.kept = (partial, arrived)  # until it has been launched; the allocator keeps order on the stream
    return filled


def expand(weight: Fragments, dtype: torch.dtype, tiles: range, expert: int = 0, *, fp8: bool = False) -> Tensor:
    """Return rows ``64 * tiles.start`` to ``64 * tiles.stop`` (or N) of a weight as floats, (rows, K)."""
    rows = min(weight.rows, tiles.stop * TILE_ROWS) - tiles.start * TILE_ROWS
    out = torch.empty((rows, weight.columns), dtype=dtype, device=weight.codes.device)
    parts = [None if t is None else t[expert] for t in (weight.codes, weight.scale, weight.zero)]
    filled = ExpandStruct(
        *map(pointer, (*parts, out)),
        *(len(tiles), tiles.start, rows, weight.columns, group_shift(weight.group, weight.columns), weight.zero_code),
        *(weight.scale.dtype == torch.bfloat16, weight.bits, DTYPE_CODES[dtype], fp8),
    )
    launch("qk_expand", filled, out.device)
    return out


def dense_matmul(x: Tensor, weight: Fragments, bias: Tensor | None, expert: int = 0, *, fp8: bool = False) -> Tensor:
    """Return ``x @ w.T + bias`` for many tokens: expand a slice that stays in the second cache, multiply densely, go on."""
    y = x.new_empty((x.shape[0], weight.rows))
    tiles = max(1, slice_bytes(x.device) // (2 * weight.columns * TILE_ROWS))
    floats: Tensor | None = None
    for first in range(0, weight.tiles, tiles):
        part = range(first, min(first + tiles, weight.tiles))
        rows = slice(part.start * TILE_ROWS, part.stop * TILE_ROWS)
        floats = None  # the next slice takes its memory, and with it its place in the cache
        floats = expand(weight, x.dtype, part, expert, fp8=fp8)
        if bias is None:
            torch.mm(x, floats.T, out=y[:, rows])
        else:
            torch.addmm(bias[rows], x, floats.T, out=y[:, rows])
    return y
