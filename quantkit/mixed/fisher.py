"""The backward pass that tells how much every layer's errors count, one block after the other from the last to the first.

The text runs forward once, block by block; the input of every block is kept, in the dtype that blocks are computed in. Then the
gradient runs back: each block is computed again with gradients, and is forgotten when its layers have been scored, so that a
model larger than the device's memory works. Where blocks cannot run one by one, the whole model runs, one window at a time.

Beside the model, memory is tokens x hidden x blocks for the inputs, and for one block the graph of all windows, one second
moment per layer's input and one F (:mod:`quantkit.mixed.scores`) per layer (of all layers where the model runs as a whole).
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from quantkit.errors import CalibrationError
from quantkit.mixed.scores import Sensitivity
from quantkit.mixed.watch import Watch
from quantkit.nn.block_calls import call_block, cast_call, finish, record_block_calls
from quantkit.nn.sites import Site, Structure
from quantkit.spec import ActivationSpec
from quantkit.system.compute import Compute, on_device
from quantkit.system.progress import Progress, ProgressCallback

Visit = Callable[[Site, list[tuple[int, Sensitivity]]], None]
"""Called once per layer with the number of every matrix of it (0 for a plain one) that mattered, and its sensitivity."""


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


@dataclass(frozen=True, slots=True)
class Backward:
    """A backward pass.

    Attributes:
        model: the float model, not changed.
        structure: its blocks and layers.
        windows: int64 token ids (B, T), without padding; rows are windows of their own.
        noises: layer name to the ways in which its inputs may be rounded; layers that are not named are not looked at.
        compensates: whether the quantizer makes up for errors in later columns.
        compute: where blocks run.
        progress: gets one event per block.
    """

    model: nn.Module
    structure: Structure
    windows: Sequence[Tensor]
    noises: Mapping[str, Sequence[ActivationSpec]]
    compensates: bool
    compute: Compute
    progress: ProgressCallback

    def run(self, visit: Visit, seed: int) -> None:
        """Show ``visit`` the sensitivity of every layer, from the last block to the first.

        Args:
            visit: what it is told about one layer in two calls adds up.
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

    def _watch(self, products: torch.dtype | None = None) -> Watch:
        return Watch(self.noises, self.compensates, products)

    def _wanted(self, sites: Sequence[Site]) -> list[Site]:
        return [site for site in sites if site.name in self.noises]

    @property
    def _tokens(self) -> int:
        return sum(ids.numel() for ids in self.windows)

    def _one_by_one(self, visit: Visit, generator: torch.Generator) -> None:
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
            self.progress(Progress("search", index + 1, 2 * len(blocks), f"forward, {block.name}"))
        gradients = self._from_the_head(hidden, visit, generator)
        for index in reversed(range(len(blocks))):
            sites, watch = self._wanted(blocks[index].sites), self._watch(compute.products)
            with on_device(model.get_submodule(blocks[index].name), compute), watch.on(model, sites), torch.enable_grad():
                starts = [x.to(compute.device).detach().requires_grad_(True) for x in inputs.pop()]
                ends = [run(index, window, start) for window, start in enumerate(starts)]
                for window, start in enumerate(starts):
                    end, ends[window] = ends[window], starts[window]  # the graph goes as soon as it has been run through
                    end.backward(gradients[window].to(end.device, end.dtype))  # type: ignore[no-untyped-call]
                    del end
                    watch.gather(model, sites)
                    assert start.grad is not None
                    gradients[window] = start.grad.to("cpu", compute.dtype)
            for site in sites:
                visit(site, watch.found(site, self._tokens))
            self.progress(Progress("search", 2 * len(blocks) - index, 2 * len(blocks), f"backward, {blocks[index].name}"))
        table = self.structure.embedding
        if table is not None and table.name in self.noises:
            visit(table, [(0, _of_table(table, self.windows, gradients))])

    def _from_the_head(self, hidden: Sequence[Tensor], visit: Visit, generator: torch.Generator) -> list[Tensor]:
        """Return the gradient of every window's drawn tokens with respect to the last block's output, and visit the head."""
        outside, table, head = self._wanted(self.structure.outside), self.structure.embedding, self.structure.head
        tied = self.structure.tied and table is not None and table.name in self.noises and head is not None
        if tied and table is not None and head is not None:
            outside.append(Site(head, head, "weight", table.shape))
        watch, gradients = self._watch(), []
        if outside and self.compensates:
            with watch.on(self.model, outside), torch.no_grad():
                for row in (row for end in hidden for row in end.split(1)):
                    finish(self.model, self.structure, row)
        with watch.on(self.model, outside, forward=not self.compensates), torch.enable_grad():
            for end in hidden:
                rows = [row.detach().requires_grad_(True) for row in end.split(1)]
                for row in rows:  # one by one: logits are large
                    _drawn_loss(finish(self.model, self.structure, row), generator).backward()  # type: ignore[no-untyped-call]
                gradients.append(torch.cat([row.grad for row in rows if row.grad is not None]))
        for site in outside:
            own = table if tied and table is not None and site.name == head else site
            visit(own, watch.found(site, self._tokens))
        return gradients

    def _as_a_whole(self, visit: Visit, generator: torch.Generator) -> None:
        sites, watch = self._wanted((*self.structure.sites, *self.structure.outside)), self._watch()
        device = next(self.model.parameters()).device
        table: nn.Module = self.model.get_input_embeddings()  # type: ignore[operator]
        undo = table.register_forward_hook(lambda _module, _args, output: output.requires_grad_(True))
        try:
            with watch.on(self.model, sites), torch.no_grad():
                for ids in self.windows:
                    self.model(input_ids=ids.to(device), use_cache=False)
            with watch.on(self.model, sites, forward=False), torch.enable_grad():
                for index, ids in enumerate(self.windows):
                    logits = self.model(input_ids=ids.to(device), use_cache=False).logits
                    _drawn_loss(logits, generator).backward()  # type: ignore[no-untyped-call]
                    watch.gather(self.model, sites)
                    self.progress(Progress("search", index + 1, len(self.windows), "forward and backward"))
        finally:
            undo.remove()
        for site in sites:
            visit(site, watch.found(site, self._tokens))


def _drawn_loss(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Return minus the log-probability of tokens drawn from the predictions (B, T, vocabulary) themselves, summed."""
    predicted = logits.float().log_softmax(-1)
    if not bool(torch.isfinite(predicted.detach().amax(-1)).all()):
        raise CalibrationError("logits are not finite; check the model and its dtype")
    below = predicted.detach().flatten(0, 1).exp().cumsum_(-1)  # several times as fast as multinomial
    place = torch.rand(len(below), 1, generator=generator).to(below) * below[:, -1:]
    drawn = torch.searchsorted(below, place).clamp_(max=below.shape[1] - 1)
    return -predicted.flatten(0, 1).gather(-1, drawn).sum()


def _of_table(site: Site, windows: Sequence[Tensor], gradients: Sequence[Tensor]) -> Sensitivity:
    """Return the sensitivity of an embedding: a row counts as often as its token, a token that was not seen half."""
    ids = torch.cat([one.flatten() for one in windows])
    count = torch.bincount(ids.cpu(), minlength=site.shape[0]).float() + 0.5
    squares = torch.cat([one.flatten(0, -2).float().square() for one in gradients]).mean(0)
    return Sensitivity.of_weights((count / count.sum())[:, None] * squares)
