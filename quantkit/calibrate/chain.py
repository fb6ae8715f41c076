"""The calibration text on its way through a model's blocks, and statistics of a float model in one pass."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from quantkit.calibrate.backward import Counted
from quantkit.calibrate.collect import Gather
from quantkit.calibrate.collectors import COLLECTORS
from quantkit.calibrate.flow import Flow, Passes, run_order
from quantkit.calibrate.guidance import TokenWeights, by_batch, token_weights
from quantkit.calibrate.walk import batches_of, record_inputs, run_batches
from quantkit.errors import CalibrationError
from quantkit.nn.block_calls import call_block, cast_call, record_block_calls
from quantkit.nn.sites import Site, SiteStatistics, Structure
from quantkit.system.compute import Compute, on_device
from quantkit.system.memory import drop_pages, mapped_pages
from quantkit.system.progress import Progress, ProgressCallback
from quantkit.system.scratch import MEMORY, Scratch
from quantkit.system.workers import ALONE, Workers

Visit = Callable[[Site, Gather], None]


class BlockWalk(Protocol):
    """The calibration batches on their way through a model, one block after the other.

    Attributes:
        hidden: output of the last block, one (B, T, H) per batch.
        float_hidden: the same in the float model; empty if not asked for.
        state: what an interrupted run must find again.
        workers: who has the other batches of the text; set before the first block.
    """

    workers: Workers
    hidden: list[Tensor]
    float_hidden: list[Tensor]
    state: list[Tensor]

    def placed(self, index: int) -> contextlib.AbstractContextManager[object]:
        """Return the context in which block ``index`` is where it runs."""

    def advance(self, index: int, sites: Sequence[Site], visit: Visit) -> None:
        """Run block ``index``, which is placed, over all batches and visit ``sites``."""

    def rerunner(self, index: int) -> Callable[[int], Tensor]:
        """Return what runs block ``index`` again on a batch, given by its number; to be asked for before :meth:`advance`."""

    def replace(self, outputs: Sequence[Tensor]) -> None:
        """Go on with other outputs of the last block, whose weights have changed since."""


def block_walk(
    model: nn.Module,
    structure: Structure,
    batches: Sequence[Tensor],
    compute: Compute,
    *,
    with_float: bool = False,
    counted: Counted = (),
    weights: TokenWeights | None = None,
    scratch: Scratch = MEMORY,
) -> BlockWalk:
    """Return ``batches`` (int64 (B, T), without padding) before the first block.

    Args:
        model: the float model.
        structure: its blocks; where they are entangled, the whole model runs.
        batches: the tokens.
        compute: where blocks run, if they run one by one.
        with_float: also run the float model, for quantizers that compare.
        counted: which tokens enter statistics.
        weights: how much they count for statistics that are guided.
        scratch: where activations lie, of blocks that run one by one.

    Raises:
        CalibrationError: some tokens do not count, and blocks are entangled.
    """
    if structure.entangled is None:
        return Chain(
            model,
            structure,
            batches,
            compute,
            with_float=with_float,
            counted=counted,
            weights=weights,
            scratch=scratch,
        )
    if any(marks is not None for marks in counted):
        raise CalibrationError("answers_only=True: the model can only run as a whole, where every token counts; leave it out")
    order = run_order(model, structure, batches[0][:1, :8].to(next(model.parameters()).device))
    whole = Flow if order == list(range(len(structure.blocks))) else Passes
    return whole(model, structure, batches, with_float=with_float, weights=weights)


class Chain:
    """The calibration batches on their way through blocks that run one by one.

    Args:
        model: the float model.
        structure: its blocks.
        batches: int64 token ids (B, T), without padding.
        compute: where blocks run.
        with_float: also run the float blocks over what the float blocks before them produce, for quantizers that compare.
        counted: which tokens enter statistics.
        weights: how much they count for statistics that are guided.
        scratch: where activations lie.

    Attributes:
        hidden: current input of the next block, one (B, T, H) per batch.
        float_hidden: the same in the float model; empty if not asked for.
        workers: who has the other batches of the text; set before the first block.
    """

    workers: Workers = ALONE

    def __init__(
        self,
        model: nn.Module,
        structure: Structure,
        batches: Sequence[Tensor],
        compute: Compute,
        *,
        with_float: bool = False,
        counted: Counted = (),
        weights: TokenWeights | None = None,
        scratch: Scratch = MEMORY,
    ) -> None:
        self.counted, self.weights, self.scratch = counted, by_batch(weights, len(batches)), scratch
        self.model, self.structure, self.compute = model, structure, compute
        self.hidden: list[Tensor] = []
        self.calls: list[tuple[tuple[tuple[Any, ...], dict[str, Any]], ...]] = []
        for ids in batches:
            one = record_block_calls(model, structure, ids)
            self.hidden.append(scratch.keep(one.hidden.to(compute.dtype)))
            self.calls.append(one.calls)
        self.float_hidden = list(self.hidden) if with_float else []

    @property
    def state(self) -> list[Tensor]:
        """What an interrupted run must find again: all hidden states, those of the float model last."""
        return [*self.hidden, *self.float_hidden]

    @state.setter
    def state(self, tensors: list[Tensor]) -> None:
        kept = [self.scratch.keep(tensor) for tensor in tensors]
        self.hidden, self.float_hidden = kept[: len(self.calls)], kept[len(self.calls) :]

    @contextlib.contextmanager
    def placed(self, index: int) -> Iterator[None]:
        """Return the context in which block ``index`` is on the compute device."""
        module = self.model.get_submodule(self.structure.blocks[index].name)
        mapped = mapped_pages(module.parameters())
        with on_device(module, self.compute):
            drop_pages(mapped)  # what was read to be widened is not needed; what is used as it is comes back
            yield

    def rerunner(self, index: int) -> Callable[[int], Tensor]:
        """Return what runs block ``index`` again on the present inputs."""
        inputs = list(self.hidden)
        return lambda batch: self.call(index, batch, inputs[batch])

    def replace(self, outputs: Sequence[Tensor]) -> None:
        """Go on with other outputs of the last block."""
        self.hidden = list(outputs)

    def call(self, index: int, batch: int, hidden: Tensor) -> Tensor:
        """Return what block ``index``, which is on the compute device, makes of ``hidden`` (B, T, H) of one batch."""
        module = self.model.get_submodule(self.structure.blocks[index].name)
        args, kwargs = cast_call(*self.calls[batch][index], self.compute.dtype, self.compute.device)
        return call_block(module, hidden.to(self.compute.device), args, kwargs)

    def advance(self, index: int, sites: Sequence[Site], visit: Visit) -> None:
        """Run block ``index``, which is on the compute device, over all batches and visit ``sites``; the outputs are kept."""
        block = self.structure.blocks[index]
        module = self.model.get_submodule(block.name)

        def forward(pending: list[Tensor], batch: int) -> Callable[[], Tensor]:
            def run() -> Tensor:
                # The chain gives up its reference, so that a block's input is freed as soon as the block is done with it.
                hidden, pending[batch] = pending[batch], pending[batch].new_empty(0)
                return self.scratch.keep(self.call(index, batch, hidden).to("cpu", self.compute.dtype))

            return run

        def visit_exactly(site: Site, gather: Gather) -> None:
            with self.compute.rounding_products(False):
                visit(site, gather)

        float_inputs: list[dict[str, Tensor]] = []
        with self.compute.rounding_products():
            if self.float_hidden:
                runs = [forward(self.float_hidden, i) for i in range(len(self.calls))]
                self.float_hidden, float_inputs = record_inputs(module, block.name, sites, runs, self.scratch)
            pending, self.hidden = self.hidden, []
            runs = [forward(pending, i) for i in range(len(self.calls))]
            walking = batches_of(runs, float_inputs, self.counted, self.weights)
            products, scratch, workers = self.compute.products, self.scratch, self.workers
            outputs = run_batches(walking, module, block.name, sites, visit_exactly, products, scratch, workers)
        if any(not bool(torch.isfinite(out.sum())) for out in outputs):
            raise CalibrationError(f"{block.name}: its output holds NaN or infinity; check the model and its dtype")
        self.hidden = outputs


def relative_distance(outputs: Sequence[Tensor], targets: Sequence[Tensor]) -> float:
    """Return the mean over tokens of ||output - target||^2 / ||target||^2; a (B, T, H) per batch each."""
    total, tokens = 0.0, 0
    for output, target in zip(outputs, targets, strict=True):
        size = target.float().square().sum(-1).clamp(min=1e-30)
        total += float(((output.float() - target.float()).square().sum(-1) / size).sum(dtype=torch.float64))
        tokens += size.numel()
    return total / tokens


def visit_statistics(
    model: nn.Module,
    structure: Structure,
    batches: Sequence[Tensor],
    needs: Sequence[str],
    visit: Callable[[Site, SiteStatistics], None],
    *,
    counted: Counted = (),
    compute: Compute,
    progress: ProgressCallback,
) -> None:
    """Run the float model once and show ``visit`` the statistics of every layer in its blocks, one layer after the other.

    Nothing is kept here: what ``visit`` does not keep is freed before the next tensor's statistics are computed. The model is
    not changed.

    Args:
        model: the float model.
        structure: its blocks and layers.
        batches: int64 token ids (B, T), without padding.
        needs: names of collectors.
        visit: called once per layer; layers that read the same tensor get the same object.
        counted: which tokens enter the statistics.
        compute: where blocks run.
        progress: gets one event per block.

    Raises:
        CalibrationError: for a collector that compares a quantized model with the float one.
    """
    if paired := [name for name in needs if COLLECTORS.get(name).paired]:
        raise CalibrationError(
            f"{paired[0]} compares inputs behind quantized layers with the float model's, and can only be collected while "
            "quantizing; leave it out"
        )
    weights = None
    if any(COLLECTORS.get(name).guided for name in needs):
        weights = token_weights(model, structure, batches, counted=counted, compute=compute, progress=progress)
    chain = block_walk(model, structure, batches, compute, counted=counted, weights=weights)
    for index, block in enumerate(structure.blocks):
        with torch.no_grad(), chain.placed(index):
            chain.advance(index, block.sites, lambda site, gather: visit(site, gather(needs)))
        progress(Progress("calibrate", index + 1, len(structure.blocks), block.name))


def collect_statistics(
    model: nn.Module,
    structure: Structure,
    batches: Sequence[Tensor],
    needs: Sequence[str],
    *,
    counted: Counted = (),
    compute: Compute,
    progress: ProgressCallback,
) -> dict[str, SiteStatistics]:
    """Return layer name to statistics, all of them in memory; arguments as for :func:`visit_statistics`."""
    found: dict[str, SiteStatistics] = {}

    def keep(site: Site, statistics: SiteStatistics) -> None:
        found[site.name] = statistics

    visit_statistics(model, structure, batches, needs, keep, counted=counted, compute=compute, progress=progress)
    return found
