"""A decoder program on CUDA as a :class:`quantkit.engine.backend.Backend`: recorded steps for decoding, one pass for prompts.

Decoding is short runs of tokens (one, or one and its drafts) of several sequences. Such a step is a CUDA graph, recorded once
for each of :data:`CudaBackend.RECORDED_ROWS` rows, the next larger number of which is taken: rows that are too many stand at
position -1, where they write nothing and read zeros. A step's tokens, positions, slots and how to draw go to the device in one
copy, pages in another when a sequence has got new ones. Tokens are chosen in the step and kept on the device by slot, so that
the next step can follow at once; nothing waits for the device until somebody reads tokens or logits.

Steps with a longer run in them (a chunk of a prompt) are not recorded: their products are large enough to hide the host. Short
runs come first in them, longer ones are cut into tiles that attend together.
"""

from collections.abc import Sequence
from typing import Final, NamedTuple

import torch
from torch import Tensor

from quantkit.engine.backend import CHOSEN, Copy, Memory, Pick, Span
from quantkit.errors import KernelError, QuantkitError
from quantkit.kernels.cuda import ops
from quantkit.kernels.cuda.attention import PAGE_TOKENS, Pages, Where, cut
from quantkit.kernels.cuda.decoder import CudaDecoder, Prompts
from quantkit.kernels.cuda.graph import record
from quantkit.kernels.functions.sampling import Draw


class _Rows(NamedTuple):
    """Spans as rows: short ones first.

    Attributes:
        tokens, positions, slots: one integer per row.
        wanted: rows whose logits are wanted, in the order of the spans.
        singles: rows of short spans.
        tiles: first row and number of rows.
    """

    tokens: list[int]
    positions: list[int]
    slots: list[int]
    wanted: list[int]
    singles: int
    tiles: list[tuple[int, int]]


class _Inputs:
    """What the device is told about some rows, in one copy.

    Attributes:
        words: int32 (9 * rows,): all of it.
        tokens, positions, slots: int32 (rows,); token -1 is the one that was chosen last in the slot.
        draw: how a token is chosen after each row.
    """

    def __init__(self, words: Tensor) -> None:
        rows = len(words) // 9
        self.words, seed = words, words[: 2 * rows].view(torch.int64)
        self.tokens, self.positions, self.slots, *numbers = words[2 * rows :].view(7, rows)
        temperature, rest, min_p = (part.view(torch.float32) for part in (numbers[0], *numbers[2:]))
        self.draw = Draw(temperature, numbers[1], rest, min_p, seed)

    @classmethod
    def of(cls, rows: _Rows, size: int, picks: Sequence[Pick] | None) -> "_Inputs":
        """Lay rows out on the host, and after them, up to ``size``, some that stand nowhere."""
        inputs, count = cls(torch.zeros(9 * size, dtype=torch.int32)), len(rows.tokens)
        tokens, positions, slots = (part.numpy() for part in (inputs.tokens, inputs.positions, inputs.slots))
        tokens[:count], positions[:count], slots[:count] = rows.tokens, rows.positions, rows.slots
        positions[count:] = -1
        if picks:
            drawn = Draw.of([pick.sampling for pick in picks], [pick.seed for pick in picks], "cpu")
            for part, numbers in zip(inputs.draw, drawn, strict=True):
                part[rows.wanted] = numbers
        return inputs


class _Recorded:
    """A step of a fixed number of rows: where it reads them from, and how it is run."""

    def __init__(self, backend: "CudaBackend", rows: int) -> None:
        self.inputs = _Inputs(torch.zeros(9 * rows, dtype=torch.int32, device=backend.device))
        self.inputs.positions.fill_(-1)  # rows that write nothing, while it is recorded
        self._backend, self._graph = backend, None
        if backend.device.type == "cuda":
            self._graph, self._results = record(self._step, backend.stream, pool=backend.pool)

    def run(self) -> tuple[Tensor, Tensor]:
        """Return logits and chosen tokens of all rows; the next run overwrites them."""
        if self._graph is None:
            return self._step()
        self._graph.replay()
        return self._results

    def _step(self) -> tuple[Tensor, Tensor]:
        return self._backend.run(self.inputs)


