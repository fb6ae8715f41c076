r"""The sequential walk through one block: every site sees inputs that the quantized sites before it produced.

A block is run once for all calibration batches. Each batch runs in its own greenlet (a coroutine that can be suspended
anywhere in a call stack); when a batch is about to multiply by a site's weight, it is suspended. Once all batches wait at
that site, the statistics of its input are taken, the site is quantized, its float weight is overwritten with the dequantized
one, and the batches go on. So error compensation sees the real, quantized inputs of every site ("true sequential"), and the
block costs one forward instead of the two of collect-then-replay. The price is memory: the live intermediates of all
batches, a few times tokens x hidden.

Sites that read the very same tensor (query, key and value; gate and up) share one set of statistics, computed once: this is
seen from the tensors themselves, not from names.

Data-dependent control flow is allowed: batches may wait at different sites, then the earliest in the block's order is
served first with the batches that reached it.

A batch need not end with the block: where a model can only run as a whole (:mod:`quantkit.calibrate.flow`), its batches are
:meth:`parked <Batch.park>` before the next block and go on from there.
"""

import weakref
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import greenlet
import torch
from torch import Tensor, nn

from quantkit.calibrate.collect import Gather, Inputs, gatherer
from quantkit.nn.probes import attach_probe
from quantkit.nn.sites import Block, Site, SiteStatistics
from quantkit.system.memory import HeapWatch
from quantkit.system.scratch import MEMORY, Scratch
from quantkit.system.workers import ALONE, Workers


class Batch(greenlet.greenlet):
    """One calibration batch inside a block; ``waiting`` is the site it is suspended at, ``output`` its result.

    Args:
        run: runs the block, or the model, and returns the output (B, T, H).
    """

    waiting: str | None = None
    parked: bool = False  # suspended until the next walk, outside of the blocks of this one
    inputs: Inputs | None = None
    output: Tensor | None = None
    float_inputs: dict[str, Tensor] | None = None
    counted: Tensor | None = None  # bool (B, T): which of its tokens enter statistics
    weights: Mapping[str, Tensor] = MappingProxyType({})  # layer name to how much its tokens count, (B, T)
    rounded: tuple[weakref.ref[Tensor], Tensor] | None = None  # the last input that was rounded, and what became of it

    def __init__(self, run: Callable[[], Tensor | None]) -> None:
        super().__init__(lambda: setattr(greenlet.getcurrent(), "output", run()))

    def park(self) -> None:
        """Suspend this batch, which is the one running, until the next walk."""
        self.parked = True
        self.parent.switch()

    def rounds(self, x: Tensor, dtype: torch.dtype | None) -> Tensor:
        """Return ``x`` in what products round it to; sites that read one tensor share one result."""
        if dtype is None or x.dtype == dtype:
            self.rounded = None
            return x
        if self.rounded is None or self.rounded[0]() is not x:
            self.rounded = weakref.ref(x), x.to(dtype)
        return self.rounded[1]


