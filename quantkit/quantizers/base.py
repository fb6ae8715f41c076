"""What a quantizer is, and the one place that runs it on a layer."""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn

from quantkit.errors import CalibrationError, QuantkitError, SpecError
from quantkit.nn.quantized import Quantized
from quantkit.nn.sites import Site, SiteStatistics
from quantkit.nn.sizes import RunSize
from quantkit.numerics import grid
from quantkit.qtensor import QTensor, concatenate
from quantkit.quantizers.divide import Remarks, bring_together, granules, portions, spread
from quantkit.registry import Registry
from quantkit.spec import ActivationSpec, QuantSpec, Scheme
from quantkit.system.compute import Compute
from quantkit.system.workers import ALONE, Workers


@dataclass(frozen=True, slots=True)
class QuantizedBlock:
    """A block whose layers are quantized, for a quantizer that goes on with all of them together.

    Attributes:
        model: holds the block, which is on the compute device and has the quantized weights.
        layers: every quantized layer of the block: its codes, its float weight, and what its inputs are rounded to.
        forward: batch number to the block's output (B, T, H), through whatever weights the model holds.
        targets: the float model's output of the block, one (B, T, H) per batch.
        compute: device and dtypes.
    """

    model: nn.Module
    layers: Mapping[Site, tuple[QTensor, Tensor, ActivationSpec | None]]
    forward: Callable[[int], Tensor]
    targets: Sequence[Tensor]
    compute: Compute


@dataclass(frozen=True, slots=True)
class BlockCost:
    """What a quantizer does to a block beside running it once over the calibration text.

    Attributes:
        passes: further passes through the block, in words.
        nbytes: memory beside the block, its activations and one layer's second moment.
    """

    passes: tuple[str, ...] = ()
    nbytes: int = 0


class Quantizer(Protocol):
    """Turns one float weight into codes on a given grid.

    A member is a frozen dataclass whose fields are its options. It derives from this class, whose defaults are a quantizer
    that works without calibration, on integer grids, one layer at a time.

    Attributes:
        any_grid: it also takes grids that are no integers.
        refines_blocks: it goes on with all layers of a block together: :meth:`refine_block`.
        by_rows: codes of one row (or of the rows that share scales) do not depend on the others, so that a weight may be
            handed over in slices of rows, which stay in the cache and need no memory of the weight's size.
        divisible: the same, but a slice takes as long to prepare as the whole: it is only worth while for several processes.
    """

    any_grid: ClassVar[bool] = False
    refines_blocks: ClassVar[bool] = False
    by_rows: ClassVar[bool] = False
    divisible: ClassVar[bool] = False

    @property
    def needs(self) -> tuple[str, ...]:
        """Names of the collectors it wants; empty means that it works without calibration."""
        return ()

    @property
    def batch_size(self) -> int | None:
        """Most calibration windows that may run together; None leaves the batches as they are."""
        return None

    def quantize(self, weight: Tensor, spec: QuantSpec, statistics: SiteStatistics | None) -> tuple[QTensor, tuple[str, ...]]:
        """Quantize a finite float32 ``weight`` (out, in).

        Args:
            weight: not modified.
            spec: the grid; divides the weight.
            statistics: results of :attr:`needs`, or None if the layer was never reached in calibration.

        Returns:
            The quantized weight and notes on anything unusual (extra damping, a fallback), empty when all went well.
        """

    def quantize_at_once(self, weight: Tensor, spec: QuantSpec) -> tuple[QTensor, float, float, int] | None:
        """Quantize a whole weight (out, in) of any dtype and usual size without statistics, if there is a quick way.

        Returns:
            None if there is none; else the quantized weight, the same as from :meth:`quantize`; the sums of squared errors and
            of squared weights; and the number of rows with weights that have all become zero.
        """
        return None

    def refine_block(self, block: QuantizedBlock) -> dict[Site, QTensor]:
        """Return better codes and scales for the layers of a block whose layers are quantized, if :attr:`refines_blocks`.

        The model is as before when it is done; the caller keeps the result only if the block's output comes closer to the
        float model's.
        """
        return {}

    def rejects(self, scheme: Scheme) -> str | None:
        """Say why layers of a scheme cannot be quantized by this; None if they can."""
        if scheme.weight.blocks is not None and not self.any_grid:
            return f"{type(self).__name__} chooses codes on plain grids, not blocks {scheme.weight.blocks}; use quantizer gptq"
        if not scheme.weight.is_integer and not self.any_grid:
            return f"{type(self).__name__} chooses integers, not {scheme.weight.dtype}; use quantizer rtn"
        return None

    def cost(self, size: RunSize) -> BlockCost:
        """Return an estimate of what it costs beside the calibration itself."""
        return BlockCost()


QUANTIZERS: Registry[type[Quantizer]] = Registry("quantizer", package="quantkit.quantizers", error=SpecError)


def quantizer_name(quantizer: Quantizer) -> str:
    """Return the name that a quantizer is registered under, or its class's if it is not."""
    return next((name for name, kind in QUANTIZERS if kind is type(quantizer)), type(quantizer).__name__)