class _Flight:
    """A step on its way; see :class:`quantkit.engine.backend.Flight`.

    Args:
        logits, chosen: of all rows, or of those that are wanted.
        wanted: which of them are wanted; None for all.
    """

    def __init__(self, logits: Tensor, chosen: Tensor, wanted: list[int] | None) -> None:
        self._logits, self._wanted = logits, wanted
        self._chosen, self._there = chosen, None
        if chosen.is_cuda:
            self._chosen = torch.empty(chosen.shape, dtype=chosen.dtype, pin_memory=True)
            self._chosen.copy_(chosen, non_blocking=True)
            self._there = torch.cuda.Event()
            self._there.record(torch.cuda.current_stream(chosen.device))

    def tokens(self) -> list[int]:
        if self._there is not None:
            self._there.synchronize()
        tokens: list[int] = self._chosen.tolist()
        return tokens if self._wanted is None else [tokens[row] for row in self._wanted]

    def logits(self) -> Tensor:
        return _wanted_rows(self._logits, self._wanted)


def _wanted_rows(logits: Tensor, wanted: list[int] | None) -> Tensor:
    """Return rows of logits that the next step does not overwrite; None for all, which are nobody else's."""
    if wanted is None:
        return logits
    if wanted == list(range(len(wanted))):
        return logits[: len(wanted)].clone()
    return logits[torch.tensor(wanted).to(logits.device, non_blocking=True)]


