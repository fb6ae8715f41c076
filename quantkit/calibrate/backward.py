"""The backward pass that tells how much every layer's errors count, one block after the other from the last to the first.

What runs back is the gradient of the log-probability of tokens *drawn from the model's own predictions*: its squares are the
Fisher information of the predictions, and so the curvature of their KL divergence (Martens 2020, New insights and perspectives
on the natural gradient method, arXiv 1412.1193, section 9).

The text runs forward once, block by block; the input of every block is kept, in the dtype that blocks are computed in. Then the
gradient runs back: each block is computed again with gradients, and is forgotten when its layers have been looked at, so that a
model larger than the device's memory works. Where blocks cannot run one by one, the whole model runs, one window at a time.

Beside the model, memory is tokens x hidden x blocks for the inputs, and what a :class:`Watcher` keeps. One that wants all
windows to run forward before the first runs back also holds the graph of all windows of one block.
"""

import contextlib
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

from quantkit.errors import CalibrationError
from quantkit.nn.block_calls import call_block, cast_call, finish, record_block_calls
from quantkit.nn.sites import Site, Structure
from quantkit.system.compute import Compute, on_device
from quantkit.system.memory import return_freed_memory
from quantkit.system.progress import Progress, ProgressCallback

_TILE = 1 << 22
"""Logits worked on at a time, so that the temporaries stay small."""

Found = TypeVar("Found", covariant=True)

Counted = Sequence[Tensor | None]
"""For every batch which of its tokens enter statistics, bool (B, T); None for all. An empty sequence: all of all."""


class Watcher(Protocol[Found]):
    """Adds up what it sees of layers while blocks run forward and back.

    Attributes:
        looks_ahead: every window must have run forward before the first runs back.
    """

    looks_ahead: bool

    def on(self, model: nn.Module, sites: Sequence[Site], *, forward: bool = True) -> AbstractContextManager[None]:
        """Watch ``sites`` of a model meanwhile; without ``forward`` only what runs back, the rest having been seen before."""

    def gather(self, model: nn.Module, sites: Sequence[Site]) -> None:
        """Take the gradients that parameters have got from one window."""

    def found(self, site: Site, tokens: int) -> Found:
        """Return, and forget, what was seen of a layer in ``tokens`` tokens."""

    def of_table(self, site: Site, windows: Sequence[Tensor], gradients: Sequence[Tensor]) -> Found:
        """Return what the tokens, int64 (B, T), and the gradients (B, T, H) of their rows say of an embedding."""


