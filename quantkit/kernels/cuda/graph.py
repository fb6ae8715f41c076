"""Decode with a CUDA graph: one captured step per batch size, which also samples, so the host is not needed between steps."""

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
    """Capture a step in a CUDA graph.

    The step runs twice before the capture, on the same stream, to load the library, create counters and fill caches.

    Args:
        step: the step; it reads and writes the same memory every time.
        stream: stream of the capture.
        restore: undoes the changes of the runs before the capture.
        pool: memory pool to share with other graphs, of which only one may be replayed at a time.

    Returns:
        The graph, and the results of the step, which every replay overwrites.
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
    """Decode ``batch`` sequences of one program, each in pages of its own.

    A step runs the newest token of every sequence, samples the next one and keeps it in device memory; the host reads the
    tokens once, at the end. Decoding is greedy until :meth:`set_sampling` is called. On devices other than CUDA the step
    computes the same without being captured.

    Args:
        decoder: the program.
        batch: number of sequences.
        tokens: longest sequence, including its prompt.
        kv: how keys and values are stored, one of :data:`quantkit.kernels.cuda.attention.KINDS`.
        batch_invariant: give a sequence the same tokens in every batch, which makes decoding slightly slower. Prompts are
            always read one by one.

    Raises:
        KernelError: more tokens than the decoder's rotary tables have positions.
    """

    PROMPT_ROWS = 512
    """Rows of a prompt per step."""

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
            raise KernelError(f"tokens={tokens}: the decoder has {decoder.context_tokens} positions; call its lengthen first")
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
        """Set how tokens are sampled from now on. The captured step remains valid.

        Args:
            samplings: one per sequence, such as a :class:`~quantkit.engine.sampling.Sampling`. A token depends on seed,
                position and logits, not on the other sequences.

        Raises:
            KernelError: not one per sequence, or a repetition penalty.
        """
        self._draw.set(samplings)

    @torch.no_grad()
    def read(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Start new sequences: run the prompts and sample a token after each.

        Args:
            prompts: token ids, one prompt per sequence.

        Returns:
            int64 (batch,).

        Raises:
            KernelError: not one prompt per sequence, an empty or too long prompt, or logits that are not finite.
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
        """Generate ``count`` more tokens for every sequence.

        Returns:
            int64 (count, batch).

        Raises:
            KernelError: no prompt yet, too many tokens, or logits that are not finite.
        """
        if not self._lengths or max(self._lengths) + count > self.tokens:
            raise KernelError(
                f"{count} tokens after {max(self._lengths, default=0)}: want a prompt first, and at most {self.tokens} in all"
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
        self._history.index_copy_(0, self._at, chosen[None])  # -1 where no token can be chosen; later tokens are then invalid
        self._where.positions.add_(1)
        self._at.add_(1)
        return self._newest

    def _record(self) -> None:
        """Capture a step, and restore the state of the sequences."""
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
        raise KernelError(
            "no token can be chosen: the largest logit is NaN or infinite, want finite logits; look for overflow in the model"
        )
    return tokens
