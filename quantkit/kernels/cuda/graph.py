"""Decoding under a CUDA graph: one recorded step per batch size, tokens chosen inside, no word from the host in between."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from quantkit.errors import KernelError
from quantkit.kernels.cuda import ops
from quantkit.kernels.cuda.attention import PAGE_TOKENS, Where, cut
from quantkit.kernels.cuda.decoder import CudaDecoder, Prompts
from quantkit.kernels.functions.sampling import Draw, SamplingParameters

_Results = TypeVar("_Results")


def record(
    step: Callable[[], _Results],
    stream: torch.cuda.Stream,
    *,
    restore: Callable[[], None] = lambda: None,
    pool: Any = None,
) -> tuple[torch.cuda.CUDAGraph, _Results]:
    """Record a step in a graph; return it and the tensors that a replay writes the step's results to.

    The step runs twice before, on the stream of the recording: that loads the library, makes counters and fills caches.

    Args:
        step: what to record; reads and writes the same memory every time.
        stream: where to run it meanwhile.
        restore: puts back what the runs before have changed.
        pool: memory pool that recordings share, of which only one is replayed at a time.
    """
    stream.wait_stream(torch.cuda.current_stream(stream.device))
    with torch.cuda.stream(stream):
        for _ in range(2):
            step()
            restore()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, stream=stream):
            result = step()
        restore()
    torch.cuda.current_stream(stream.device).wait_stream(stream)
    return graph, result


class GraphDecoder:
    """Continue up to ``batch`` sequences of one program, each in pages of its own.

    A step reads every sequence's newest token, chooses the next one and writes both to device memory; the host looks once, at
    the end. The most likely tokens are chosen until :meth:`set_sampling` says otherwise. On a device other than CUDA the step
    runs without being recorded: slow, and the same tokens.

    Args:
        decoder: the program.
        batch: sequences.
        tokens: longest sequence, prompt included.
        kv: how keys and values are stored.
        batch_invariant: a sequence gets the same tokens in every batch, and decoding is a little slower; prompts are read one
            by one in any case.

    Raises:
        KernelError: more tokens than the decoder has positions for.
    """

    PROMPT_ROWS = 512
    """Rows of a prompt that are read at once."""

    def __init__(
        self,
        decoder: CudaDecoder,
        batch: int,
        tokens: int,
        *,
        kv: str = "float",
        batch_invariant: bool = False,
    ) -> None:
        if tokens > decoder.context_tokens:
            raise KernelError(f"{tokens} tokens: the decoder was made for {decoder.context_tokens}")
        self._decoder, self.batch, self.tokens = decoder, batch, tokens
        device, pages = decoder.device, -(-tokens // PAGE_TOKENS)
        self._pages = decoder.pages(batch * pages, kv)
        table = torch.arange(batch * pages, dtype=torch.int32, device=device).view(batch, pages)
        slots = torch.arange(batch, dtype=torch.int32, device=device)
        self._where = Where(torch.zeros(batch, dtype=torch.int32, device=device), slots, table)
        self._newest = torch.zeros(batch, dtype=torch.int32, device=device)
        self._history = torch.zeros((tokens, batch), dtype=torch.int32, device=device)
        self._at = torch.zeros(1, dtype=torch.int64, device=device)
        self._batch_invariant = batch_invariant
        self._draw = Draw.greedy(batch, device)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._lengths: list[int] = []

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values."""
        return sum(pages.nbytes for pages in self._pages)

    def set_sampling(self, samplings: Sequence[SamplingParameters]) -> None:
        """Choose tokens from now on as one :class:`~quantkit.engine.sampling.Sampling` per sequence says.

        Nothing is recorded anew. A drawn token depends on seed, position and logits, not on the other sequences.

        Raises:
            KernelError: not one per sequence, or a repetition penalty.
        """
        self._draw.set(samplings)

    @torch.no_grad()
    def read(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Read the prompts and choose a token after each, (batch,); what was read before is forgotten.

        Raises:
            KernelError: not as many prompts as sequences, an empty one, one without room after it, or logits that are not
                finite.
        """
        if len(prompts) != self.batch or not all(0 < len(prompt) < self.tokens for prompt in prompts):
            raise KernelError(
                f"{len(prompts)} prompts of {[len(p) for p in prompts]} tokens; want {self.batch}, 1 to {self.tokens - 1}"
            )
        chosen = []
        for slot, prompt in enumerate(prompts):
            for start in range(0, len(prompt), self.PROMPT_ROWS):
                rows = torch.tensor(prompt[start : start + self.PROMPT_ROWS], device=self._decoder.device)
                positions = torch.arange(start, start + len(rows), dtype=torch.int32, device=rows.device)
                where = Where(positions, torch.full_like(positions, slot), self._where.table)
                last = torch.tensor([len(rows) - 1], device=rows.device)
                tiles = torch.tensor(cut(0, len(rows), self._decoder.tile_tokens), dtype=torch.int32, device=rows.device)
                logits, _ = self._decoder.step(rows, where, self._pages, last, Prompts(0, tiles))
            chosen.append(_choose(logits, Draw(*(part[slot : slot + 1] for part in self._draw)), positions[-1:]))
        self._newest.copy_(_finite(torch.cat(chosen)))
        self._where.positions.copy_(torch.tensor([len(p) for p in prompts]))
        self._lengths = [len(prompt) for prompt in prompts]
        return self._newest.long()

    @torch.no_grad()
    def decode(self, count: int) -> Tensor:
        """Choose ``count`` more tokens for every sequence, (count, batch), int64.

        Raises:
            KernelError: nothing read yet, no room, or logits that are not finite.
        """
        if not self._lengths or max(self._lengths) + count > self.tokens:
            raise KernelError(
                f"{count} tokens after {max(self._lengths, default=0)}: room for {self.tokens}, and a prompt comes first"
            )
        if self._graph is None and self._decoder.device.type == "cuda":
            self._record()
        self._at.zero_()
        for _ in range(count):
            if self._graph is None:
                self._step()
            else:
                self._graph.replay()
        self._lengths = [length + count for length in self._lengths]
        return _finite(self._history[:count].long())

    def _step(self) -> Tensor:
        logits, bests = self._decoder.step(self._newest, self._where, self._pages, batch_invariant=self._batch_invariant)
        row = self._where.positions, self._where.slots, self._newest
        chosen = ops.ops().next_tokens(logits.contiguous(), *self._draw, *row, bests)
        self._history.index_copy_(0, self._at, chosen[None])  # -1 where there is none to choose: what follows is thrown away
        self._where.positions.add_(1)
        self._at.add_(1)
        return self._newest

    def _record(self) -> None:
        """Record one step; the sequences are put back to where they were."""
        held = [t.clone() for t in (self._newest, self._where.positions, self._at)]

        def restore() -> None:
            for tensor, before in zip((self._newest, self._where.positions, self._at), held, strict=True):
                tensor.copy_(before)

        self._graph, _ = record(self._step, torch.cuda.Stream(self._decoder.device), restore=restore)


def _choose(logits: Tensor, draw: Draw, positions: Tensor) -> Tensor:
    chosen: Tensor = ops.ops().next_tokens(logits.contiguous(), *draw, positions)
    return chosen


def _finite(tokens: Tensor) -> Tensor:
    if bool((tokens < 0).any()):
        raise KernelError("logits are not numbers one can choose from: the largest is NaN or infinite; look for overflow")
    return tokens