def record_inputs(
    block: nn.Module,
    block_name: str,
    sites: Sequence[Site],
    forwards: Sequence[Callable[[], Tensor]],
    scratch: Scratch = MEMORY,
) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Run ``block`` once over all batches and keep the input of every 2-D site; arguments as for :func:`walk_block`.

    Returns:
        The outputs, and for every batch site name to input. Sites that read the same tensor share it.
    """
    found: list[dict[str, Tensor]] = [{} for _ in forwards]
    outputs = []
    for batch, run in zip(found, forwards, strict=True):

        def keep(site: Site, inputs: Inputs, batch: dict[str, Tensor] = batch) -> None:
            if inputs.expert_ids is None:
                scratch.move(inputs.x)
                batch[site.name] = inputs.x

        hooks = attach(block, block_name, sites, keep)
        try:
            outputs.append(run())
        finally:
            for hook in hooks:
                hook()
    return outputs, found


def walk_block(
    block: nn.Module,
    block_name: str,
    sites: Sequence[Site],
    forwards: Sequence[Callable[[], Tensor]],
    visit: Callable[[Site, Gather], None],
    float_inputs: Sequence[dict[str, Tensor]] = (),
    products: torch.dtype | None = None,
    counted: Sequence[Tensor | None] = (),
) -> list[Tensor]:
    """Run ``block`` once over all batches, visiting each site when all its inputs are known.

    Args:
        block: the module of the block.
        block_name: its path in the model, a prefix of the names of ``sites``.
        sites: the sites to visit, in registration order.
        forwards: one zero-argument function per batch that runs the block and returns its output (B, T, H).
        visit: called once per site that is reached, as ``visit(site, gather)``; ``gather(needs, quantizer)`` runs
            collectors over the site's inputs, as they are or after a Hadamard transform. It may overwrite the site's float
            weight in place: the suspended batches then use it.
        float_inputs: for every batch the inputs that the float model has at the sites (:func:`record_inputs`), if they are
            needed; emptied on the way.
        products: what the products of ``forwards`` round their inputs to, if they do; see :func:`collect`.
        counted: for every batch which of its tokens enter statistics, bool (B, T); None, or nothing, for all.

    Returns:
        The outputs of ``forwards``, in order.
    """
    return run_batches(batches_of(forwards, float_inputs, counted), block, block_name, sites, visit, products)


def batches_of(
    forwards: Sequence[Callable[[], Tensor]],
    float_inputs: Sequence[dict[str, Tensor]] = (),
    counted: Sequence[Tensor | None] = (),
    weights: Sequence[Mapping[str, Tensor]] = (),
) -> list[Batch]:
    """Return batches that have not begun; arguments as for :func:`walk_block`.

    ``weights`` is for every batch layer name to how much its tokens count there, (B, T); nothing for all alike.
    """
    batches = [Batch(run) for run in forwards]
    for batch, float_x in zip(batches, float_inputs, strict=False):
        batch.float_inputs = float_x
    for batch, marks in zip(batches, counted, strict=False):
        batch.counted = marks
    for batch, own in zip(batches, weights, strict=False):
        batch.weights = own
    return batches


def run_batches(
    batches: Sequence[Batch],
    block: nn.Module,
    block_name: str,
    sites: Sequence[Site],
    visit: Callable[[Site, Gather], None],
    products: torch.dtype | None = None,
    scratch: Scratch = MEMORY,
    workers: Workers = ALONE,
) -> list[Tensor]:
    """Let ``batches`` run to their end and return their outputs; arguments as for :func:`walk_block`.

    The inputs of batches that are suspended lie in ``scratch``. Where ``workers`` have other batches of the same text, all of
    them run this together: they visit the same sites at the same time, and statistics are of the inputs of all.
    """
    try:
        walk_batches(batches, block, block_name, sites, visit, products, scratch, workers)
    finally:
        end_batches(batches)
    return [batch.output for batch in batches if batch.output is not None]


def end_batches(batches: Sequence[Batch]) -> None:
    """Unwind the forwards of suspended batches, so that nothing keeps their tensors alive."""
    for batch in batches:
        if not batch.dead:
            batch.throw()


def walk_batches(
    batches: Sequence[Batch],
    block: nn.Module,
    block_name: str,
    sites: Sequence[Site],
    visit: Callable[[Site, Gather], None],
    products: torch.dtype | None = None,
    scratch: Scratch = MEMORY,
    workers: Workers = ALONE,
) -> None:
    """Let ``batches`` go on until each has ended or is parked; arguments as for :func:`run_batches`."""
    order = {site.name: i for i, site in enumerate(sites)}
    done: set[str] = set()
    # The inputs of the site before, weakly: they must not be kept from being freed, and a dead one equals nothing.
    previous: list[weakref.ref[Tensor]] = []
    known: dict[str, SiteStatistics] = {}

    def suspend(site: Site, inputs: Inputs) -> None:
        batch = greenlet.getcurrent()
        if not isinstance(batch, Batch):
            return
        scratch.move(inputs.x)
        if inputs.expert_ids is None:
            inputs.x = batch.rounds(inputs.x, products)
        if site.name not in done:
            inputs.float_x = batch.float_inputs.pop(site.name, None) if batch.float_inputs else None
            inputs.counted, inputs.weights = batch.counted, batch.weights.get(site.name)
            scratch.move(inputs.x)
            batch.waiting, batch.inputs = site.name, inputs
            batch.parent.switch()

    hooks = attach(block, block_name, sites, suspend)
    try:
        running, heap = [batch for batch in batches if not batch.dead], HeapWatch()
        for batch in running:
            batch.parked = False
        while True:
            for batch in running:
                batch.waiting = None
                batch.switch()
                heap.check()
                scratch.check()
            waiting = [batch for batch in batches if not batch.dead and not batch.parked]
            place = workers.least(min((order[batch.waiting or ""] for batch in waiting), default=len(sites)))
            if place == len(sites):
                break
            site = sites[place]
            running = [batch for batch in waiting if batch.waiting == site.name]
            inputs = [batch.inputs for batch in running if batch.inputs is not None]
            same = len(inputs) == len(previous) and all(one.x is ref() for one, ref in zip(inputs, previous, strict=True))
            if not workers.agree(same):
                known = {}
            visit(site, gatherer(site, inputs, known, products, scratch, workers))
            done.add(site.name)
            previous = [weakref.ref(one.x) for one in inputs]
            for batch in running:
                batch.inputs = None
            del inputs
            heap.check()
    finally:
        for hook in hooks:
            hook()


def attach(
    block: nn.Module, block_name: str, sites: Sequence[Site], suspend: Callable[[Site, Inputs], None]
) -> list[Callable[[], None]]:
    """Make every site's module call ``suspend`` before it multiplies; returns functions that undo it."""
    undo: list[Callable[[], None]] = []
    experts: dict[str, dict[str, Site]] = {}
    for site in sites:
        if site.read:  # what it is multiplied by is known to its module alone
            continue
        if len(site.shape) == 3:
            experts.setdefault(site.module, {})[site.parameter] = site
            continue
        module = block.get_submodule(_relative(site.module, block_name))

        def before(_module: nn.Module, args: tuple[Tensor, ...], site: Site = site) -> tuple[Tensor, ...]:
            inputs = Inputs(args[0])
            suspend(site, inputs)
            return inputs.x, *args[1:]

        undo.append(module.register_forward_pre_hook(before).remove)
    for path, by_parameter in experts.items():
        module = block.get_submodule(_relative(path, block_name))
        undo.append(_probe(module, by_parameter, suspend))
    return undo


def _probe(module: nn.Module, by_parameter: Mapping[str, Site], suspend: Callable[[Site, Inputs], None]) -> Callable[[], None]:
    def before(parameter: str, x: Tensor, expert_ids: Tensor) -> None:
        if parameter in by_parameter:
            suspend(by_parameter[parameter], Inputs(x, expert_ids))

    return attach_probe(module, before)


def _relative(path: str, block_name: str) -> str:
    return path.removeprefix(block_name).removeprefix(".")


def block_sites(block: Block, chosen: Mapping[str, object]) -> list[Site]:
    """Return the sites of ``block`` whose names are in ``chosen``, in order."""
    return [site for site in block.sites if site.name in chosen]
