"""Call the CUDA kernels with tensors: fill a struct and launch on the current stream.

Torch allocates all memory and nothing synchronizes, so every call can be captured in a CUDA graph (after one call before the
capture, which loads the library and creates the counters). The result for a token does not depend on the other tokens as long
as calls use the same algorithm: products with few tokens read the codes directly, products with :data:`DENSE_TOKENS` tokens or
more expand the weight and use a dense product.
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
"""Smallest number of tokens for which a weight is expanded and multiplied densely. Estimated from bytes and arithmetic."""
SLICE_BYTES: Final = 8 << 20
"""Smallest part of a weight that is expanded at a time; half of the level-2 cache if that is more."""


def struct(name: str, pointers: str, integers: str, floats: str = "") -> type[ctypes.Structure]:
    """Return a ctypes structure of pointers, then 32-bit integers, then floats, as the launching functions expect it.

    Args:
        name: name of the structure.
        pointers, integers, floats: names of the fields, separated by spaces, in order.
    """
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
    """Launch a kernel on the current stream of ``device``.

    Args:
        name: launching function of the library.
        filled: its struct.
        device: the device.
        *middle: integers between the struct and the stream.

    Raises:
        KernelError: the library cannot be loaded, or CUDA reports an error.
    """
    lib = nvcc.library()
    with on_device(device):
        status = getattr(lib, name)(ctypes.addressof(filled), *middle, stream_of(device))
    if status:
        raise KernelError(f"{name}: CUDA error {status}: {lib.qk_error_text(status).decode()}")


def runs_on(x: Tensor) -> bool:
    """Return whether the kernels can read this tensor."""
    return x.is_cuda


def on_device(device: torch.device) -> Any:
    """Return a context in which launches go to ``device``."""
    return torch.cuda.device(device)


def stream_of(device: torch.device) -> int:
    """Return the handle of the current stream, which during a capture is the captured one."""
    return int(torch.cuda.current_stream(device).cuda_stream)


def multiprocessors(device: torch.device) -> int:
    """Return the number of multiprocessors."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@functools.cache
