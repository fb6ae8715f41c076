r"""Statistics of one layer whose inputs are spread over several processes: the same to the last bit, however they are spread.

Float sums depend on their order, and a code that lies between two others goes either way for the last bit of a second moment.
So every batch is summed by itself, in float32 as ever, the sum is rounded to a multiple of a step that all batches share,

.. math:: s = 2^{\lceil \log_2 (m b) \rceil - 50}

and the multiples, of which there are less than 2^53, are added in float64: every such sum is exact, so that its order does not
matter. Here b is the number of batches and m bounds the sum of one: by Cauchy and Schwarz no sum of products over rows is
larger than the largest sum of squares over rows. The rounding is 2^-26 of what float32 keeps of the largest number.

Cost: rows are read twice, once for m; memory for a second moment of n inputs is 12 n^2 bytes more than alone.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from quantkit.calibrate.collectors import COLLECTORS, Collector
from quantkit.errors import CalibrationError
from quantkit.nn.sites import Site
from quantkit.system.workers import Workers

_BITS = 50
_ROWS = 256
"""Rows of a matrix that are rounded at a time."""

Shown = Callable[[], Iterable[tuple[int, Mapping[str, Tensor]]]]


def together(site: Site, needs: Sequence[str], experts: range, shown: Shown, workers: Workers) -> list[dict[str, Collector]]:
    """Return collectors that have seen the inputs of all workers, for every one of some experts; a 2-D layer has one.

    Args:
        site: the layer.
        needs: names of collectors that can be joined.
        experts: which experts.
        shown: yields this worker's rows, batch by batch: the expert, and for every collector (tokens, features). Called twice.
        workers: call this together.
    """
    found = [{name: COLLECTORS.get(name)(site.in_features) for name in needs} for _ in experts]
    steps = _steps(site, needs, shown, workers)
    totals: dict[tuple[int, str, str], Tensor] = {}
    for expert, rows in shown():
        for name, seen in rows.items():
            kind, own = COLLECTORS.get(name), found[expert - experts.start][name]
            if kind.joined == "maximum":
                own.update(seen)
                continue
            fresh = kind(site.in_features)
            fresh.update(seen)
            for part, value in fresh.state.items():
                _add(totals, (expert - experts.start, name, part), value, steps[name])
    for index, collectors in enumerate(found):
        for name, collector in collectors.items():
            for part, value in collector.state.items():
                if COLLECTORS.get(name).joined == "maximum":
                    workers.maximum(value)
                    continue
                total = totals.pop((index, name, part), None)
                total = torch.zeros(value.shape, dtype=_exact(value), device=value.device) if total is None else total
                workers.add(total)
                collector.state[part] = total.to(value.dtype)
    return found


def _steps(site: Site, needs: Sequence[str], shown: Shown, workers: Workers) -> dict[str, float]:
    """Return to what multiple the sums of every collector are rounded."""
    largest = torch.zeros(len(needs), dtype=torch.float64)
    batches = torch.zeros(1, dtype=torch.int64)
    for _, rows in shown():
        batches += 1
        for index, name in enumerate(needs):
            squares = torch.linalg.vector_norm(rows[name], dim=0, dtype=torch.float32).amax().double() ** 2
            if not torch.isfinite(squares):  # as a second moment in float32, too
                raise CalibrationError(f"{site.name}: the squares of calibration inputs overflow float32; check the model")
            # 4: of a difference of two; 2: of norms rounded to float32; the number of rows: of sums of x itself
            largest[index] = torch.maximum(largest[index], torch.clamp(8 * squares.cpu(), min=float(len(rows[name]))))
    workers.maximum(largest)
    workers.add(batches)
    bounds = [max(bound * int(batches), torch.finfo(torch.float64).tiny) for bound in largest.tolist()]
    return {name: 2.0 ** (math.ceil(math.log2(bound)) - _BITS) for name, bound in zip(needs, bounds, strict=True)}


def _exact(value: Tensor) -> torch.dtype:
    return torch.float64 if value.is_floating_point() else value.dtype


def _add(totals: dict[tuple[int, str, str], Tensor], key: tuple[int, str, str], value: Tensor, step: float) -> None:
    """Add a batch's sum, rounded to multiples of ``step``; what is no float is exact as it is."""
    if key not in totals:
        totals[key] = torch.zeros(value.shape, dtype=_exact(value), device=value.device)
    total = totals[key]
    if not value.is_floating_point():
        total += value
        return
    shift = 1.5 * 2.0**52 * step  # a float64 of this size has no digits below the step
    for strip, part in zip(
        total.view(-1, total.shape[-1]).split(_ROWS), value.view(-1, value.shape[-1]).split(_ROWS), strict=True
    ):
        strip += part.double().add_(shift).sub_(shift)