def quantize_site(
    quantizer: Quantizer,
    name: str,
    weight: Tensor,
    spec: QuantSpec,
    statistics: SiteStatistics | None,
    global_scale: Tensor | None = None,
    workers: Workers = ALONE,
) -> Quantized:
    """Quantize the weight (out, in) or (experts, out, in) of the layer called ``name``.

    Experts are quantized one by one, each with its own statistics; one that saw no token in calibration falls back.

    Args:
        quantizer: how codes are chosen. On a grid with a global scale it sees the weight multiplied by that.
        name: for messages.
        weight: floating, not modified.
        spec: the grid.
        statistics: what the quantizer needs, or None.
        global_scale: (1,) that a grid with one shall have, because other layers have it too; None takes the weight's own.
        workers: who does a part of it; all call this together, with the same weight and statistics, and get the same.

    Raises:
        SpecError: if the grid does not divide the weight.
        CalibrationError: if the weight holds NaN or infinity.
    """
    if reason := spec.rejects(tuple(weight.shape)):
        raise SpecError(f"{name}: {reason}")
    if reason := quantizer.rejects(Scheme(spec)):
        raise SpecError(f"{name}: {reason}")
    seen = statistics.tokens if statistics is not None else ()
    try:
        if weight.dim() == 2:
            one = _quantize_matrix(quantizer, weight, spec, statistics, global_scale, workers)
            return dataclasses.replace(one, tokens=seen)
        parts = _quantize_experts(quantizer, weight, spec, statistics, workers)
    except QuantkitError as error:
        raise type(error)(f"{name}: {error}") from error
    loss = sum(part.loss for part in parts) / len(parts)
    fell_back = any(part.fell_back for part in parts)
    return Quantized(type(parts[0].qtensor).stack([p.qtensor for p in parts]), loss, _notes(parts), fell_back, tokens=seen)


def _notes(parts: Sequence[Quantized]) -> tuple[str, ...]:
    """Return what is unusual about experts, each note with the numbers of all experts that it is true of."""
    of: dict[str, list[int]] = {}
    for index, part in enumerate(parts):
        for note in (*part.notes, *part.warnings):
            of.setdefault(note, []).append(index)
    counted = f" of {len(parts)}"
    return tuple(
        f"expert{'s' * (len(found) > 1)} {', '.join(map(str, found))}{counted * (len(found) > 1)}: {note}"
        for note, found in of.items()
    )


def _quantize_experts(
    quantizer: Quantizer, weight: Tensor, spec: QuantSpec, statistics: SiteStatistics | None, workers: Workers
) -> list[Quantized]:
    """Quantize matrices (experts, out, in) one by one, workers in turn; statistics are computed by all together."""
    done: dict[int, Quantized] = {}
    for index, matrix in enumerate(weight):
        own = statistics.expert(index) if statistics and statistics.tokens[index] else None
        if index % workers.size == workers.rank:
            done[index] = _quantize_matrix(quantizer, matrix, spec, own)
    if not workers.shares:
        return list(done.values())
    facts = {index: (one.loss, one.notes, one.fell_back) for index, one in done.items()}
    told = {int(index): said for text in workers.texts(json.dumps(facts)) for index, said in json.loads(text).items()}
    parts = []
    for index, matrix in enumerate(weight):
        own_codes = done.pop(index).qtensor if index in done else None
        qtensor = spread(own_codes, spec, tuple(matrix.shape), workers, index % workers.size)
        loss, notes, fell_back = told[index]
        parts.append(Quantized(qtensor, loss, tuple(notes), fell_back))
    return parts


def _quantize_matrix(
    quantizer: Quantizer,
    weight: Tensor,
    spec: QuantSpec,
    statistics: SiteStatistics | None,
    global_scale: Tensor | None = None,
    workers: Workers = ALONE,
) -> Quantized:
    """Quantize one matrix; one of extreme numbers is brought to a usual size first, by a power of two, and its scales back.

    Where rows do not depend on each other they are done slice by slice, and by several workers.
    """
    largest = _largest(weight)
    shift = grid.exponent_shift(largest) if spec.blocks is None else 0  # float16 of a block holds no extreme numbers
    own = None
    if spec.has_global_scale:
        shared = None if global_scale is None else grid.shifted(global_scale.to(largest), -shift)
        own = shared if shared is not None else grid.choose_global_scale(grid.shifted(largest, shift).view(1), spec).to(largest)
    shape = tuple(weight.shape)
    rows = portions(spec, shape, workers, divisible=quantizer.by_rows or quantizer.divisible)
    mine, part, remarks = rows[workers.rank], None, Remarks()
    if mine.stop > mine.start or not workers.shares:
        part, remarks = _quantize_portion(quantizer, weight[mine], spec, statistics, (shift, largest, own), workers)
    if workers.shares or part is None:
        part, remarks = bring_together(part, remarks, rows, shape[-1], spec, workers)
    if lost := remarks.lost:
        said = f"{lost} of {len(weight)} output channels become zero: they are far smaller than what shares their scale"
        remarks.notes.append(said)
    return Quantized(part, remarks.loss, tuple(remarks.notes), bool(quantizer.needs) and statistics is None)


