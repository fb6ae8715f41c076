"""The CUDA backend: run a decoder program with CUDA graphs for decoding, and without them for prompts.

A decoding step has a few tokens (one, or one and its drafts) of each of several sequences. It is a CUDA graph, captured once
for each row count in :data:`CudaBackend.RECORDED_ROWS`; a step uses the smallest graph that is large enough. Unused rows have
position -1: they write nothing and read zeros. Tokens, positions, slots and sampling parameters of a step go to the device in
one copy, block tables in another one when a sequence has new pages. Tokens are sampled within the step and kept on the device
by slot, so the next step can start at once. The host waits for the device only when tokens or logits are read.

Steps that contain a chunk of a prompt are not captured: their products are large enough to hide the host's work. In such a step
short spans come first, and longer ones are split into tiles whose tokens attend together.
"""

from collections.abc import Sequence
from typing import Final, NamedTuple

import torch
from torch import Tensor

from quantkit.engine.backend import LAST_SAMPLED, Copy, Memory, RowSampling, Span
from quantkit.errors import KernelError, QuantkitError
from quantkit.kernels.cuda import ops
from quantkit.kernels.cuda.attention import PAGE_TOKENS, LayerPages, Where, cut
from quantkit.kernels.cuda.decoder import CudaDecoder, Prompts
from quantkit.kernels.cuda.graph import record
from quantkit.kernels.functions.sampling import Draw


class _Rows(NamedTuple):
    """Spans as rows, short spans first.

    Attributes:
        tokens, positions, slots: one integer per row.
        logit_rows: rows whose logits are returned, in the order of the spans.
        singles: number of rows that belong to short spans.
        tiles: first row and number of rows of each tile of the longer spans.
    """

    tokens: list[int]
    positions: list[int]
    slots: list[int]
    logit_rows: list[int]
    singles: int
    tiles: list[tuple[int, int]]


class _Inputs:
    """The inputs of a step, in one tensor so that they take one copy to the device.

    Attributes:
        words: int32 (9 * rows,), all inputs.
        tokens, positions, slots: int32 (rows,), views; token -1 is the one that was sampled last in the slot.
        draw: how the token after each row is sampled, views.
    """

    def __init__(self, words: Tensor) -> None:
        rows = len(words) // 9
        self.words, seed = words, words[: 2 * rows].view(torch.int64)
        self.tokens, self.positions, self.slots, *numbers = words[2 * rows :].view(7, rows)
        temperature, rest, min_p = (part.view(torch.float32) for part in (numbers[0], *numbers[2:]))
        self.draw = Draw(temperature, numbers[1], rest, min_p, seed)

    @classmethod
    def of(cls, rows: _Rows, size: int, samplings: Sequence[RowSampling] | None) -> "_Inputs":
        """Return the inputs of ``rows`` on the host, followed by unused rows up to ``size`` in all."""
        inputs, count = cls(torch.zeros(9 * size, dtype=torch.int32)), len(rows.tokens)
        tokens, positions, slots = (part.numpy() for part in (inputs.tokens, inputs.positions, inputs.slots))
        tokens[:count], positions[:count], slots[:count] = rows.tokens, rows.positions, rows.slots
        positions[count:] = -1
        if samplings:
            drawn = Draw.of([one.sampling for one in samplings], [one.seed for one in samplings], "cpu")
            for part, numbers in zip(inputs.draw, drawn, strict=True):
                part[rows.logit_rows] = numbers
        return inputs


class _Recorded:
    """A captured step with a fixed number of rows; not captured on devices other than CUDA."""

    def __init__(self, backend: "CudaBackend", rows: int) -> None:
        self.inputs = _Inputs(torch.zeros(9 * rows, dtype=torch.int32, device=backend.device))
        self.inputs.positions.fill_(-1)  # during the capture, all rows are unused and write nothing
        self._backend, self._graph = backend, None
        if backend.device.type == "cuda":
            self._graph, self._results = record(self._step, backend.stream, pool=backend.pool)

    def run(self) -> tuple[Tensor, Tensor]:
        """Run the step; return logits and sampled tokens of all rows, which the next run overwrites."""
        if self._graph is None:
            return self._step()
        self._graph.replay()
        return self._results

    def _step(self) -> tuple[Tensor, Tensor]:
        return self._backend.run(self.inputs)


