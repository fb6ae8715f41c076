"""Watch layers while blocks run forward and back: what they read, and what the predictions make of what they return."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from quantkit.calibrate.backward import Watcher
from quantkit.calibrate.collectors import COLLECTORS
from quantkit.mixed.scores import Sensitivity, compensation, input_noise, rotated_moment, seen_rows
from quantkit.nn.probes import attach_watcher
from quantkit.nn.sites import Site
from quantkit.numerics.hadamard import hadamard_transform
from quantkit.spec import ActivationSpec


class _Moment:
    """The second moment of what one or several matrices read, and what a quantizer's compensation makes of it."""

    def __init__(self, features: int) -> None:
        self._sums = COLLECTORS.get("hessian")(features)
        self._compensations: dict[bool, Tensor] = {}

    def update(self, rows: Tensor) -> None:
        """Add rows (tokens, in)."""
        self._sums.update(rows)

    def compensation(self, rotated: bool) -> Tensor:
        """Return what gradients are multiplied by, (in, in); no rows may be added from then on."""
        if rotated not in self._compensations:
            moment = self._sums.result()
            self._compensations[rotated] = compensation(rotated_moment(moment) if rotated else moment)
        return self._compensations[rotated]


@dataclass
class _Sums:
    """What is added up for one matrix."""

    moment: _Moment | None = None
    gradient: Tensor | None = None
    noise: dict[ActivationSpec, Tensor] = field(default_factory=dict)
    rows: int = 0
    fisher: dict[bool, Tensor] = field(default_factory=dict)
    squares: Tensor | None = None


