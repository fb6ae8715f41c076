"""The CPU backend of decoder programs: one native call per step, for any rows of any sequences.

A :class:`NativeDecoder` lays a program's weights out for the kernels (``kernels/layout.py``) and describes it to
``csrc/decoder.cpp`` as plain structs. :meth:`NativeDecoder.run` then takes rows, each a token at a position of a sequence, with
the sequences' keys and values in pages (:class:`KvPages`) that the caller owns and hands out: a decode step of one sequence,
a prefill chunk, the ragged batch of a scheduler and the verification of drafted tokens are the same call. A row's logits do
not depend, to the last bit, on the rows beside it or on the number of threads.

With ``exact`` the activations stay float32 and only the order of sums differs from the program's definition. Otherwise they
are rounded to int8, a scale for every :data:`~quantkit.kernels.cpu.matmul.BLOCK` columns, wherever they meet a quantized
weight; :mod:`quantkit.kernels.cpu.matmul` states the error. With ``bfloat16`` they are rounded to bfloat16 where they meet a
bfloat16 weight, as a model in bfloat16 rounds its own, if this CPU multiplies such numbers faster than floats; sums are float32
all the same.
"""

import ctypes
import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from quantkit.errors import KernelError
from quantkit.kernels import build
from quantkit.kernels.cpu import huge_pages, structs
from quantkit.kernels.cpu.matmul import BLOCK
from quantkit.kernels.program.definition import Program

PAGE_TOKENS: Final = 32
"""Tokens of one sequence that a page of keys and values holds."""

CHUNK_TOKENS: Final = 128
"""Keys that a partial softmax of ``attention.cpp`` covers."""

MAX_HEAD_DIM: Final = 512

_TO_INT8, _TO_BFLOAT16 = 2, 4  # what activations may be rounded to: 1 << Form of linear.h

KV_DTYPES: Final = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}
"""How keys and values can be stored; int8 with a float32 scale per token and head. The order is ``KvKind`` of decoder.h."""


def rejects(program: Program) -> str | None:
    """Say why the CPU backend cannot run ``program``, or None if it can. May compile the library (once)."""
    if program.rope_switch is not None:
        return f"its rotary tables change beyond {program.rope_switch} tokens, and a batch has sequences of many lengths"
    for index, layer in enumerate(program.layers):
        if layer.attention.head_dim > MAX_HEAD_DIM:
            return f"layer {index}: heads are {layer.attention.head_dim} wide, at most {MAX_HEAD_DIM} are supported"
    for linear in program.linears():
        weight: Any = linear.weight
        if weight.device.type != "cpu":
            return f"weights are on {weight.device}, not on the CPU"
        if isinstance(weight, Tensor):
            continue
        if not weight.spec.is_integer:
            return f"weights are {weight.spec.describe()}, and it multiplies with integers"
        if weight.activation is not None:  # the proof of a program runs modules, which round: it would not notice
            how = f"inputs of layers are rounded to {weight.activation.describe()}"
            return f"{how}, which modules do (load with ignore_activations=True to leave them as they are)"
    try:
        build.library()
    except KernelError as error:
        return str(error)
    return None


