"""The backward pass that tells how much every layer's errors count, one block after the other from the last to the first.

The text runs forward once, block by block; the input of every block is kept, in the dtype that blocks are computed in. Then the
gradient runs back: each block is computed again with gradients, and is forgotten when its layers have been scored, so that a
model larger than the device's memory works. Where blocks cannot run one by one, the whole model runs, one window at a time.

Beside the model, memory is tokens x hidden x blocks for the inputs, and for one block the graph of one window and one second
moment per layer (all layers' moments where the model runs as a whole).
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from quantkit.calibrate.collectors import COLLECTORS, Collector
from quantkit.errors import CalibrationError
from quantkit.mixed.scores import Sensitivity, input_noise
from quantkit.nn.block_calls import call_block, cast_call, finish, record_block_calls
from quantkit.nn.probes import attach_watcher
from quantkit.nn.sites import Site, Structure
from quantkit.spec import ActivationSpec
from quantkit.system.compute import Compute, on_device
from quantkit.system.progress import Progress, ProgressCallback

Visit = Callable[[Site, list[tuple[int, Sensitivity]]], None]
"""Called once per layer with the number of every matrix of it (0 for a plain one) that mattered, and its sensitivity."""


@dataclass
class _Sums:
    """What is added up for one matrix."""

    moment: Collector | None = None
    gradient: Tensor | None = None
    noise: dict[ActivationSpec, Tensor] = field(default_factory=dict)
    rows: int = 0
    fisher: Tensor | None = None


class _Watch:
    """Adds up inputs and output gradients of layers while blocks run forward and back.

    Args:
        noises: layer name to the ways in which its inputs may be rounded.
        products: what matrix products round their inputs to, if they do.
    """

    def __init__(self, noises: Mapping[str, Sequence[ActivationSpec]], products: torch.dtype | None = None) -> None:
        self.noises, self.products = noises, products
        self.sums: dict[str, list[_Sums]] = {}

    @contextlib.contextmanager
    def on(self, model: nn.Module, sites: Sequence[Site]) -> Iterator[None]:
        """Watch ``sites`` of a model meanwhile; parameters that are read in place get gradients of their own."""
        undo: list[Callable[[], object]] = []
        stacks: dict[str, dict[str, Site]] = {}
        for site in sites:
            module = model.get_submodule(site.module)
            self.sums.setdefault(site.name, [_Sums() for _ in range(site.shape[0] if len(site.shape) == 3 else 1)])
            if site.read:
                parameter: nn.Parameter = getattr(module, site.parameter)
                parameter.requires_grad_(True)
                undo.append(lambda p=parameter: p.requires_grad_(False))  # type: ignore[misc]
            elif len(site.shape) == 3:
                stacks.setdefault(site.module, {})[site.parameter] = site
            else:
                undo.append(module.register_forward_hook(self._hook(site)).remove)
        undo += [attach_watcher(model.get_submodule(path), self._watcher(mine)) for path, mine in stacks.items()]
        try:
            yield
        finally:
            for one in undo:
                one()

    def _hook(self, site: Site) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def after(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            self._see(site, 0, args[0])
            if output.requires_grad:
                x = args[0].detach()
                output.register_hook(lambda gradient: self._back(site, 0, x, gradient))

        return after

    def _watcher(self, sites: Mapping[str, Site]) -> Callable[[str, Tensor, Tensor, Tensor], None]:
        def watch(parameter: str, x: Tensor, y: Tensor, expert_ids: Tensor) -> None:
            if (site := sites.get(parameter)) is None:
                return
            experts = expert_ids.unique().tolist()
            for expert in experts:
                self._see(site, expert, x[expert_ids == expert])

            def back(gradient: Tensor) -> None:
                for expert in experts:
                    mine = expert_ids == expert
                    self._back(site, expert, x.detach()[mine], gradient[mine])

            if y.requires_grad:
                y.register_hook(back)

        return watch

    def _see(self, site: Site, part: int, x: Tensor) -> None:
        """Add how the inputs x (..., in) of one product may be rounded."""
        sums = self.sums[site.name][part]
        rows = x.detach().reshape(-1, x.shape[-1])
        sums.rows += len(rows)
        for spec, noise in input_noise(rows, self.noises.get(site.name, ())).items():
            sums.noise[spec] = sums.noise[spec] + noise if spec in sums.noise else noise

    def _back(self, site: Site, part: int, x: Tensor, gradient: Tensor) -> None:
        """Add the gradient (..., out) of one product's output, and the moment of its inputs (..., in) weighted by it."""
        sums = self.sums[site.name][part]
        squares = gradient.detach().reshape(-1, gradient.shape[-1]).float().square()
        sums.gradient = squares.sum(0) if sums.gradient is None else sums.gradient + squares.sum(0)
        if sums.moment is None:
            sums.moment = COLLECTORS.get("hessian")(site.in_features)
        rows = x.reshape(-1, x.shape[-1]).float() * squares.sum(1, keepdim=True).sqrt()
        sums.moment.update(rows if self.products is None else rows.to(self.products))

    def gather(self, model: nn.Module, sites: Sequence[Site]) -> None:
        """Add the gradients that parameters read in place have got, and forget them."""
        for site in sites:
            parameter: nn.Parameter = getattr(model.get_submodule(site.module), site.parameter)
            if not site.read or parameter.grad is None:
                continue
            gradient = parameter.grad.detach().float()
            gradient = gradient.transpose(-1, -2) if site.transposed else gradient
            for sums, one in zip(self.sums[site.name], gradient if gradient.ndim == 3 else (gradient,), strict=True):
                sums.fisher = one.square() if sums.fisher is None else sums.fisher.add_(one.square())
            parameter.grad = None

    def found(self, site: Site, tokens: int) -> list[tuple[int, Sensitivity]]:
        """Return the sensitivity of every matrix of a layer that mattered to any of ``tokens``, by number."""
        parts = []
        for index, sums in enumerate(self.sums.pop(site.name)):
            if sums.fisher is not None:
                parts.append((index, Sensitivity(None, None, fisher=sums.fisher / tokens)))
            elif sums.moment is not None and sums.gradient is not None:
                noise = {spec: total / sums.rows for spec, total in sums.noise.items()}
                share = int(sums.moment.state["count"]) / float(sums.gradient.sum(dtype=torch.float64).clamp(min=1e-300))
                parts.append((index, Sensitivity(sums.moment.result() * share, sums.gradient / tokens, noise)))
        return parts


