"""What happened to every weight of a model: quantized, left alone, or fallen back to a simpler method, and why.

A quantized model whose report does not list what was *not* quantized cannot be trusted: an expert stack left in float costs
memory without a word, and a site that fell back to rounding costs accuracy.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from quantkit.errors import SpecError
from quantkit.hf.ledger import Ledger, ledger_of
from quantkit.nn.quantized import Quantized
from quantkit.nn.sites import Structure, read_weight
from quantkit.spec import Plan
from quantkit.system.tables import table_html

KINDS = ("quantized", "fell back", "skipped", "carried over")


UNKNOWN = "none"
"""Stands for the module of a tensor that no module of the model holds."""


@dataclass(frozen=True, slots=True)
class CoverageRow:
    """One weight.

    Attributes:
        kind: ``"quantized"`` as planned; ``"fell back"``: quantized by a simpler method than planned; ``"skipped"``: kept;
            ``"carried over"``: a tensor of the source that the model's class does not know, copied as it is.
        name: site or parameter name.
        module_type: class name of the module that owns it, e.g. ``"Linear"``.
        parameters: number of weights.
        bytes_before, bytes_after: stored size, in the source and in a checkpoint; equal when skipped, unless the source holds a
            tensor twice or in another dtype.
        scheme: the grid, e.g. ``"int4 g64"``; None when skipped.
        reason: why it was skipped or fell back, or a note.
        tokens: calibration tokens that it multiplied, for a stack one number per expert; empty where none were counted.
        missed: a linear layer or expert that stays in float though no rule says so.
    """

    kind: str
    name: str
    module_type: str
    parameters: int
    bytes_before: int
    bytes_after: int
    scheme: str | None = None
    reason: str | None = None
    tokens: tuple[int, ...] = ()
    missed: bool = False

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise SpecError(f"coverage of {self.name}: kind {self.kind!r}; want one of {', '.join(KINDS)}")


@dataclass(frozen=True, slots=True)
class CoverageSummary:
    """Totals of rows that share kind, module type, scheme and reason.

    ``tokens`` is the smallest and the largest number of calibration tokens of any layer or expert; None if none were counted.
    """

    kind: str
    module_type: str
    scheme: str | None
    reason: str | None
    count: int
    parameters: int
    bytes_before: int
    bytes_after: int
    tokens: tuple[int, int] | None = None


class Coverage(list[CoverageRow]):
    """The rows of a model. Printed and in a notebook it is the summary that :func:`summarise` makes; iterate for the rows."""

    def __repr__(self) -> str:
        lines = [f"{g.count:6,} {g.kind:12} {g.module_type}, {g.scheme or g.reason or 'as it was'}" for g in summarise(self)]
        return "\n".join([f"Coverage of {len(self)} weights", *lines])

    def _repr_html_(self) -> str:
        heads = ("", "module", "scheme", "tensors", "weights", "MB before", "MB after", "reason")
        rows = [
            (g.kind, g.module_type, g.scheme, g.count, g.parameters, g.bytes_before / 1e6, g.bytes_after / 1e6, g.reason)
            for g in summarise(self)
        ]
        return table_html(heads, rows)


def summarise(rows: Iterable[CoverageRow]) -> list[CoverageSummary]:
    """Group rows by kind, module type, scheme and reason: quantized first, then fallen back, then skipped, big ones first.

    The totals of the groups are the totals of the rows: nothing is left out.
    """
    groups: dict[tuple[str, str, str | None, str | None], list[CoverageRow]] = {}
    for row in rows:
        groups.setdefault((row.kind, row.module_type, row.scheme, row.reason), []).append(row)
    summary = [
        CoverageSummary(
            *key,
            count=len(members),
            parameters=sum(row.parameters for row in members),
            bytes_before=sum(row.bytes_before for row in members),
            bytes_after=sum(row.bytes_after for row in members),
            tokens=_range(tokens for row in members for tokens in row.tokens),
        )
        for key, members in groups.items()
    ]
    return sorted(summary, key=lambda s: (KINDS.index(s.kind), -s.parameters))


def _range(values: Iterable[int]) -> tuple[int, int] | None:
    found = list(values)
    return (min(found), max(found)) if found else None


def shortfall(rows: Iterable[CoverageRow]) -> str | None:
    """Say in a sentence if most of the weights that could be expected to be quantized as planned are not; None if all is well.

    Counted are linear layers and experts that no rule leaves in float.
    """
    quantized, missed, fallen = 0, Counter[str](), Counter[str]()
    for row in rows:
        quantized += row.parameters if row.kind in ("quantized", "fell back") else 0
        if row.missed:
            missed[row.reason or "no reason"] += row.parameters
        if row.kind == "fell back":
            fallen[row.reason or "no reason"] += row.parameters
    total = quantized + missed.total()
    if not total or missed.total() <= total / 2:
        return _mostly_rounded(fallen, quantized)
    reason, count = missed.most_common(1)[0]
    return (
        f"only {quantized / total:.0%} of the weights of linear layers and experts are quantized; "
        f"the rest stays in float, {count / total:.0%} because: {reason}"
    )


def _mostly_rounded(fallen: Counter[str], quantized: int) -> str | None:
    """Say so if most of the quantized weights were rounded to nearest, though the method wants their inputs."""
    if fallen.total() <= quantized / 2:
        return None
    reason, count = fallen.most_common(1)[0]
    return (
        f"{fallen.total() / quantized:.0%} of the quantized weights fell back to plain rounding, "
        f"{count / quantized:.0%} because: {reason}"
    )


def coverage_before(model: nn.Module, structure: Structure, plan: Plan, reasons: Mapping[str, str]) -> list[CoverageRow]:
    """Return a row for every weight of the float model, as if all were skipped, and for every other tensor of its source.

    The rows' ``bytes_before`` add up to the bytes of all tensors in the source, if the model was loaded from one.

    Args:
        model, structure: the model and its layers.
        plan: layer name to scheme.
        reasons: layer name to why the plan leaves it alone, where that is known.
    """
    ledger, rows = ledger_of(model), []
    ends = [site for site in structure.after if site in structure.outside or site.name in plan]
    for site in (*structure.sites, *ends):
        weight = read_weight(model, site)
        kind = type(model.get_submodule(site.module)).__name__
        where = reasons.get(site.name, "outside the blocks" if site in structure.outside else "left out of the plan")
        before = _source_bytes(ledger, f"{site.module}.{site.parameter}", weight)
        reason = None if site.name in plan else where
        rows.append(CoverageRow("skipped", site.name, kind, site.numel, before, weight.nbytes, None, reason))
    for name, reason in structure.skipped.items():
        if name.removesuffix(".weight") in {site.name for site in ends}:
            continue
        parameter = model.get_parameter(name)
        kind = type(model.get_submodule(name.rpartition(".")[0])).__name__
        if name in structure.shared:  # stored, and counted, where it is tied to
            twice = ledger is not None and ledger.stored_twice(name, structure.skipped[name].removeprefix("tied to "))
            rows.append(
                CoverageRow("skipped", name, kind, 0, _source_bytes(ledger, name, parameter) if twice else 0, 0, None, reason)
            )
            continue
        before, missed = _source_bytes(ledger, name, parameter), name in structure.unreachable and name not in reasons
        dtype = ledger.source_dtype(name) if ledger is not None else None
        if dtype is not None and dtype != parameter.dtype:
            reason = f"{reason}; {_short(dtype)} in the source, {_short(parameter.dtype)} in the model"
        row = CoverageRow("skipped", name, kind, parameter.numel(), before, parameter.nbytes, None, reason, missed=missed)
        rows.append(row)
    return [*rows, *_buffers(model, ledger), *(_carried(ledger) if ledger is not None else ())]


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _source_bytes(ledger: Ledger | None, name: str, tensor: Tensor) -> int:
    """Return the bytes of a parameter in the source; in the model's dtype if there is none."""
    dtype = ledger.source_dtype(name) if ledger is not None else None
    return tensor.numel() * (dtype or tensor.dtype).itemsize