class KvPages:
    """Keys and values of many sequences, in pages of :data:`PAGE_TOKENS` tokens.

    A page number means the same page in every layer. Memory is not cleared: a position must be written before it is read.

    Attributes:
        keys, values: per layer, (pages, kv_heads, head_dim, PAGE_TOKENS) and (pages, kv_heads, PAGE_TOKENS, head_dim).
        key_scales, value_scales: per layer, float32 (pages, kv_heads, PAGE_TOKENS); empty lists unless int8.
        pages: how many there are.
        dtype: a key of :data:`KV_DTYPES`.
    """

    def __init__(self, program: Program, pages: int, *, dtype: str = "float32") -> None:
        if dtype not in KV_DTYPES:
            raise KernelError(f"keys and values as {dtype!r}: want one of {', '.join(KV_DTYPES)}")
        self.dtype, self.pages = dtype, 0
        self._shapes = [(layer.attention.kv_heads, layer.attention.head_dim) for layer in program.layers]
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.key_scales: list[Tensor] = []
        self.value_scales: list[Tensor] = []
        self.grow(pages)

    def grow(self, pages: int) -> None:
        """Make room for ``pages`` pages in all; what was written stays."""
        if pages <= self.pages:
            return
        stored = KV_DTYPES[self.dtype]
        k_shapes = [(pages, heads, dim, PAGE_TOKENS) for heads, dim in self._shapes]
        v_shapes = [(pages, heads, PAGE_TOKENS, dim) for heads, dim in self._shapes]
        scales = [shape[:2] + shape[-1:] for shape in k_shapes] if self.dtype == "int8" else []
        self.keys = _grown(self.keys, k_shapes, stored)
        self.values = _grown(self.values, v_shapes, stored)
        self.key_scales = _grown(self.key_scales, scales, torch.float32)
        self.value_scales = _grown(self.value_scales, scales, torch.float32)
        self.pages = pages
        self.struct, self._arrays = structs.KvStruct(), []
        for name in ("keys", "values", "key_scales", "value_scales"):
            tensors = getattr(self, name)
            array = (ctypes.c_void_p * max(len(tensors), 1))(*(tensor.data_ptr() for tensor in tensors))
            self._arrays.append(array)
            setattr(self.struct, name, ctypes.addressof(array))
        self.struct.kind = list(KV_DTYPES).index(self.dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of all pages."""
        parts = (*self.keys, *self.values, *self.key_scales, *self.value_scales)
        return sum(tensor.nbytes for tensor in parts)


def _grown(old: list[Tensor], shapes: Sequence[tuple[int, ...]], dtype: torch.dtype) -> list[Tensor]:
    sizes = [math.prod(shape) for shape in shapes]
    whole = huge_pages.allocate(sum(sizes) * dtype.itemsize).view(dtype)  # one mapping: a huge page is large for one layer
    tensors = [part.view(shape) for part, shape in zip(whole.split(sizes), shapes, strict=True)]
    for tensor, before in zip(tensors, old, strict=False):
        tensor[: len(before)] = before
    return tensors


@dataclass(frozen=True, slots=True)
class Rows:
    """What one call computes: row i is the token ``tokens[i]`` at ``positions[i]`` of the sequence in slot ``slots[i]``.

    All earlier positions of a sequence must have been read by earlier calls, or be rows of this one. Neighbouring rows of one
    sequence are fastest.

    Attributes:
        tokens, positions, slots: one integer per row.
        block_table: (slots, pages per sequence); ``block_table[s, p // PAGE_TOKENS]`` is the page of position p.
        wanted: rows whose logits are wanted, in this order.
    """

    tokens: Sequence[int] | Tensor
    positions: Sequence[int] | Tensor
    slots: Sequence[int] | Tensor
    block_table: np.ndarray[Any, Any] | Tensor
    wanted: Sequence[int] | Tensor


class NativeDecoder:
    """A program, laid out and ready to run on the CPU.

    Quantized weights are shared with the modules they come from where those hold the same layout; float weights are copied into
    it. Weights changed in the model later are not noticed: make a new decoder.

    Args:
        program: what to run.
        threads: at most this many; None is torch's number at each call.

    Raises:
        KernelError: the program cannot run here (:func:`rejects` says why), or the library cannot be built.
    """

    def __init__(self, program: Program, *, threads: int | None = None) -> None:
        if reason := rejects(program):
            raise KernelError(f"{program.name}: {reason}")
        self.program, self.threads = program, threads
        self._library = build.library()
        self._multiplies_bfloat16 = bool(self._library.qk_multiplies_bfloat16())
        self._turn = threading.Lock()  # scratch memory is shared by all steps
        self._laid_out = structs.LaidOut(program)
        self._struct = self._laid_out.struct
        self._planes = False
        self._tokens = 0
        self._scratch = torch.empty(0, dtype=torch.uint8)
        self._scratch_size = (0, 0, 0)

    def run(
        self, rows: Rows, kv: KvPages, *, exact: bool = True, bfloat16: bool = False, argmax: bool = False, draft: bool = False
    ) -> Tensor:
        """Read the rows, append their keys and values to ``kv``, and return what comes after the wanted ones.

        Args:
            rows: what to read.
            kv: pages of this program; those that the rows' positions fall on must be theirs to write.
            exact: float activations; False rounds them to int8 before quantized weights.
            bfloat16: round them to bfloat16 before bfloat16 weights, where that is faster.
            argmax: return the most likely tokens instead of logits.
            draft: read only the high plane of weights that are in planes (:meth:`split_planes`).

        Returns:
            float32 logits (wanted, vocabulary), or int32 token ids (wanted,).

        Raises:
            KernelError: ids, positions or pages out of range.
        """
        tokens, positions, slots, wanted = (
            np.ascontiguousarray(part, dtype=np.int32) for part in (rows.tokens, rows.positions, rows.slots, rows.wanted)
        )
        table = np.ascontiguousarray(rows.block_table, dtype=np.int32)
        longest = self._check(tokens, positions, slots, wanted, table, kv)
        looked_up = None
        if not isinstance(self.program.embedding, Tensor):  # the rows of a quantized table, one for each token
            looked_up, tokens = self.program.rows(torch.from_numpy(tokens).long()), np.arange(len(tokens), dtype=np.int32)
        logits = torch.empty(len(wanted), self.program.vocabulary)
        best = torch.empty(len(wanted), dtype=torch.int32)
        threads = self.threads or torch.get_num_threads()
        chunks = -(-longest // CHUNK_TOKENS) + 1
        kv.struct.block_table, kv.struct.table_stride = table.ctypes.data, table.shape[1]
        batch = structs.BatchStruct(
            len(tokens),
            *(part.ctypes.data for part in (tokens, positions, slots, wanted)),
            len(wanted),
            self.program.vocabulary,
            logits.data_ptr(),
            best.data_ptr() if argmax else None,
            chunks,
            (0 if exact else _TO_INT8) | (_TO_BFLOAT16 if bfloat16 and self._multiplies_bfloat16 else 0),
            BLOCK,
            draft,
        )
        with self._turn:
            if looked_up is not None:
                self._struct.embedding = looked_up.data_ptr()
            self._lengthen(longest)
            scratch = self._memory(len(tokens), chunks, threads)
            self._library.qk_decoder_run(
                ctypes.addressof(self._struct), ctypes.addressof(batch), ctypes.addressof(kv.struct), scratch, threads
            )
        return best if argmax else logits

    def split_planes(self) -> bool:
        """Put 8-bit codes into two planes (:func:`quantkit.kernels.cpu.layout.split`), so that a draft has less to read.

        Results stay the same to the last bit. Returns whether any weight is in planes now.
        """
        weights: list[Any] = [linear.weight for linear in self.program.linears() if not isinstance(linear.weight, Tensor)]
        weights = [weight for weight in dict.fromkeys(weights) if weight.spec.bits == 8]
        with self._turn:
            if weights and not self._planes:
                del self._laid_out  # so that a weight's whole codes go when it has its planes, not when all have
                try:
                    self._planes = any([weight.split_planes() for weight in weights])
                finally:
                    self._laid_out = structs.LaidOut(self.program)
                    self._struct, self._tokens = self._laid_out.struct, 0
        return self._planes

    def _check(self, tokens: Any, positions: Any, slots: Any, wanted: Any, table: Any, kv: KvPages) -> int:
        """Check everything the native code relies on; return the length of the longest sequence."""
        count = len(tokens)
        if not count or len(positions) != count or len(slots) != count or len(wanted) > count or table.ndim != 2:
            raise KernelError(
                f"{count} tokens, {len(positions)} positions, {len(slots)} slots, {len(wanted)} wanted rows, block table "
                f"{table.shape}: want at least one row, as many of the first three, no more wanted, and a table of two axes"
            )
        longest = int(positions.max()) + 1
        for name, values, limit in (
            ("token", tokens, self.program.tokens),
            ("position", positions, min(table.shape[1] * PAGE_TOKENS, self.program.max_tokens or 1 << 31)),
            ("slot", slots, table.shape[0]),
            *((("wanted row", wanted, count),) if len(wanted) else ()),
        ):
            if values.min() < 0 or values.max() >= limit:
                raise KernelError(f"{name}s from {values.min()} to {values.max()}; want 0 to {limit - 1}")
        used = table[slots, : -(-longest // PAGE_TOKENS)]
        if not self._pages_fit(used, positions, kv.pages):
            raise KernelError(f"the block table points at pages beyond the {kv.pages} there are")
        if len(kv.keys) != len(self.program.layers):
            raise KernelError(f"the pages are of {len(kv.keys)} layers, the program has {len(self.program.layers)}")
        return longest

    @staticmethod
    def _pages_fit(used: Any, positions: Any, pages: int) -> bool:
        if used.min() >= 0 and used.max() < pages:
            return True
        real = np.arange(used.shape[1]) <= positions[:, None] // PAGE_TOKENS  # beyond a row's position anything may stand
        return bool(((used >= 0) & (used < pages))[real].all())

    def _memory(self, rows: int, chunks: int, threads: int) -> int:
        """Return the address of enough scratch memory."""
        had = self._scratch_size
        want = (max(rows, had[0]), max(chunks, had[1]), max(threads, had[2]))
        if want != had:
            size = self._library.qk_decoder_bytes(ctypes.addressof(self._struct), *want[:2], BLOCK, want[2])
            self._scratch = huge_pages.allocate(size)
            self._scratch_size = want
        return self._scratch.data_ptr()

    def _lengthen(self, tokens: int) -> None:
        """Compute rotary tables for at least ``tokens`` positions."""
        if tokens <= self._tokens:
            return
        size = min(max(tokens, 2 * self._tokens, 2048), self.program.max_tokens or 1 << 31)
        array = (structs.RotaryStruct * max(len(self.program.rotaries), 1))()
        self._tables = [rotary.tables(size) for rotary in self.program.rotaries]
        for struct, rotary, (cos, sin) in zip(array, self.program.rotaries, self._tables, strict=False):
            struct.cos, struct.sin = cos.data_ptr(), sin.data_ptr()
            struct.length, struct.dim, struct.interleaved = size, rotary.dim, rotary.interleaved
        self._rotaries = array
        self._struct.rotaries = ctypes.addressof(array)
        self._tokens = size
