"""Run a decoder program on the CPU: one native call per step, for any rows of any sequences.

A :class:`NativeDecoder` converts a program's weights to the kernels' layout (``kernels/cpu/layout.py``) and describes the
program to ``csrc/decoder.cpp`` as plain structs (``kernels/cpu/structs.py``). :meth:`NativeDecoder.run` takes rows, each a
token at a position of a sequence, and the sequences' keys and values in pages (:class:`KvPages`) that the caller allocates to
sequences. A decode step of one sequence, a prefill chunk, the ragged batch of a scheduler and the verification of drafts are
the same call. The logits of a row depend neither on the other rows nor on the number of threads, bit for bit.

With ``exact``, activations stay float32 and only the order of sums differs from the program's definition. Otherwise they are
rounded to int8 in products with quantized weights, with one scale per :data:`~quantkit.kernels.cpu.matmul.BLOCK` columns;
:mod:`quantkit.kernels.cpu.matmul` states the error. With ``bfloat16``, they are rounded to bfloat16 in products with quantized
and bfloat16 weights, as a bfloat16 model rounds its own activations, if this CPU multiplies bfloat16 faster than float32; sums
are float32. Inputs that a scheme rounds (W8A8, FP8 and the like) are rounded by its rule, whatever the call says.
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
from quantkit.kernels.cpu import huge_pages, layout, structs
from quantkit.kernels.cpu.layout import Prepacked
from quantkit.kernels.cpu.matmul import BLOCK
from quantkit.kernels.cpu.tables import rejects_inputs
from quantkit.kernels.cpu.tape_structs import LaidOutTape
from quantkit.kernels.program.definition import Program
from quantkit.kernels.program.tape import Tape
from quantkit.spec import QuantSpec

PAGE_TOKENS: Final = 32
"""Tokens per page of keys and values."""

CHUNK_TOKENS: Final = 128
"""Keys per partial softmax in ``attention.cpp``."""

MAX_HEAD_DIM: Final = 512

_TO_INT8, _TO_BFLOAT16 = 2, 4  # flags of what activations may be rounded to: 1 << Form of linear.h

KV_DTYPES: Final = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}
"""How keys and values can be stored, in the order of ``KvKind`` in decoder.h; int8 has a float32 scale per token and head."""


def rejects(program: Program | Tape) -> str | None:
    """Return why the CPU kernels cannot run ``program``, or None if they can. Compiles the library on first use."""
    if program.rope_switch is not None:
        return f"its rotary tables depend on the length of a sequence (they change at {program.rope_switch} tokens)"
    for index, cache in enumerate(program.caches):
        if (most := max(cache.key_dim, cache.value_dim)) > MAX_HEAD_DIM:
            return f"layer {index}: heads have {most} channels, want at most {MAX_HEAD_DIM}"
    for linear in program.linears():
        weight: Any = linear.weight
        if weight.device.type != "cpu":
            return f"weights are on {weight.device}, not on the CPU"
        if isinstance(weight, Tensor):
            continue
        if not isinstance(weight.spec, QuantSpec):
            return f"weights are {weight.spec.describe()}, want a grid"
        if reason := layout.rejects(weight.spec, linear.shape):
            return reason
        if reason := rejects_inputs(weight.activation, linear.shape[1]):  # verification would not notice: modules round as well
            return f"{reason} (load with ignore_activations=True to keep them in float)"
    try:
        build.library()
    except KernelError as error:
        return str(error)
    return None


class KvPages:
    """Keys and values of all layers and many sequences, in pages of :data:`PAGE_TOKENS` tokens.

    A page number denotes the same page in every layer. Memory is not cleared: a position must be written before it is read.

    Args:
        program: gives the number of layers and the sizes of heads.
        pages: number of pages.
        dtype: a key of :data:`KV_DTYPES`.
        slots: sequences whose states there is room for.

    Attributes:
        keys, values: per layer, (pages, kv_heads, head_dim, PAGE_TOKENS) and (pages, kv_heads, PAGE_TOKENS, head_dim).
        key_scales, value_scales: per layer, float32 (pages, kv_heads, PAGE_TOKENS); empty lists unless int8.
        states: of every state of the program, float32 (slots, size); zero for a new sequence (:meth:`clear`).

    Raises:
        KernelError: an unknown dtype.
    """

    def __init__(self, program: Program | Tape, pages: int, *, dtype: str = "float32", slots: int = 1) -> None:
        if dtype not in KV_DTYPES:
            raise KernelError(f"keys and values stored as {dtype!r}: want one of {', '.join(KV_DTYPES)}")
        self.dtype, self.pages = dtype, 0
        self._caches = program.caches
        self.states = [torch.zeros(slots, size) for size in program.states]
        self.state_array = (ctypes.c_void_p * max(len(self.states), 1))(*(state.data_ptr() for state in self.states))
        self.places = np.zeros(1, dtype=np.int32)
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.key_scales: list[Tensor] = []
        self.value_scales: list[Tensor] = []
        self.grow(pages)

    def grow(self, pages: int) -> None:
        """Enlarge the memory to ``pages`` pages in total; existing pages keep their content."""
        if pages <= self.pages:
            return
        stored = KV_DTYPES[self.dtype]
        k_shapes = [(pages, one.kv_heads, one.key_dim, PAGE_TOKENS) for one in self._caches]
        v_shapes = [(pages, one.kv_heads, PAGE_TOKENS, one.value_dim) for one in self._caches]
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
        parts = (*self.keys, *self.values, *self.key_scales, *self.value_scales, *self.states)
        return sum(tensor.nbytes for tensor in parts)

    def clear(self, slot: int) -> None:
        """Set the states of a slot to those of a new sequence."""
        for state in self.states:
            state[slot] = 0.0


def _grown(old: list[Tensor], shapes: Sequence[tuple[int, ...]], dtype: torch.dtype) -> list[Tensor]:
    sizes = [math.prod(shape) for shape in shapes]
    whole = huge_pages.allocate(sum(sizes) * dtype.itemsize).view(
        dtype
    )  # one mapping for all layers: one layer may be smaller than a huge page
    tensors = [part.view(shape) for part, shape in zip(whole.split(sizes), shapes, strict=True)]
    for tensor, before in zip(tensors, old, strict=False):
        tensor[: len(before)] = before
    return tensors


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows of one call: row i is the token ``tokens[i]`` at ``positions[i]`` of the sequence in slot ``slots[i]``.

    All earlier positions of a sequence must have been run by earlier calls, or be rows of this one. Rows of one sequence are
    fastest if they are neighbours.

    Attributes:
        tokens, positions, slots: one integer per row.
        block_table: integers (slots, pages per sequence); ``block_table[s, p // PAGE_TOKENS]`` is the page of position p.
        logit_rows: indices of the rows whose logits are returned, in this order.
        states: where the states of each slot's sequence are; None for its own number. Rows of one sequence are in order.
    """

    tokens: Sequence[int] | Tensor
    positions: Sequence[int] | Tensor
    slots: Sequence[int] | Tensor
    block_table: np.ndarray[Any, Any] | Tensor
    logit_rows: Sequence[int] | Tensor
    states: Sequence[int] | None = None


