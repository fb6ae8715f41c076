r"""Calibration of a model whose blocks exchange more than the hidden state, so that it can only run as a whole.

Some blocks share keys and values, chosen tokens or a second residual stream; some models mix blocks' outputs in between, or run
blocks several times. Nothing of that has to be known if the model's own forward does it, stopped where needed:

* :class:`Flow`, for blocks that run once each, in order: every batch is a forward of the whole model in a greenlet of its own,
  which waits before each block until the block before is quantized (:mod:`quantkit.calibrate.walk`). One forward in all, as in
  the walk block by block, but with the whole model in place.
* :class:`Passes`, for any other order: the whole model runs once for every block, and the inputs of the block's layers are
  kept, of all the times that it runs. Layers of one block then do not see each other's rounding. That takes as many forwards as
  there are blocks.

The model runs where it is and in its own dtypes; logits are made of the last position only, where the model can do that.
A run that was interrupted sends the text again through the blocks that are finished: what is between blocks is not stored.
"""

import contextlib
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from typing import Any

import greenlet
import torch
from torch import Tensor, nn

from quantkit.calibrate.collect import Gather, Inputs, gatherer
from quantkit.calibrate.guidance import TokenWeights, by_batch
from quantkit.calibrate.walk import Batch, attach, end_batches, walk_batches
from quantkit.errors import CalibrationError
from quantkit.nn.block_calls import own_containers
from quantkit.nn.probing import first_tensor, watch_block
from quantkit.nn.sites import Site, SiteStatistics, Structure, sharing_copy
from quantkit.system.workers import ALONE, Workers

Visit = Callable[[Site, Gather], None]
Call = tuple[tuple[Any, ...], dict[str, Any]]


class _Stopped(Exception):
    """Ends a forward whose rest is not wanted; not an error."""


class _Whole:
    """What the two ways of running a whole model have in common; see :class:`quantkit.calibrate.chain.BlockWalk`."""

    workers: Workers = ALONE  # no others can take part

    def __init__(
        self,
        model: nn.Module,
        structure: Structure,
        batches: Sequence[Tensor],
        *,
        with_float: bool = False,
        weights: TokenWeights | None = None,
    ) -> None:
        self.model, self.structure, self.weights = model, structure, by_batch(weights, len(batches))
        device = next(model.parameters()).device
        self.batches = [ids.to(device) for ids in batches]
        self.float_model = sharing_copy(model) if with_float else None
        self.hidden: list[Tensor] = []
        self.float_hidden: list[Tensor] = []
        self._begin()

    def _begin(self) -> None:
        """Make what a subclass runs the batches with."""

    @property
    def state(self) -> list[Tensor]:
        """Return nothing: a continued run runs the finished blocks again."""
        return []

    @state.setter
    def state(self, tensors: list[Tensor]) -> None:
        """Nothing was kept."""

    def placed(self, index: int) -> contextlib.AbstractContextManager[object]:
        """Return a context that does nothing: the model stays where it is."""
        return contextlib.nullcontext()


class Flow(_Whole):
    """The calibration batches on their way through a whole model, whose blocks run once each, in order.

    Args:
        model: the float model.
        structure: its blocks.
        batches: int64 token ids (B, T), without padding.
        with_float: also run a copy of the float model, for quantizers that compare. The copy shares the weights' memory with
            the model, and so keeps float weights that were replaced.
        weights: how much tokens count for statistics that are guided.

    Attributes:
        hidden: the last block's output, one (B, T, H) per batch.
        float_hidden: the same in the float model; empty if not asked for.
    """

    def _begin(self) -> None:
        self._stream = _Stream(self.model, self.structure, self.batches, self.weights)
        self._float = _Stream(self.float_model, self.structure, self.batches) if self.float_model is not None else None

    def advance(self, index: int, sites: Sequence[Site], visit: Visit) -> None:
        """Let all batches go through block ``index``, and visit ``sites`` on the way."""
        name = self.structure.blocks[index].name
        self._stream.reach(index)
        if self._float is not None:
            self._float.reach(index)
            self._float.record(index, sites)
            for batch, of_float in zip(self._stream.batches, self._float.batches, strict=True):
                batch.float_inputs, of_float.float_inputs = of_float.float_inputs, None
            self.float_hidden = self._float.outputs
        module = self.model.get_submodule(name)
        self._stream.run(index + 1, lambda batches: walk_batches(batches, module, name, sites, visit))
        self.hidden = self._stream.outputs

    def rerunner(self, index: int) -> Callable[[int], Tensor]:
        """Return what runs block ``index`` again on a batch, as it is called this time; call it before :meth:`advance`."""
        self._stream.reach(index)
        return _rerunner(self.model, self.structure.blocks[index].name, self._stream.calls)

    def replace(self, outputs: Sequence[Tensor]) -> None:
        """Take note that the last block may have other weights: all batches start anew before the next one."""
        self._stream.end()
        self.hidden = list(outputs)