@contextlib.contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
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
        windows: int64 token ids (1, T), without padding.
        noises: layer name to the ways in which its inputs may be rounded; layers that are not named are not looked at.
        compute: where blocks run.
        progress: gets one event per block.
    """

    model: nn.Module
    structure: Structure
    windows: Sequence[Tensor]
    noises: Mapping[str, Sequence[ActivationSpec]]
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
        with _frozen(self.model):
            if self.structure.entangled is None:
                self._one_by_one(visit, generator)
            else:
                self._as_a_whole(visit, generator)

    def _watch(self, products: torch.dtype | None = None) -> _Watch:
        return _Watch(self.noises, products)

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
                for window, x in enumerate(inputs.pop()):
                    start = x.to(compute.device).detach().requires_grad_(True)
                    end = run(index, window, start)
                    end.backward(gradients[window].to(end.device, end.dtype))  # type: ignore[no-untyped-call]
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
        with watch.on(self.model, outside), torch.enable_grad():
            for end in hidden:
                end = end.detach().requires_grad_(True)
                _drawn_loss(finish(self.model, self.structure, end), generator).backward()  # type: ignore[no-untyped-call]
                assert end.grad is not None
                gradients.append(end.grad)
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
            with watch.on(self.model, sites), torch.enable_grad():
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
    flat = predicted.detach().exp().flatten(0, 1).cpu()
    drawn = torch.multinomial(flat, 1, generator=generator).to(logits.device)
    return -predicted.flatten(0, 1).gather(-1, drawn).sum()


def _of_table(site: Site, windows: Sequence[Tensor], gradients: Sequence[Tensor]) -> Sensitivity:
    """Return the sensitivity of an embedding: a row counts as often as its token, a token that was not seen half."""
    ids = torch.cat([one.flatten() for one in windows])
    count = torch.bincount(ids.cpu(), minlength=site.shape[0]).float() + 0.5
    squares = torch.cat([one.flatten(0, -2).float().square() for one in gradients]).mean(0)
    return Sensitivity(None, None, fisher=(count / count.sum())[:, None] * squares)