def slice_bytes(device: torch.device) -> int:
    """Return how many bytes of a weight are expanded at a time, such that they stay in the level-2 cache."""
    return max(SLICE_BYTES, torch.cuda.get_device_properties(device).L2_cache_size // 2)


def capturing() -> bool:
    """Return whether the current stream is being captured in a graph."""
    return torch.cuda.is_current_stream_capturing()


def pointer(tensor: Tensor | None) -> int | None:
    """Return the address of a tensor's data; None for None."""
    return None if tensor is None else tensor.data_ptr()


_COUNTERS: Final = 1 << 16
_counters: dict[tuple[torch.device, int], Tensor] = {}


def counters(device: torch.device, count: int) -> Tensor:
    """Return int32 counters, which kernels use to count finished blocks and reset to zero; one set per stream.

    Args:
        device: the device.
        count: number of counters needed.

    Raises:
        KernelError: the first call on a stream is during a capture, or ``count`` is too large.
    """
    key = (device, stream_of(device))
    if key not in _counters:
        if capturing():
            raise KernelError("the first matmul on a stream cannot be captured in a graph; run it once before")
        _counters[key] = torch.zeros(_COUNTERS, dtype=torch.int32, device=device)
    if count > _COUNTERS:
        raise KernelError(f"a matmul with {count} tiles whose sums are split: want at most {_COUNTERS}")
    return _counters[key]


@functools.cache
def choose_splits(tiles: int, steps: int, processors: int) -> int:
    """Return over how many thread blocks K is split, such that the busiest multiprocessor has the fewest steps.

    This is a cost model, not a measurement: a block has 24 KB of loads in flight, a multiprocessor needs 40 KB, up to four
    blocks share a multiprocessor, and passing partial sums on costs a block two steps. The result depends on the weight only,
    so the order of a token's sums is the same in every batch.

    Args:
        tiles: tiles of 64 rows of the weight.
        steps: steps of 64 columns.
        processors: multiprocessors of the device.
    """

    def cost(splits: int) -> float:
        blocks = -(-tiles * splits // processors)  # of the busiest multiprocessor
        under_way = min(1.0, min(blocks, 4) * 24 / 40)
        return blocks * (steps / splits / under_way + (2 if splits > 1 else 0)) + 3 * splits

    return min(range(1, max(1, min(LARGEST_SPLITS, steps // WARPS)) + 1), key=cost)


def group_shift(group: int, columns: int) -> int:
    """Return s such that the group of a column is ``column >> s``; 31 for one scale per row."""
    return 31 if group >= columns else group.bit_length() - 1


def activation_code(activation: str | None) -> int:
    """Return the kernels' number for a key of :data:`~quantkit.kernels.program.reference.ACTIVATIONS`; -1 for None."""
    return -1 if activation is None else list(ACTIVATIONS).index(activation)


def matmul(
    x: Tensor,
    weight: Fragments,
    bias: Tensor | None = None,
    *,
    x_scales: Tensor | None = None,
    offsets: Tensor | None = None,
    dtype: torch.dtype | None = None,
    activation: str | None = None,
    bests: Tensor | None = None,
) -> Tensor:
    """Return ``x @ w.T + bias``, multiplying the codes of the weight directly.

    Args:
        x: (tokens, K), contiguous, float16 or bfloat16; or int8 or float8_e4m3fn codes with ``x_scales``.
        weight: one matrix, or a stack of experts with ``offsets``.
        bias: (N,) in the dtype of the result.
        x_scales: float32 (tokens,), scales of rounded activations.
        offsets: int32 (experts + 1,); expert e multiplies tokens ``offsets[e]`` to ``offsets[e + 1]``.
        dtype: dtype of the result; None for x's.
        activation: if given, the rows of the weight (and the bias) alternate between gate and up, and the result is
            ``activation(gate) * up``, bitwise equal to :func:`~quantkit.kernels.cuda.norms.activate` of the product; gate and
            up are rounded to ``dtype`` first.
        bests: int32 (tokens, tiles, 2) to be filled with the largest result in every 64 rows (the bits of a float32) and its
            row.

    Returns:
        (tokens, N), or (tokens, N / 2) with an activation.
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
    kind = f"codes{weight.bits}" if x_scales is None else "int8" if x.dtype == torch.int8 else "fp8"
    launch(f"qk_matmul_{kind}", filled, x.device, tokens8)
    return y


def steps_of(columns: int) -> int:
    """Return the number of steps of 64 columns."""
    return -(-columns // STEP)


def fill_matmul(
    weight: Fragments, parts: dict[str, Tensor | None], block_tokens: int, splits: int, activation: str | None
) -> ctypes.Structure:
    """Return the struct of a product, with memory for partial sums if K is split.

    Args:
        weight: the weight.
        parts: tensors by field name: x in the layout that the kernel reads, the result y, and optional ones.
        block_tokens: tokens per thread block.
        splits: number of thread blocks over which K is split.
        activation: activation of interleaved gates, or None.
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
    filled.kept = (partial, arrived)  # alive until the launch; afterwards the allocator reuses them in stream order
    return filled


def expand(weight: Fragments, dtype: torch.dtype, tiles: range, expert: int = 0, *, fp8: bool = False) -> Tensor:
    """Return rows ``64 * tiles.start`` to ``64 * tiles.stop`` (at most N) of a weight as floats, (rows, K)."""
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
    """Return ``x @ w.T + bias`` for many tokens: expand the weight slice by slice, and multiply each slice densely.

    A slice is small enough to stay in the level-2 cache between the two.
    """
    y = x.new_empty((x.shape[0], weight.rows))
    tiles = max(1, slice_bytes(x.device) // (2 * weight.columns * TILE_ROWS))
    floats: Tensor | None = None
    for first in range(0, weight.tiles, tiles):
        part = range(first, min(first + tiles, weight.tiles))
        rows = slice(part.start * TILE_ROWS, part.stop * TILE_ROWS)
        floats = None  # lets the next slice reuse this memory, which is in the cache
        floats = expand(weight, x.dtype, part, expert, fp8=fp8)
        if bias is None:
            torch.mm(x, floats.T, out=y[:, rows])
        else:
            torch.addmm(bias[rows], x, floats.T, out=y[:, rows])
    return y