class CudaBackend:
    """Run a program for many sequences, keys and values in pages on the device.

    On a device other than CUDA (tests) steps run without being recorded, and compute the same.

    Args:
        decoder: the program, laid out. Several backends may share it.
        kv: how keys and values are stored, one of :data:`quantkit.kernels.cuda.attention.KINDS`.
        context_tokens: longest sequence the model reads.
        batch_invariant: a sequence gets the same tokens whatever runs beside it, with drafts and without, and after having been
            preempted: rows are computed alone, in one order. Decoding is a little slower, reading prompts several times.

    Attributes:
        engine: what runs a step, for reports.
    """

    RECORDED_ROWS: Final = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128)
    SHORT_TOKENS: Final = 8
    """Longest run of tokens that attends one by one: a token and its drafts."""

    shares_pages = rewinds = True
    notice = None
    engine = "cuda"

    def __init__(
        self, decoder: CudaDecoder, *, kv: str = "float", context_tokens: int | None = None, batch_invariant: bool = False
    ) -> None:
        self.decoder, self.device, self.context_tokens = decoder, decoder.device, context_tokens
        self._kind, self._alike = kv, batch_invariant
        self._memory: Memory | None = None
        self._pages: list[Pages] = []
        self._table = self._newest = torch.empty(0, dtype=torch.int32)
        self._known: list[list[int]] = []  # what stands in the table, by slot
        self._recorded: dict[int, _Recorded] = {}
        if self.device.type == "cuda":
            self.stream, self.pool = torch.cuda.Stream(self.device), torch.cuda.graph_pool_handle()

    def reserve(self, memory: Memory) -> None:
        """Allocate pages; the kernels know one size of them."""
        if memory.page_tokens != PAGE_TOKENS:
            raise QuantkitError(
                f"pages of {memory.page_tokens} tokens: the CUDA engine has pages of {PAGE_TOKENS}; "
                "leave page_tokens out, or take engine='modules'"
            )
        if memory == self._memory:
            return  # what was in the pages is nobody's any more, and what was recorded still fits
        self._recorded, self._pages, self._memory = {}, [], memory
        longest = min(self._longest, memory.pages * PAGE_TOKENS)
        self.decoder.lengthen(longest)
        self._pages = self.decoder.pages(memory.pages, self._kind)
        self._known = [[] for _ in range(memory.slots)]
        self._newest = torch.zeros(memory.slots, dtype=torch.int32, device=self.device)
        self._table = torch.zeros((memory.slots, -(-longest // PAGE_TOKENS)), dtype=torch.int32, device=self.device)

    def bytes_for(self, memory: Memory) -> int:
        """Return the bytes that :meth:`reserve` allocates for ``memory``."""
        return sum(pages.nbytes for pages in self.decoder.pages(memory.pages, self._kind, "meta"))

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values allocated now."""
        return sum(pages.nbytes for pages in self._pages)

    def step(self, spans: Sequence[Span], copies: Sequence[Copy] = ()) -> Tensor:
        """Run ``spans``; see :class:`~quantkit.engine.backend.Backend`."""
        logits, _, wanted = self._begin(spans, copies, None)
        return _wanted_rows(logits, wanted)

    def launch(self, spans: Sequence[Span], copies: Sequence[Copy], picks: Sequence[Pick]) -> _Flight:
        """Begin a step; see :class:`~quantkit.engine.backend.Chooser`."""
        return _Flight(*self._begin(spans, copies, picks))

    @torch.no_grad()
    def _begin(
        self, spans: Sequence[Span], copies: Sequence[Copy], picks: Sequence[Pick] | None
    ) -> tuple[Tensor, Tensor, list[int] | None]:
        """Begin a step; return logits and chosen tokens, and which of them are wanted if not all."""
        assert self._memory is not None, "reserve comes first"
        for source, target, _ in copies:
            for stored in (part for pages in self._pages for part in pages[:4] if part is not None):
                stored[target] = stored[source]
        rows = self._lay_out(spans)
        self._check(rows)
        self._tell_pages(spans)
        count = len(rows.tokens)
        if rows.tiles or count > self.RECORDED_ROWS[-1]:
            prompts = Prompts(rows.singles, self._sent(rows.tiles)) if rows.tiles else None
            inputs = _Inputs(_Inputs.of(rows, count, picks).words.to(self.device, non_blocking=True))
            return *self.run(inputs, self._sent(rows.wanted, torch.int64), prompts), None
        size = next(size for size in self.RECORDED_ROWS if size >= count)
        if size not in self._recorded:
            self._recorded[size] = _Recorded(self, size)
        recorded = self._recorded[size]
        recorded.inputs.words.copy_(_Inputs.of(rows, size, picks).words, non_blocking=True)
        return *recorded.run(), rows.wanted

    def run(self, inputs: _Inputs, wanted: Tensor | None = None, prompts: Prompts | None = None) -> tuple[Tensor, Tensor]:
        """Run rows on the device; return logits and chosen tokens, of all rows or those ``wanted``."""
        positions, slots, draw = inputs.positions, inputs.slots, inputs.draw
        tokens = torch.where(inputs.tokens < 0, self._newest[slots], inputs.tokens)
        where = Where(positions, slots, self._table)
        logits, bests = self.decoder.step(tokens, where, self._pages, wanted, prompts, batch_invariant=self._alike)
        if wanted is not None:
            positions, slots, draw = positions[wanted], slots[wanted], Draw(*(part[wanted] for part in draw))
        chosen = ops.ops().next_tokens(logits.contiguous(), *draw, positions, slots, self._newest, bests)
        return logits, chosen

    @property
    def _longest(self) -> int:
        known = [limit for limit in (self.context_tokens, self.decoder.program.max_tokens) if limit]
        return min(known, default=1 << 30)

    def _lay_out(self, spans: Sequence[Span]) -> _Rows:
        short = sum(len(span.ids) for span in spans if self._alike or len(span.ids) <= self.SHORT_TOKENS)
        rows = _Rows([], [], [], [], short, [])
        first: dict[int, int] = {}
        for index in sorted(range(len(spans)), key=lambda i: len(spans[i].ids) > self.SHORT_TOKENS):
            span, size = spans[index], self.decoder.tile_tokens
            first[index], count = len(rows.tokens), len(span.ids)
            if count > self.SHORT_TOKENS and not self._alike:
                rows.tiles.extend(cut(first[index], count, size))
            rows.tokens.extend(span.ids)
            rows.positions.extend(range(span.start, span.start + count))
            rows.slots.extend([span.slot] * count)
        for index, span in enumerate(spans):
            end = first[index] + len(span.ids)
            rows.wanted.extend(range(end - span.wanted, end))
        return rows

    def _check(self, rows: _Rows) -> None:
        """Check what the kernels rely on."""
        for name, values, least, limit in (
            ("token", rows.tokens, CHOSEN, self.decoder.program.tokens),
            ("position", rows.positions, 0, min(self._table.shape[1] * PAGE_TOKENS, self.decoder.context_tokens)),
            ("slot", rows.slots, 0, len(self._known)),
        ):
            if min(values) < least or max(values) >= limit:
                raise KernelError(f"{name}s from {min(values)} to {max(values)}; want 0 to {limit - 1}")

    def _tell_pages(self, spans: Sequence[Span]) -> None:
        """Bring the device's table up to date where a sequence's pages are not the ones it has."""
        assert self._memory is not None
        for span in spans:
            table = list(span.table[: -(-(span.start + len(span.ids)) // PAGE_TOKENS)])
            known = self._known[span.slot]
            if known[: len(table)] == table:
                continue
            if min(table) < 0 or max(table) >= self._memory.pages:
                raise KernelError(f"the block table points at pages beyond the {self._memory.pages} there are")
            self._table[span.slot, : len(table)].copy_(torch.tensor(table, dtype=torch.int32), non_blocking=True)
            self._known[span.slot] = table

    def _sent(self, values: Sequence[object], dtype: torch.dtype = torch.int32) -> Tensor:
        """Return numbers on the device; nobody waits for them to arrive."""
        return torch.tensor(values, dtype=dtype).to(self.device, non_blocking=True)