class NativeDecoder:
    """A program prepared for the CPU kernels.

    Quantized weights are shared with their modules if those use the same layout; float weights are copied. If weights of the
    model change later, a new decoder is needed.

    Args:
        program: the program to run.
        threads: largest number of threads; None for torch's number at the time of each call.

    Raises:
        KernelError: the program cannot run here (:func:`rejects` says why), or the library cannot be built.
    """

    def __init__(self, program: Program | Tape, *, threads: int | None = None) -> None:
        if reason := rejects(program):
            raise KernelError(f"{program.name}: {reason}")
        self.program, self.threads = program, threads
        self._library = build.library()
        self._multiplies_bfloat16 = bool(self._library.qk_multiplies_bfloat16())
        self._lock = threading.Lock()  # one step at a time: they share the scratch memory
        self._laid_out = _laid_out(program)
        self._planes = False
        self._tokens = 0
        self._scratch = torch.empty(0, dtype=torch.uint8)
        self._scratch_size = (0, 0, 0)

    @property
    def weights(self) -> list[Prepacked]:
        """All weights in the kernels' layout; quantized ones are shared with their modules where possible."""
        return self._laid_out.weights

    def run(
        self, rows: Rows, kv: KvPages, *, exact: bool = True, bfloat16: bool = False, argmax: bool = False, draft: bool = False
    ) -> Tensor:
        """Run the rows, write their keys and values to ``kv``, and return the logits of the selected rows.

        Args:
            rows: the rows.
            kv: pages for this program; the pages at the rows' positions are written.
            exact: keep float activations; False rounds them to int8 in products with quantized weights.
            bfloat16: round activations to bfloat16 in products with other than float32 weights, where that is faster.
            argmax: return the most likely tokens instead of logits.
            draft: read only the high plane of weights that are stored in planes (:meth:`split_planes`).

        Returns:
            float32 (R, V) logits, or int32 (R,) token ids; R is the number of ``logit_rows``.

        Raises:
            KernelError: no rows, or tokens, positions, slots or pages out of range.
        """
        tokens, positions, slots, logit_rows = (
            np.ascontiguousarray(part, dtype=np.int32) for part in (rows.tokens, rows.positions, rows.slots, rows.logit_rows)
        )
        table = np.ascontiguousarray(rows.block_table, dtype=np.int32)
        longest = self._check(tokens, positions, slots, logit_rows, table, kv)
        if self._laid_out.one_by_one and len(set(slots.tolist())) < len(slots):
            options = {"exact": exact, "bfloat16": bfloat16, "argmax": argmax, "draft": draft}
            return self._one_by_one(rows, tokens, positions, slots, logit_rows.tolist(), kv, options)
        logits = torch.empty(len(logit_rows), self.program.vocabulary)
        best = torch.empty(len(logit_rows), dtype=torch.int32)
        threads = self.threads or torch.get_num_threads()
        chunks = -(-longest // CHUNK_TOKENS) + 1
        kv.struct.block_table, kv.struct.table_stride = table.ctypes.data, table.shape[1]
        kv.places = np.ascontiguousarray(range(len(table)) if rows.states is None else rows.states, dtype=np.int32)
        with self._lock:
            tokens = self._laid_out.look_up(tokens)
            batch = structs.BatchStruct(
                len(tokens),
                *(part.ctypes.data for part in (tokens, positions, slots, logit_rows)),
                len(logit_rows),
                self.program.vocabulary,
                logits.data_ptr(),
                best.data_ptr() if argmax else None,
                chunks,
                (0 if exact else _TO_INT8) | (_TO_BFLOAT16 if bfloat16 and self._multiplies_bfloat16 else 0),
                BLOCK,
                draft,
            )
            self._lengthen(longest)
            self._laid_out.run(self._library, batch, kv, self._memory(len(tokens), chunks, threads), threads)
        return best if argmax else logits

    def _one_by_one(
        self, rows: Rows, tokens: Any, positions: Any, slots: Any, wanted: list[int], kv: KvPages, options: dict[str, bool]
    ) -> Tensor:
        """Run calls with one row of every sequence, in order."""
        turn = [int((slots[:i] == slot).sum()) for i, slot in enumerate(slots)]
        found: dict[int, Tensor] = {}
        for now in range(max(turn) + 1):
            some = [i for i, own in enumerate(turn) if own == now]
            asked = [i for i in wanted if turn[i] == now]
            places = [some.index(i) for i in asked]
            part = Rows(tokens[some], positions[some], slots[some], rows.block_table, places, rows.states)
            found |= dict(zip(asked, self.run(part, kv, **options), strict=True))
        return torch.stack([found[i] for i in wanted]) if wanted else torch.empty(0, self.program.vocabulary)

    def split_planes(self) -> bool:
        """Store 8-bit codes in two planes (:func:`quantkit.kernels.cpu.layout.split`), so that drafts read fewer bytes.

        Results of exact steps stay the same bit for bit.

        Returns:
            Whether any weight is stored in planes now.
        """
        weights: list[Any] = [linear.weight for linear in self.program.linears() if not isinstance(linear.weight, Tensor)]
        weights = [weight for weight in dict.fromkeys(weights) if weight.spec.bits == 8]
        with self._lock:
            if weights and not self._planes:
                del self._laid_out  # frees the old codes of each weight as soon as its planes exist
                try:
                    self._planes = any([weight.split_planes() for weight in weights])
                finally:
                    self._laid_out, self._tokens = _laid_out(self.program), 0
        return self._planes

    def _check(self, tokens: Any, positions: Any, slots: Any, logit_rows: Any, table: Any, kv: KvPages) -> int:
        """Check everything that the native code does not check; return the length of the longest sequence."""
        count = len(tokens)
        if not count or len(positions) != count or len(slots) != count or len(logit_rows) > count or table.ndim != 2:
            raise KernelError(
                f"{count} tokens, {len(positions)} positions, {len(slots)} slots, {len(logit_rows)} logit rows, block table "
                f"{table.shape}: want at least one token, equal numbers of the first three, at most as many logit rows, and a "
                "table of two axes"
            )
        longest = int(positions.max()) + 1
        for name, values, limit in (
            ("token", tokens, self.program.tokens),
            ("position", positions, min(table.shape[1] * PAGE_TOKENS, self.program.max_tokens or 1 << 31)),
            ("slot", slots, table.shape[0]),
            *((("logit row", logit_rows, count),) if len(logit_rows) else ()),
        ):
            if values.min() < 0 or values.max() >= limit:
                raise KernelError(f"{name}s from {values.min()} to {values.max()}; want 0 to {limit - 1}")
        used = table[slots, : -(-longest // PAGE_TOKENS)]
        if not self._pages_fit(used, positions, kv.pages):
            raise KernelError(f"the block table has pages outside 0 to {kv.pages - 1}")
        if len(kv.keys) != len(self.program.caches):
            raise KernelError(f"the pages have {len(kv.keys)} layers, the program has {len(self.program.caches)}")
        return longest

    @staticmethod
    def _pages_fit(used: Any, positions: Any, pages: int) -> bool:
        if used.min() >= 0 and used.max() < pages:
            return True
        real = np.arange(used.shape[1]) <= positions[:, None] // PAGE_TOKENS  # entries beyond a row's position may be arbitrary
        return bool(((used >= 0) & (used < pages))[real].all())

    def _memory(self, rows: int, chunks: int, threads: int) -> int:
        """Return the address of the scratch memory, enlarged if this call needs more."""
        had = self._scratch_size
        want = (max(rows, had[0]), max(chunks, had[1]), max(threads, had[2]))
        if want != had:
            size = self._laid_out.bytes(self._library, *want[:2], BLOCK, want[2])
            self._scratch = huge_pages.allocate(size)
            self._scratch_size = want
        return self._scratch.data_ptr()

    def _lengthen(self, tokens: int) -> None:
        """Make sure that the rotary tables have at least ``tokens`` positions."""
        if tokens <= self._tokens:
            return
        size = min(max(tokens, 2 * self._tokens, 2048), self.program.max_tokens or 1 << 31)
        self._laid_out.lengthen(size)
        self._tokens = size


def _laid_out(program: Program | Tape) -> structs.LaidOut | LaidOutTape:
    return LaidOutTape(program) if isinstance(program, Tape) else structs.LaidOut(program)