class Watch(Watcher[list[tuple[int, Sensitivity]]]):
    """Adds up inputs and output gradients of layers while blocks run forward and back.

    All windows must have run forward before the first runs back. Rows of a batch are windows; where a layer gets the tokens of
    several in one row, their gradients add up before they are squared: right on average, as they are independent, but less
    certain.

    Args:
        noises: layer name to the ways in which its inputs may be rounded.
        compensates: whether the quantizer makes up for errors in later columns.
        products: what matrix products round their inputs to, if they do.
    """

    def __init__(
        self, noises: Mapping[str, Sequence[ActivationSpec]], compensates: bool, products: torch.dtype | None = None
    ) -> None:
        self.noises, self.compensates, self.products = noises, compensates, products
        self.looks_ahead = compensates  # gradients are multiplied by what all inputs say
        self.sums: dict[str, list[_Sums]] = {}
        self._last: tuple[Tensor, _Moment] | None = None
        self._rows: tuple[Tensor | None, dict[bool, Tensor]] = (None, {})

    @contextlib.contextmanager
    def on(self, model: nn.Module, sites: Sequence[Site], *, forward: bool = True) -> Iterator[None]:
        """Watch ``sites`` of a model meanwhile; parameters that are read in place get gradients of their own.

        Args:
            model: the model.
            sites: its layers.
            forward: whether inputs are added up; if not, they have been seen before.
        """
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
                undo.append(module.register_forward_hook(self._hook(site, forward)).remove)
        undo += [attach_watcher(model.get_submodule(path), self._watcher(mine, forward)) for path, mine in stacks.items()]
        try:
            yield
        finally:
            self._last, self._rows = None, (None, {})
            for one in undo:
                one()

    def _hook(self, site: Site, forward: bool) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def after(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            if forward:
                self._see(site, 0, args[0])
            if output.requires_grad:
                x = args[0]
                output.register_hook(lambda gradient: self._back(site, 0, x, gradient))

        return after

    def _watcher(self, sites: Mapping[str, Site], forward: bool) -> Callable[[str, Tensor, Tensor, Tensor], None]:
        def watch(parameter: str, x: Tensor, y: Tensor, expert_ids: Tensor) -> None:
            if (site := sites.get(parameter)) is None:
                return
            experts = expert_ids.unique().tolist()
            for expert in experts if forward else ():
                self._see(site, expert, x[expert_ids == expert])

            def back(gradient: Tensor) -> None:
                for expert in experts:
                    mine = expert_ids == expert
                    self._back(site, expert, x.detach()[mine], gradient[mine])

            if y.requires_grad:
                y.register_hook(back)

        return watch

    def _see(self, site: Site, part: int, x: Tensor) -> None:
        """Add the inputs x (..., in) of one product: their second moment, and how they may be rounded."""
        sums = self.sums[site.name][part]
        rows = x.detach().reshape(-1, x.shape[-1])
        sums.rows += len(rows)
        for spec, noise in input_noise(rows, self.noises.get(site.name, ())).items():
            sums.noise[spec] = sums.noise[spec] + noise if spec in sums.noise else noise
        if not self.compensates:
            return
        if self._last is not None and self._last[0] is x and sums.moment in (None, self._last[1]):
            sums.moment = self._last[1]  # query, key and value read one tensor
            return
        if sums.moment is None:
            sums.moment = _Moment(site.in_features)
        sums.moment.update(rows.float() if self.products is None else rows.to(self.products))
        self._last = x, sums.moment

    def _back(self, site: Site, part: int, x: Tensor, gradient: Tensor) -> None:
        """Add F of one window, from the inputs x (..., in) and the gradient (..., out) of the outputs of one product."""
        sums = self.sums[site.name][part]
        slope = gradient.detach().float()
        squares = slope.flatten(0, -2).square().sum(0)
        sums.gradient = squares if sums.gradient is None else sums.gradient + squares
        seen = slope[..., seen_rows(slope.shape[-1])].transpose(-1, -2)
        for rotated in {False, *(spec.rotated for spec in self.noises.get(site.name, ()))}:
            found = (seen @ self._compensated(x, sums.moment, rotated)).square()
            found = found.flatten(0, -3).sum(0) if found.ndim > 2 else found
            sums.fisher[rotated] = sums.fisher[rotated].add_(found) if rotated in sums.fisher else found

    def _compensated(self, x: Tensor, moment: _Moment | None, rotated: bool) -> Tensor:
        """Return the rows (..., in) whose products with the outputs' gradients are squared for F."""
        last, shared = self._rows
        if last is not x:
            shared = {}
            self._rows = x, shared  # query, key and value read one tensor
        if rotated not in shared:
            rows = x.detach().float()
            rows = hadamard_transform(rows) if rotated else rows
            shared[rotated] = rows if moment is None else rows @ moment.compensation(rotated)
        return shared[rotated]

    def gather(self, model: nn.Module, sites: Sequence[Site]) -> None:
        """Add the gradients that parameters read in place have got, and forget them."""
        for site in sites:
            parameter: nn.Parameter = getattr(model.get_submodule(site.module), site.parameter)
            if not site.read or parameter.grad is None:
                continue
            gradient = parameter.grad.detach().float()
            gradient = gradient.transpose(-1, -2) if site.transposed else gradient
            self._add_read(site, gradient)
            parameter.grad = None

    def _add_read(self, site: Site, gradient: Tensor) -> None:
        """Add the gradient (out, in) or (experts, out, in) of one window of a parameter that is read in place."""
        for sums, one in zip(self.sums[site.name], gradient if gradient.ndim == 3 else (gradient,), strict=True):
            sums.squares = one.square() if sums.squares is None else sums.squares.add_(one.square())

    def found(self, site: Site, tokens: int) -> list[tuple[int, Sensitivity]]:
        """Return the sensitivity of every matrix of a layer that mattered to any of ``tokens``, by number."""
        parts = []
        for index, sums in enumerate(self.sums.pop(site.name)):
            if sums.squares is not None:
                parts.append((index, Sensitivity.of_weights(sums.squares / tokens)))
            elif sums.gradient is not None:
                noise = {spec: total / sums.rows for spec, total in sums.noise.items()}
                fisher = {rotated: total / tokens for rotated, total in sums.fisher.items()}
                parts.append((index, Sensitivity(fisher, sums.gradient / tokens, noise, sums.moment is not None)))
        return parts

    def of_table(self, site: Site, windows: Sequence[Tensor], gradients: Sequence[Tensor]) -> list[tuple[int, Sensitivity]]:
        """Return the sensitivity of an embedding: a row counts as often as its token, a token that was not seen half."""
        ids = torch.cat([one.flatten() for one in windows])
        count = torch.bincount(ids.cpu(), minlength=site.shape[0]).float() + 0.5
        squares = torch.cat([one.flatten(0, -2).float().square() for one in gradients]).mean(0)
        return [(0, Sensitivity.of_weights((count / count.sum())[:, None] * squares))]