class _CudaLaunchedStep:
    """A running step; see :class:`quantkit.engine.backend.LaunchedStep`.

    Args:
        logits, chosen: logits and sampled tokens.
        logit_rows: which rows of them to return; None for all.
    """

    def __init__(self, logits: Tensor, chosen: Tensor, logit_rows: list[int] | None) -> None:
        self._logits, self._logit_rows = logits, logit_rows
        self._chosen, self._copied = chosen, None
        if chosen.is_cuda:
            self._chosen = torch.empty(chosen.shape, dtype=chosen.dtype, pin_memory=True)
            self._chosen.copy_(chosen, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record(torch.cuda.current_stream(chosen.device))

    def tokens(self) -> list[int]:
        """See :class:`~quantkit.engine.backend.LaunchedStep`."""
        if self._copied is not None:
            self._copied.synchronize()
        tokens: list[int] = self._chosen.tolist()
        return tokens if self._logit_rows is None else [tokens[row] for row in self._logit_rows]

    def logits(self) -> Tensor:
        """See :class:`~quantkit.engine.backend.LaunchedStep`."""
        return _select_rows(self._logits, self._logit_rows)


def _select_rows(logits: Tensor, logit_rows: list[int] | None) -> Tensor:
    """Return a copy of the given rows, which the next step does not overwrite; all rows as they are for None."""
    if logit_rows is None:
        return logits
    if logit_rows == list(range(len(logit_rows))):
        return logits[: len(logit_rows)].clone()
    return logits[torch.tensor(logit_rows).to(logits.device, non_blocking=True)]


class CudaBackend:
    """Run a program for many sequences, with keys and values in pages on the device.

    On devices other than CUDA, as in tests, steps compute the same without being captured.

    Args:
        decoder: the program, prepared for the CUDA kernels. Several backends may share it.
        kv: how keys and values are stored, one of :data:`quantkit.kernels.cuda.attention.KINDS`.
        context_tokens: longest sequence that the model supports.
        batch_invariant: give a sequence the same tokens whatever runs beside it, with and without drafts, and after a
            preemption. Every row is then computed alone, in a fixed order; decoding is slightly slower, and reading prompts
            several times slower.

    Attributes:
        engine: name of the implementation, for reports.
        pages: keys and values of each layer; empty before :meth:`reserve`.
    """

    RECORDED_ROWS: Final = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128)
    SHORT_TOKENS: Final = 8
    """Longest span whose tokens attend one by one: a token and its drafts."""

    shares_pages = rewinds = True
    notice = None
    engine = "cuda"

    def __init__(
        self, decoder: CudaDecoder, *, kv: str = "float", context_tokens: int | None = None, batch_invariant: bool = False
    ) -> None:
        self.decoder, self.device, self.context_tokens = decoder, decoder.device, context_tokens
        self._kind, self._batch_invariant = kv, batch_invariant
        self._memory: Memory | None = None
        self.pages: list[LayerPages] = []
        self._table = self._newest = torch.empty(0, dtype=torch.int32)
        self._known: list[list[int]] = []  # the host's copy of the block tables, by slot
        self._recorded: dict[int, _Recorded] = {}
        if self.device.type == "cuda":
            self.stream, self.pool = torch.cuda.Stream(self.device), torch.cuda.graph_pool_handle()

    def reserve(self, memory: Memory) -> None:
        """Allocate the pages.

        Raises:
            QuantkitError: a page size other than the kernels'.
        """
        if memory.page_tokens != PAGE_TOKENS:
            raise QuantkitError(
                f"page_tokens={memory.page_tokens}: the CUDA engine supports {PAGE_TOKENS} only; "
                "leave page_tokens out, or use engine='modules'"
            )
        if memory == self._memory:
            return  # the pages may keep their content, and the captured graphs remain valid
        self._recorded, self.pages, self._memory = {}, [], memory
        if self.device.type == "cuda":
            self.pool = torch.cuda.graph_pool_handle()  # that of the graphs just dropped has no more use
        longest = min(self._longest, memory.pages * PAGE_TOKENS)
        self.decoder.lengthen(longest)
        self.pages = self.decoder.pages(memory.pages, self._kind)
        self._known = [[] for _ in range(memory.slots)]
        self._newest = torch.zeros(memory.slots, dtype=torch.int32, device=self.device)
        self._table = torch.zeros((memory.slots, -(-longest // PAGE_TOKENS)), dtype=torch.int32, device=self.device)

    def bytes_for(self, memory: Memory) -> int:
        """Return the number of bytes that :meth:`reserve` allocates for ``memory``."""
        return sum(pages.nbytes for pages in self.decoder.pages(memory.pages, self._kind, "meta"))

    @property
    def captured_rows(self) -> list[int]:
        """Row counts of the steps that have been captured so far."""
        return list(self._recorded)

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values that are allocated now."""
        return sum(pages.nbytes for pages in self.pages)

    def step(self, spans: Sequence[Span], copies: Sequence[Copy] = ()) -> Tensor:
        """Run ``spans``; see :class:`~quantkit.engine.backend.Backend`."""
        logits, _, logit_rows = self._start(spans, copies, None)
        return _select_rows(logits, logit_rows)

    def launch(self, spans: Sequence[Span], copies: Sequence[Copy], samplings: Sequence[RowSampling]) -> _CudaLaunchedStep:
        """Start a step; see :class:`~quantkit.engine.backend.SamplingBackend`."""
        return _CudaLaunchedStep(*self._start(spans, copies, samplings))

    @torch.no_grad()
    def _start(
        self, spans: Sequence[Span], copies: Sequence[Copy], samplings: Sequence[RowSampling] | None
    ) -> tuple[Tensor, Tensor, list[int] | None]:
        """Start a step; return logits, sampled tokens, and the rows of them to return (None for all)."""
        assert self._memory is not None, "call reserve first"
        for source, target, _ in copies:
            for stored in (part for pages in self.pages for part in pages[:4] if part is not None):
                stored[target] = stored[source]
        rows = self._lay_out(spans)
        self._check(rows)
        self._update_table(spans)
        count = len(rows.tokens)
        if rows.tiles or count > self.RECORDED_ROWS[-1]:
            prompts = Prompts(rows.singles, self._on_device(rows.tiles)) if rows.tiles else None
            inputs = _Inputs(_Inputs.of(rows, count, samplings).words.to(self.device, non_blocking=True))
            return *self.run(inputs, self._on_device(rows.logit_rows, torch.int64), prompts), None
        size = next(size for size in self.RECORDED_ROWS if size >= count)
        if size not in self._recorded:
            self._recorded[size] = _Recorded(self, size)
        recorded = self._recorded[size]
        recorded.inputs.words.copy_(_Inputs.of(rows, size, samplings).words, non_blocking=True)
        return *recorded.run(), rows.logit_rows

    def run(self, inputs: _Inputs, logit_rows: Tensor | None = None, prompts: Prompts | None = None) -> tuple[Tensor, Tensor]:
        """Run rows on the device.

        Args:
            inputs: the rows.
            logit_rows: int64, rows to return; None for all.
            prompts: which rows belong to longer spans; None for none.

        Returns:
            Logits (R, V) and sampled tokens int32 (R,).
        """
        positions, slots, draw = inputs.positions, inputs.slots, inputs.draw
        tokens = torch.where(inputs.tokens < 0, self._newest[slots], inputs.tokens)
        where = Where(positions, slots, self._table)
        logits, bests = self.decoder.step(tokens, where, self.pages, logit_rows, prompts, batch_invariant=self._batch_invariant)
        if logit_rows is not None:
            positions, slots, draw = positions[logit_rows], slots[logit_rows], Draw(*(part[logit_rows] for part in draw))
        chosen = ops.ops().next_tokens(logits.contiguous(), *draw, positions, slots, self._newest, bests)
        return logits, chosen

    @property
    def _longest(self) -> int:
        known = [limit for limit in (self.context_tokens, self.decoder.program.max_tokens) if limit]
        return min(known, default=1 << 30)

    def _lay_out(self, spans: Sequence[Span]) -> _Rows:
        short = sum(len(span.ids) for span in spans if self._batch_invariant or len(span.ids) <= self.SHORT_TOKENS)
        rows = _Rows([], [], [], [], short, [])
        first: dict[int, int] = {}
        for index in sorted(range(len(spans)), key=lambda i: len(spans[i].ids) > self.SHORT_TOKENS):
            span, size = spans[index], self.decoder.tile_tokens
            first[index], count = len(rows.tokens), len(span.ids)
            if count > self.SHORT_TOKENS and not self._batch_invariant:
                rows.tiles.extend(cut(first[index], count, size))
            rows.tokens.extend(span.ids)
            rows.positions.extend(range(span.start, span.start + count))
            rows.slots.extend([span.slot] * count)
        for index, span in enumerate(spans):
            end = first[index] + len(span.ids)
            rows.logit_rows.extend(range(end - span.num_logits, end))
        return rows

    def _check(self, rows: _Rows) -> None:
        """Check the bounds that the kernels do not check.

        Raises:
            KernelError: a token, position or slot is out of range.
        """
        for name, values, least, limit in (
            ("token", rows.tokens, LAST_SAMPLED, self.decoder.program.tokens),
            ("position", rows.positions, 0, min(self._table.shape[1] * PAGE_TOKENS, self.decoder.context_tokens)),
            ("slot", rows.slots, 0, len(self._known)),
        ):
            if min(values) < least or max(values) >= limit:
                raise KernelError(f"{name}s from {min(values)} to {max(values)}; want 0 to {limit - 1}")

    def _update_table(self, spans: Sequence[Span]) -> None:
        """Copy the block tables that have changed to the device.

        Raises:
            KernelError: a page number is out of range.
        """
        assert self._memory is not None
        for span in spans:
            table = list(span.table[: -(-(span.start + len(span.ids)) // PAGE_TOKENS)])
            known = self._known[span.slot]
            if known[: len(table)] == table:
                continue
            if min(table) < 0 or max(table) >= self._memory.pages:
                raise KernelError(
                    f"the block table has pages from {min(table)} to {max(table)}; want 0 to {self._memory.pages - 1}"
                )
            self._table[span.slot, : len(table)].copy_(torch.tensor(table, dtype=torch.int32), non_blocking=True)
            self._known[span.slot] = table

    def _on_device(self, values: Sequence[object], dtype: torch.dtype = torch.int32) -> Tensor:
        """Copy numbers to the device, without waiting for the copy."""
        return torch.tensor(values, dtype=dtype).to(self.device, non_blocking=True)