def _buffers(model: nn.Module, ledger: Ledger | None) -> list[CoverageRow]:
    """Return a row for every buffer that a checkpoint holds."""
    rows = []
    stored = model.state_dict().keys() - {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for name, buffer in model.named_buffers():
        if name in stored:
            kind = type(model.get_submodule(name.rpartition(".")[0])).__name__
            before = 0 if ledger is not None and name not in ledger.fills else _source_bytes(ledger, name, buffer)
            rows.append(CoverageRow("skipped", name, kind, buffer.numel(), before, buffer.nbytes, None, "buffer"))
    return rows


def _carried(ledger: Ledger) -> list[CoverageRow]:
    """Return a row for every tensor that is copied from the source as it is."""
    reason = "the model's class does not know it"
    return [
        CoverageRow("carried over", name, UNKNOWN, torch.Size(h.shape).numel(), h.nbytes, h.nbytes, None, reason)
        for name, h in ledger.carried_headers.items()
    ]


def coverage_after(
    rows: Iterable[CoverageRow], results: Mapping[str, Quantized], stored: Mapping[str, int] | None = None
) -> list[CoverageRow]:
    """Return the rows of :func:`coverage_before` with what has become of the quantized sites.

    Args:
        rows: of the float model.
        results: layer name to its codes.
        stored: layer name to the bytes of its tensors in the checkpoint, where one is written: a format may add to codes and
            scales, such as their shape.
    """
    done = []
    for row in rows:
        one = results.get(row.name)
        if one is not None:
            kind = "fell back" if one.fell_back else "quantized"
            scheme, reason = one.qtensor.spec.describe(), "; ".join((*one.notes, *one.warnings)) or None
            after = (stored or {}).get(row.name, one.qtensor.nbytes)
            row = replace(row, kind=kind, bytes_after=after, scheme=scheme, reason=reason, tokens=one.tokens, missed=False)
        done.append(row)
    return done


def remark(rows: Iterable[CoverageRow], remarks: Mapping[str, str]) -> list[CoverageRow]:
    """Return the rows with what is unusual about a layer's scheme added to its reason."""
    return [replace(row, reason="; ".join(filter(None, (row.reason, remarks.get(row.name)))) or None) for row in rows]