def _quantize_portion(
    quantizer: Quantizer,
    weight: Tensor,
    spec: QuantSpec,
    statistics: SiteStatistics | None,
    usual: tuple[int, Tensor, Tensor | None],
    workers: Workers,
) -> tuple[QTensor, Remarks]:
    """Quantize rows (n, in) of a matrix.

    Args:
        quantizer, spec, statistics: as for :func:`quantize_site`.
        weight: the rows.
        usual: of the whole matrix the power of two that brings it to a usual size, its largest magnitude, its global scale.
        workers: who has other rows; then errors are summed in parts that do not depend on how many they are.
    """
    shift, largest, own = usual
    parts: list[QTensor] = []
    remarks = Remarks()
    everything = slice(0, len(weight))
    for rows in granules(everything, spec, tuple(weight.shape), workers):
        if shift or own is not None or (done := quantizer.quantize_at_once(weight[rows], spec)) is None:
            break
        parts.append(done[0])
        remarks.add(Remarks([done[1]], [done[2]], done[3]))
    for rows in () if parts else grid.row_slices(weight, spec) if quantizer.by_rows else [everything]:
        piece = weight[rows].float()
        qtensor, said = _quantize_rows(quantizer, piece, spec, statistics, shift, own)
        rounded = qtensor.dequantize()
        lost = int(((piece != 0).any(-1) & (rounded == 0).all(-1)).sum())
        within = granules(slice(0, len(piece)), spec, tuple(piece.shape), workers)
        sizes = [error_sizes(piece[some], rounded[some], statistics, grid.exponent_shift(largest)) for some in within]
        remarks.add(Remarks([noise for noise, _ in sizes], [signal for _, signal in sizes], lost, list(said)))
        parts.append(qtensor)
    return parts[0] if len(parts) == 1 else concatenate(parts), remarks


def _quantize_rows(
    quantizer: Quantizer,
    weight: Tensor,
    spec: QuantSpec,
    statistics: SiteStatistics | None,
    shift: int,
    global_scale: Tensor | None,
) -> tuple[QTensor, tuple[str, ...]]:
    """Quantize rows (n, in) in float32, multiplied by ``2^shift`` and, where the grid has one, by the global scale for that."""
    usual = grid.shifted(weight, shift)
    if global_scale is not None:
        qtensor, notes = quantizer.quantize(usual * global_scale, spec, statistics)
        qtensor = qtensor.with_parts({"global_scale": grid.shifted(global_scale, shift)})
    else:
        qtensor, notes = quantizer.quantize(usual, spec, statistics)
        if shift:
            scale = qtensor.parts()["scale"]
            qtensor = qtensor.with_parts({"scale": grid.shifted(scale.float(), -shift).to(scale.dtype)})
    for name in ("scale", "global_scale"):
        _refuse_lost_scales(qtensor.parts().get(name), spec)
    return qtensor, notes


def _largest(weight: Tensor) -> Tensor:
    """Return the largest magnitude of a weight (out, in), float32 ().

    Raises:
        CalibrationError: the weight holds NaN or infinity.
    """
    largest = grid.largest_magnitude(weight).float() if weight.numel() else torch.zeros(())
    if not bool(torch.isfinite(largest)):
        raise CalibrationError("the weight holds NaN or infinity; repair or reload the model")
    return largest


def _refuse_lost_scales(scale: Tensor | None, spec: QuantSpec) -> None:
    if scale is not None and not bool((torch.isfinite(scale.float()) & (scale.float() != 0)).all()):
        raise SpecError(
            f"a scale is zero or not finite in {spec.scale_dtype}; use scale_dtype float32, or skip the layer by a rule"
        )


def relative_error(weight: Tensor, approximation: Tensor, statistics: SiteStatistics | None) -> float:
    """Return ||(W - Q) x||^2 / ||W x||^2 in expectation over the calibration inputs (plain weights without statistics)."""
    noise, signal = error_sizes(weight, approximation, statistics, grid.exponent_shift(weight))
    return noise / max(signal, 1e-30)


def error_sizes(
    weight: Tensor, approximation: Tensor, statistics: SiteStatistics | None, shift: int = 0
) -> tuple[float, float]:
    """Return numerator and denominator of :func:`relative_error`, of weights multiplied by ``2^shift``; sums over rows."""
    weight = grid.shifted(weight, shift)
    error = weight - grid.shifted(approximation, shift)
    results = {} if statistics is None else statistics.results
    moments = results.get("hessian", results.get("guided_hessian"))
    if moments is not None:
        hessian = usual_size(moments)
        noise, signal = ((e @ hessian) * e for e in (error, weight))
    elif "mean_square" in results:
        noise, signal = (e.double().square() * usual_size(results["mean_square"]) for e in (error, weight))
    else:
        noise, signal = error.square(), weight.square()
    return float(noise.sum(dtype=torch.float64)), float(signal.sum(dtype=torch.float64))


def usual_size(moments: Tensor) -> Tensor:
    """Return second moments, multiplied by a power of two if they are so large or small that products of them get lost."""
    return grid.shifted(moments, grid.exponent_shift(moments))
