"""Run collectors over what waits at a layer; of a stack of experts over a few experts at a time.

A second moment per expert of a large mixture is gigabytes: 2 GiB for 128 experts with 2048 inputs. A quantizer wants one after
the other, so they are computed in slices of experts, whose size is at most :data:`SLICE_BYTES`, when they are asked for.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from quantkit.calibrate.collectors import COLLECTORS, Collector
from quantkit.calibrate.together import together
from quantkit.errors import CalibrationError
from quantkit.nn.sites import Site, SiteStatistics
from quantkit.numerics.inputs import UNCHANGED, InputQuantizer
from quantkit.system.scratch import MEMORY, Scratch
from quantkit.system.workers import ALONE, Workers

SLICE_BYTES = 256 << 20
"""Most bytes of the statistics of a stack of experts that are in memory at a time, unless those of one expert are more."""


@dataclass(slots=True)
class Inputs:
    """Rows that are about to be multiplied by a site's weight.

    Attributes:
        x: (..., in) as the module received it.
        expert_ids: int64 (rows,) expert of every row, for a 3-D site; None otherwise.
        float_x: what the float model multiplies at the same place, of x's shape, if that is known.
        counted: bool (B, T), the tokens of the batch whose rows enter statistics; None for all. Where x has other rows than
            the batch has tokens (experts), all count.
        weights: float32 (B, T), how much each token counts for this layer, where that is known.
    """

    x: Tensor
    expert_ids: Tensor | None = None
    float_x: Tensor | None = None
    counted: Tensor | None = None
    weights: Tensor | None = None

    def rows(self, of: Tensor) -> Tensor:
        """Return ``of``, which has x's shape, as the rows (n, in) that count."""
        rows = of.detach().reshape(-1, of.shape[-1])
        if self.counted is None or self.counted.numel() != rows.shape[0]:
            return rows
        return rows[self.counted.reshape(-1).to(rows.device)]

    def roots(self) -> Tensor | None:
        """Return the root of how much each of the :meth:`rows` that count counts, (n, 1); None if all do alike."""
        if self.weights is None or self.expert_ids is not None or self.weights.numel() * self.x.shape[-1] != self.x.numel():
            return None
        return self.rows(self.weights.unsqueeze(-1)).sqrt()


@dataclass(frozen=True, slots=True)
class _Gathering:
    """What collectors are run over.

    Attributes:
        site: the layer.
        needs: names of collectors.
        inputs: one per batch.
        products, quantizer: see :func:`collect`.
        scratch: where the inputs lie.
        workers: who has the other inputs.
    """

    site: Site
    needs: tuple[str, ...]
    inputs: Sequence[Inputs]
    products: torch.dtype | None
    quantizer: InputQuantizer
    scratch: Scratch
    workers: Workers

    def collectors(self, experts: range) -> list[dict[str, Collector]]:
        """Return collectors that have seen all inputs of some experts; a 2-D layer has one."""
        if self.workers.shares:
            return together(self.site, self.needs, experts, lambda: self.shown(experts), self.workers)
        found = [{name: COLLECTORS.get(name)(self.site.in_features) for name in self.needs} for _ in experts]
        for expert, rows in self.shown(experts):
            for name, seen in rows.items():
                found[expert - experts.start][name].update(seen)
        return found

    def shown(self, experts: range) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """Yield an expert and, for every collector, the rows that it is shown of one batch."""
        for one in self.inputs:
            for expert, rows in _rows_by_expert(one, experts):
                yield expert, self._seen(one, rows)
            self.scratch.check()

    def _seen(self, one: Inputs, rows: Tensor) -> dict[str, Tensor]:
        rows = self.quantizer.prepare_input(rows)
        rows = rows if self.products is None else rows.to(self.products)
        if not torch.isfinite(rows.sum()):  # NaN and infinity survive a sum
            raise CalibrationError(f"{self.site.name}: calibration inputs hold NaN or infinity; check the model and its dtype")
        roots, found = one.roots(), {}
        for name in self.needs:
            seen = rows
            if COLLECTORS.get(name).paired:
                assert one.float_x is not None
                float_x = one.rows(one.float_x)
                seen = torch.cat([rows, self.quantizer.prepare_input(float_x).to(rows)], 1)
            if COLLECTORS.get(name).guided and roots is not None:
                seen = (seen * roots.to(seen.device)).to(seen.dtype)
            found[name] = seen
        return found


class ExpertStatistics(SiteStatistics):
    """Statistics of a stack of experts that are computed a slice of experts at a time; :attr:`results` computes all.

    It is good as long as the inputs are, that is while the layer is visited.
    """

    def __init__(self, gathering: _Gathering, tokens: tuple[int, ...], step: int) -> None:
        self._gathering, self._step = gathering, step
        self._first, self._slice = 0, []  # type: tuple[int, list[dict[str, Tensor]]]
        super().__init__(_Lazily(self), tokens)  # type: ignore[arg-type]

    def of(self, index: int) -> dict[str, Tensor]:
        """Return the results of one expert; zeros for one that saw no token."""
        if not self._first <= index < self._first + len(self._slice):
            experts = range(index, min(index + self._step, len(self.tokens)))
            self._slice = []  # the last slice goes before the next one comes
            found = self._gathering.collectors(experts)
            self._first = index
            while found:
                seen, collectors = self.tokens[index + len(self._slice)], found.pop(0)
                self._slice.append({name: one.result() for name, one in collectors.items()} if seen else {})
        return self._slice[index - self._first]

    def expert(self, index: int) -> SiteStatistics:
        """Return the statistics of one expert."""
        return SiteStatistics(self.of(index), (self.tokens[index],))