class _Stream:
    """Forwards of a whole model, one per batch, that are stopped before a block and go on from there."""

    def __init__(
        self, model: nn.Module, structure: Structure, batches: Sequence[Tensor], weights: Sequence[Mapping[str, Tensor]] = ()
    ) -> None:
        self._model, self._ids, self._weights = model, batches, weights
        self._blocks = structure.blocks
        self._stop = 0
        self.batches: list[Batch] = []
        self.outputs: list[Tensor] = []
        self._calls: dict[Batch, Call] = {}
        self._left: dict[Batch, Tensor] = {}

    @property
    def calls(self) -> list[Call | None]:
        """What the block that the batches have stopped before is called with."""
        return [self._calls.get(batch) for batch in self.batches]

    def reach(self, index: int) -> None:
        """Be stopped before block ``index``, from the beginning if the batches are not there already."""
        if self.batches and self._stop == index:
            return
        self.end()
        self.batches = [Batch(functools.partial(self._forward, ids)) for ids in self._ids]
        for batch, weights in zip(self.batches, self._weights, strict=False):
            batch.weights = weights
        self.run(index, _switch)

    def run(self, stop: int, work: Callable[[list[Batch]], None]) -> None:
        """Let ``work`` run the batches on until they stop before block ``stop``, or end with the last block."""
        self._stop = stop
        self._left.clear()
        modules = [self._model.get_submodule(block.name) for block in self._blocks]
        with ExitStack() as hooks:
            for number, module in enumerate(modules[stop:], start=stop):
                hooks.callback(module.register_forward_pre_hook(self._wait(number), with_kwargs=True).remove)
            if stop:
                hooks.callback(modules[stop - 1].register_forward_hook(self._leave(stop - 1)).remove)
            try:
                work(self.batches)
            except BaseException:
                self.end()
                raise
        self.outputs = [self._left[batch] for batch in self.batches if batch in self._left]

    def record(self, index: int, sites: Sequence[Site]) -> None:
        """Run the batches through block ``index``; each keeps the inputs of its 2-D ``sites`` as ``float_inputs``."""
        name = self._blocks[index].name

        def keep(site: Site, inputs: Inputs) -> None:
            batch = greenlet.getcurrent()
            if isinstance(batch, Batch) and inputs.expert_ids is None:
                batch.float_inputs = (batch.float_inputs or {}) | {site.name: inputs.x}

        with ExitStack() as hooks:
            for undo in attach(self._model.get_submodule(name), name, sites, keep):
                hooks.callback(undo)
            self.run(index + 1, _switch)

    def end(self) -> None:
        """Give the forwards up."""
        end_batches(self.batches)
        self.batches = []
        self._calls.clear()

    def _forward(self, ids: Tensor) -> None:
        with suppress(_Stopped):
            self._model(input_ids=ids, use_cache=False, **_last_logits(self._model))

    def _wait(self, number: int) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            batch = greenlet.getcurrent()
            while isinstance(batch, Batch) and number >= self._stop:
                self._calls[batch] = own_containers(args, kwargs)
                batch.park()

        return before

    def _leave(self, number: int) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        def after(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
            batch = greenlet.getcurrent()
            if isinstance(batch, Batch):
                self._left[batch] = _checked(output, self._blocks[number].name)
                if number + 1 == len(self._blocks):
                    raise _Stopped

        return after


class Passes(_Whole):
    """The calibration batches, run through a whole model once for every block, whatever order its blocks run in.

    Arguments and attributes as for :class:`Flow`; hidden states are those of the first time that a block runs.
    """

    def advance(self, index: int, sites: Sequence[Site], visit: Visit) -> None:
        """Run the model over all batches, then visit ``sites`` with what reached them; without any, nothing has to run."""
        if not sites:
            return
        found, self.hidden, _ = self._run(self.model, index, sites)
        if self.float_model is not None:
            float_found, self.float_hidden, _ = self._run(self.float_model, index, sites)
            for name, inputs in found.items():
                for one, of_float in zip(inputs, float_found.get(name, []), strict=False):
                    one.float_x = of_float.x if one.expert_ids is None else None
        previous: list[Inputs] = []
        known: dict[str, SiteStatistics] = {}
        for site in sites:
            inputs = found.pop(site.name, [])
            if not inputs:
                continue
            if len(inputs) != len(previous) or any(one.x is not other.x for one, other in zip(inputs, previous, strict=True)):
                known = {}
            visit(site, gatherer(site, inputs, known))
            previous = inputs

    def rerunner(self, index: int) -> Callable[[int], Tensor]:
        """Return what runs block ``index`` again on a batch, as it is called the first time."""
        _, _, calls = self._run(self.model, index, ())
        return _rerunner(self.model, self.structure.blocks[index].name, calls)

    def replace(self, outputs: Sequence[Tensor]) -> None:
        """Take note of the last block's outputs, which it makes with other weights."""
        self.hidden = list(outputs)

    def _run(
        self, model: nn.Module, index: int, sites: Sequence[Site]
    ) -> tuple[dict[str, list[Inputs]], list[Tensor], list[Call | None]]:
        """Run ``model`` over all batches; return the inputs of ``sites`` and, of the block's first runs, outputs and calls."""
        name = self.structure.blocks[index].name
        module = model.get_submodule(name)
        found: dict[str, list[Inputs]] = {site.name: [] for site in sites}
        outputs: list[Tensor] = []
        calls: list[Call | None] = []
        for number, ids in enumerate(self.batches):
            weights = self.weights[number] if self.weights else {}
            entered: list[Call] = []
            left: list[Tensor] = []

            def before(_module: nn.Module, args: Any, kwargs: Any, entered: list[Call] = entered) -> None:
                entered.append(own_containers(args, kwargs) if not entered else ((), {}))

            def after(_module: nn.Module, _args: Any, output: Any, left: list[Tensor] = left) -> None:
                left.extend([_checked(output, name)] if not left else [])

            with ExitStack() as hooks:
                hooks.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
                hooks.callback(module.register_forward_hook(after).remove)

                def keep(site: Site, inputs: Inputs, weights: Mapping[str, Tensor] = weights) -> None:
                    inputs.weights = weights.get(site.name)
                    found[site.name].append(inputs)

                for undo in attach(module, name, sites, keep):
                    hooks.callback(undo)
                model(input_ids=ids, use_cache=False, **_last_logits(model))
            outputs += left
            calls.append(entered[0] if entered else None)
        return found, outputs, calls


def run_order(model: nn.Module, structure: Structure, ids: Tensor) -> list[int]:
    """Return the numbers of the blocks in the order in which one forward of ``ids`` (B, T) calls them."""
    order: list[int] = []
    with ExitStack() as hooks, torch.no_grad():
        for number, block in enumerate(structure.blocks):

            def note(_hidden: Tensor, number: int = number) -> None:
                order.append(number)

            hooks.callback(watch_block(model.get_submodule(block.name), note, lambda _: None))
        model(input_ids=ids, use_cache=False)
    return order


def _rerunner(model: nn.Module, name: str, calls: Sequence[Call | None]) -> Callable[[int], Tensor]:
    module, kept = model.get_submodule(name), list(calls)

    def run(batch: int) -> Tensor:
        call = kept[batch]
        if call is None:
            raise CalibrationError(f"{name} was not run by calibration batch {batch}; use a method that does not learn blocks")
        args, kwargs = own_containers(*call)
        return _checked(module(*args, **kwargs), name)

    return run


def _checked(output: Any, name: str) -> Tensor:
    """Return the hidden state that a block returned.

    Raises:
        CalibrationError: there is none, or it is not finite.
    """
    hidden = first_tensor(output)
    if hidden is None:
        raise CalibrationError(
            f"{name} returns {type(output).__name__} without a hidden state; use a method without calibration"
        )
    if not bool(torch.isfinite(hidden.detach().sum())):
        raise CalibrationError(f"{name}: its output holds NaN or infinity; check the model and its dtype")
    return hidden


def _switch(batches: Sequence[Batch]) -> None:
    """Let every batch run on to its next stop."""
    for batch in batches:
        if not batch.dead:
            batch.parked = False
            batch.switch()


def _last_logits(model: nn.Module) -> dict[str, int]:
    """Return the option that keeps a model from computing logits that nobody reads."""
    return {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