@contextlib.contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Let no parameter of a model want a gradient meanwhile."""
    wanting = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in wanting:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in wanting:
            parameter.requires_grad_(True)


@dataclass(frozen=True)
class Backward(Generic[Found]):
    """A backward pass.

    Attributes:
        model: the float model, not changed.
        structure: its blocks and layers.
        windows: int64 token ids (B, T), without padding; rows are windows of their own.
        names: the layers that are looked at.
        watcher: makes what looks, given what products round their inputs to, if they do.
        compute: where blocks run.
        progress: gets one event per block.
        stage: what events call this.
        counted: which tokens' predictions count.
    """

    model: nn.Module
    structure: Structure
    windows: Sequence[Tensor]
    names: Collection[str]
    watcher: Callable[[torch.dtype | None], Watcher[Found]]
    compute: Compute
    progress: ProgressCallback
    stage: str = "search"
    counted: Counted = ()

    def run(self, visit: Callable[[Site, Found], None], seed: int) -> None:
        """Show ``visit`` what was found of every layer, from the last block to the first.

        Args:
            visit: called once per layer; for a head that is also the embedding twice, and both count.
            seed: of the tokens that are drawn from the model's predictions.

        Raises:
            CalibrationError: logits that are not finite.
        """
        generator = torch.Generator().manual_seed(seed)
        with frozen(self.model):
            if self.structure.entangled is None:
                self._one_by_one(visit, generator)
            else:
                self._as_a_whole(visit, generator)

    def _wanted(self, sites: Sequence[Site]) -> list[Site]:
        return [site for site in sites if site.name in self.names]

    @property
    def _tokens(self) -> int:
        return sum(ids.numel() for ids in self.windows)

    def _one_by_one(self, visit: Callable[[Site, Found], None], generator: torch.Generator) -> None:
        model, blocks, compute = self.model, self.structure.blocks, self.compute
        recorded = [record_block_calls(model, self.structure, ids) for ids in self.windows]
        hidden = [one.hidden.to(compute.dtype) for one in recorded]
        inputs: list[list[Tensor]] = []

        def run(index: int, window: int, x: Tensor) -> Tensor:
            args, kwargs = cast_call(*recorded[window].calls[index], compute.dtype, compute.device)
            with compute.rounding_products():
                return call_block(model.get_submodule(blocks[index].name), x.to(compute.device), args, kwargs)

        for index, block in enumerate(blocks):
            inputs.append(hidden)
            with torch.no_grad(), on_device(model.get_submodule(block.name), compute):
                hidden = [run(index, window, x).to("cpu", compute.dtype) for window, x in enumerate(hidden)]
            return_freed_memory()
            self.progress(Progress(self.stage, index + 1, 2 * len(blocks), f"forward, {block.name}"))
        gradients = self._from_the_head(hidden, visit, generator)
        for index in reversed(range(len(blocks))):
            sites, watch = self._wanted(blocks[index].sites), self.watcher(compute.products)
            with on_device(model.get_submodule(blocks[index].name), compute), watch.on(model, sites), torch.enable_grad():
                starts = [x.to(compute.device).detach().requires_grad_(True) for x in inputs.pop()]
                ends = [run(index, window, start) for window, start in enumerate(starts)] if watch.looks_ahead else starts
                for window, start in enumerate(starts):
                    end = ends[window] if watch.looks_ahead else run(index, window, start)
                    ends[window] = start  # the graph goes as soon as it has been run through
                    end.backward(gradients[window].to(end.device, end.dtype))  # type: ignore[no-untyped-call]
                    del end
                    watch.gather(model, sites)
                    assert start.grad is not None
                    gradients[window] = start.grad.to("cpu", compute.dtype)
            for site in sites:
                visit(site, watch.found(site, self._tokens))
            return_freed_memory()
            self.progress(Progress(self.stage, 2 * len(blocks) - index, 2 * len(blocks), f"backward, {blocks[index].name}"))
        table = self.structure.embedding
        if table is not None and table.name in self.names:
            visit(table, watch.of_table(table, self.windows, gradients))

    def _from_the_head(
        self, hidden: Sequence[Tensor], visit: Callable[[Site, Found], None], generator: torch.Generator
    ) -> list[Tensor]:
        """Return the gradient of every window's drawn tokens with respect to the last block's output, and visit the head."""
        outside, table, head = self._wanted(self.structure.outside), self.structure.embedding, self.structure.head
        tied = self.structure.tied and table is not None and table.name in self.names and head is not None
        if tied and table is not None and head is not None:
            outside.append(Site(head, head, "weight", table.shape))
        watch, gradients = self.watcher(self.compute.products), []
        if outside and watch.looks_ahead:
            with watch.on(self.model, outside), torch.no_grad(), self.compute.rounding_products():
                for row in (row for end in hidden for row in end.split(1)):
                    finish(self.model, self.structure, row)
        with watch.on(self.model, outside, forward=not watch.looks_ahead), torch.enable_grad():
            for window, end in enumerate(hidden):
                rows = [row.detach().requires_grad_(True) for row in end.split(1)]
                for row, marks in zip(rows, self._marks(window, len(rows)), strict=True):  # one by one: logits are large
                    with self.compute.rounding_products():
                        logits = finish(self.model, self.structure, row)
                    logits.backward(drawn_gradient(logits, generator, marks))  # type: ignore[no-untyped-call]
                gradients.append(torch.cat([row.grad for row in rows if row.grad is not None]))
        for site in outside:
            own = table if tied and table is not None and site.name == head else site
            visit(own, watch.found(site, self._tokens))
        return gradients

    def _marks(self, window: int, rows: int) -> Sequence[Tensor | None]:
        """Return which tokens of every row of a window count."""
        marks = self.counted[window] if self.counted else None
        return [None] * rows if marks is None else marks.split(1)

    def _as_a_whole(self, visit: Callable[[Site, Found], None], generator: torch.Generator) -> None:
        sites, watch = self._wanted((*self.structure.sites, *self.structure.outside)), self.watcher(None)
        device = next(self.model.parameters()).device
        table: nn.Module = self.model.get_input_embeddings()  # type: ignore[operator]
        undo = table.register_forward_hook(lambda _module, _args, output: output.requires_grad_(True))
        try:
            if watch.looks_ahead:
                with watch.on(self.model, sites), torch.no_grad():
                    for ids in self.windows:
                        self.model(input_ids=ids.to(device), use_cache=False)
            with watch.on(self.model, sites, forward=not watch.looks_ahead), torch.enable_grad():
                for index, ids in enumerate(self.windows):
                    logits = self.model(input_ids=ids.to(device), use_cache=False).logits
                    marks = self.counted[index] if self.counted else None
                    logits.backward(drawn_gradient(logits, generator, marks))  # type: ignore[no-untyped-call]
                    watch.gather(self.model, sites)
                    self.progress(Progress(self.stage, index + 1, len(self.windows), "forward and backward"))
        finally:
            undo.remove()
        for site in sites:
            visit(site, watch.found(site, self._tokens))


def drawn_gradient(logits: Tensor, generator: torch.Generator, marks: Tensor | None = None) -> Tensor:
    """Draw a token from every prediction and return the gradient of minus its log-probability with respect to the logits.

    Args:
        logits: (B, T, vocabulary), floating.
        generator: decides what is drawn.
        marks: bool (B, T), the predictions that count; None for all.

    Returns:
        The probabilities less one at the token drawn, and zero where nothing counts; of the logits' shape and dtype.

    Raises:
        CalibrationError: logits that are not finite.
    """
    flat = logits.detach().flatten(0, -2)
    gradient, rows = torch.empty_like(flat), max(1, _TILE // flat.shape[-1])
    places = torch.rand(len(flat), 1, generator=generator).to(flat.device)
    for part in (slice(start, start + rows) for start in range(0, len(flat), rows)):
        chances = flat[part].float().softmax(-1)
        below = chances.cumsum(-1)  # several times as fast as multinomial
        if not bool(torch.isfinite(below[:, -1]).all()):
            raise CalibrationError("logits are not finite; check the model and its dtype")
        drawn = torch.searchsorted(below, places[part] * below[:, -1:]).clamp_(max=below.shape[1] - 1)
        chances.scatter_add_(-1, drawn, torch.full_like(below[:, :1], -1.0))
        gradient[part] = chances if marks is None else chances.mul_(marks.flatten()[part].to(chances).unsqueeze(-1))
    return gradient.view_as(logits)