class _Lazily(Mapping[str, Tensor]):
    """The stacked results of :class:`ExpertStatistics`, computed when they are asked for."""

    def __init__(self, owner: ExpertStatistics) -> None:
        self._owner = owner

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._owner._gathering.needs:
            raise KeyError(name)
        return stack_results([self._owner.of(i).get(name) for i in range(len(self._owner.tokens))])

    def __iter__(self) -> Iterator[str]:
        return iter(self._owner._gathering.needs)

    def __len__(self) -> int:
        return len(self._owner._gathering.needs)


def collect(
    site: Site,
    needs: Sequence[str],
    inputs: Sequence[Inputs],
    products: torch.dtype | None = None,
    *,
    quantizer: InputQuantizer = UNCHANGED,
    scratch: Scratch = MEMORY,
    workers: Workers = ALONE,
) -> SiteStatistics:
    """Run the named collectors over all ``inputs`` of ``site``; those that compare with the float model only where its input is
    known.

    Args:
        site: the site.
        needs: names of collectors.
        inputs: one per batch.
        products: what the product rounds its input to, and so what the collectors see; None leaves inputs as they are.
        quantizer: look at inputs in the basis that it rounds them in.
        scratch: where the inputs lie.
        workers: who has the other inputs; all of them collect at the same time.

    Raises:
        CalibrationError: if an input holds NaN or infinity.
    """
    float_inputs = workers.agree(all(one.float_x is not None for one in inputs))
    chosen = tuple(name for name in needs if float_inputs or not COLLECTORS.get(name).paired)
    gathering = _Gathering(site, chosen, inputs, products, quantizer, scratch, workers)
    experts = site.shape[0] if len(site.shape) == 3 else 1
    tokens = _tokens(inputs, experts, workers)
    if len(site.shape) == 2:
        results = {name: one.result() for name, one in gathering.collectors(range(1))[0].items()}
        return SiteStatistics(results, tokens)
    if chosen and not any(tokens):
        raise CalibrationError(f"{site.name}: no token reached any expert during calibration; use more calibration text")
    each = sum(part.nbytes for name in chosen for part in COLLECTORS.get(name)(site.in_features).state.values())
    step = max(1, SLICE_BYTES // max(each, 1))
    found = ExpertStatistics(gathering, tokens, step)
    return found if step < experts else SiteStatistics({name: found.results[name] for name in chosen}, tokens)


def _tokens(inputs: Sequence[Inputs], experts: int, workers: Workers) -> tuple[int, ...]:
    """Return the number of rows that each expert sees."""
    total = torch.zeros(experts, dtype=torch.int64)
    for one in inputs:
        ids = one.expert_ids
        total += torch.tensor([one.rows(one.x).shape[0]]) if ids is None else torch.bincount(ids.cpu(), minlength=experts)
    workers.add(total)
    return tuple(total.tolist())


def _rows_by_expert(inputs: Inputs, experts: range) -> Iterator[tuple[int, Tensor]]:
    """Yield the rows that each of some experts sees, of those that see any; a 2-D layer is expert 0."""
    if inputs.expert_ids is None:
        rows = inputs.rows(inputs.x)
        if rows.shape[0]:
            yield 0, rows
        return
    rows, ids = inputs.x.detach().reshape(-1, inputs.x.shape[-1]), inputs.expert_ids
    order = None if bool((ids[1:] >= ids[:-1]).all()) else torch.argsort(ids, stable=True)
    ends = torch.searchsorted(ids if order is None else ids[order], torch.arange(experts.start, experts.stop + 1).to(ids))
    for expert, start, end in zip(experts, ends.tolist(), ends.tolist()[1:], strict=False):
        if end > start:
            yield expert, rows[start:end] if order is None else rows[order[start:end]]


def stack_results(found: Sequence[Tensor | None]) -> Tensor:
    """Join the results of experts; None, of one that saw no token, becomes zeros."""
    like = next(result for result in found if result is not None)
    return torch.stack([torch.zeros_like(like) if result is None else result for result in found])


class Gather(Protocol):
    """Runs collectors over what waits at a layer."""

    def __call__(self, needs: Sequence[str], quantizer: InputQuantizer = UNCHANGED) -> SiteStatistics:
        """Return the statistics called ``needs`` of the inputs, or of the inputs after a Hadamard transform."""


def gatherer(
    site: Site,
    inputs: list[Inputs],
    known: dict[str, SiteStatistics],
    products: torch.dtype | None = None,
    scratch: Scratch = MEMORY,
    workers: Workers = ALONE,
) -> Gather:
    """Return what runs collectors over ``inputs``; ``known`` remembers what has been computed of them."""

    def gather(needs: Sequence[str], quantizer: InputQuantizer = UNCHANGED) -> SiteStatistics:
        key = ",".join([*sorted(needs), *(["rotated"] if quantizer.rotated else [])])
        if any(COLLECTORS.get(name).guided for name in needs):  # tokens count differently for each
            key += f" of {site.name}"
        if key in known:
            return known[key]
        found = collect(site, needs, inputs, products, quantizer=quantizer, scratch=scratch, workers=workers)
        if not isinstance(found, ExpertStatistics):  # which would keep the inputs
            known[key] = found
        return found

    return gather
