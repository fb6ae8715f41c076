"""What happened to every weight of a model: quantized, left alone, or fallen back to a simpler method, and why.

A quantized model whose report does not list what was *not* quantized cannot be trusted: an expert stack left in float costs
memory without a word, and a site that fell back to rounding costs accuracy.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from torch import nn

from quantkit.errors import SpecError
from quantkit.nn.quantized import Quantized
from quantkit.nn.sites import Structure, read_weight
from quantkit.spec import Plan

KINDS = ("quantized", "fell back", "skipped")


@dataclass(frozen=True, slots=True)
class CoverageRow:
    """One weight.

    Attributes:
        kind: ``"quantized"`` as planned; ``"fell back"``: quantized by a simpler method than planned; ``"skipped"``: kept.
        name: site or parameter name.
        module_type: class name of the module that owns it, e.g. ``"Linear"``.
        parameters: number of weights.
        bytes_before, bytes_after: stored size; equal when skipped.
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
    """Say in a sentence if most of the weights that could be expected to be quantized are not; None if all is well.

    Counted are linear layers and experts that no rule leaves in float.
    """
    quantized, missed = 0, Counter[str]()
    for row in rows:
        quantized += row.parameters if row.kind != "skipped" else 0
        if row.missed:
            missed[row.reason or "no reason"] += row.parameters
    total = quantized + missed.total()
    if not total or missed.total() <= total / 2:
        return None
    reason, count = missed.most_common(1)[0]
    return (
        f"only {quantized / total:.0%} of the weights of linear layers and experts are quantized; "
        f"the rest stays in float, {count / total:.0%} because: {reason}"
    )


def coverage_before(model: nn.Module, structure: Structure, plan: Plan, reasons: Mapping[str, str]) -> list[CoverageRow]:
    """Return a row for every weight of the float model, as if all were skipped.

    Args:
        model, structure: the model and its layers.
        plan: layer name to scheme.
        reasons: layer name to why the plan leaves it alone, where that is known.
    """
    rows = []
    ends = [site for site in structure.after if site in structure.outside or site.name in plan]
    for site in (*structure.sites, *ends):
        weight = read_weight(model, site)
        kind = type(model.get_submodule(site.module)).__name__
        where = reasons.get(site.name, "outside the blocks" if site in structure.outside else "left out of the plan")
        rows.append(
            CoverageRow(
                "skipped", site.name, kind, site.numel, weight.nbytes, weight.nbytes, None, None if site.name in plan else where
            )
        )
    for name, reason in structure.skipped.items():
        if name.removesuffix(".weight") in {site.name for site in ends}:
            continue
        parameter = model.get_parameter(name)
        kind = type(model.get_submodule(name.rpartition(".")[0])).__name__
        # A tied parameter is stored, and counted, where it is tied to.
        count, size = (0, 0) if name in structure.shared else (parameter.numel(), parameter.nbytes)
        missed = name in structure.unreachable and name not in reasons
        rows.append(CoverageRow("skipped", name, kind, count, size, size, None, reason, missed=missed))
    return rows


def coverage_after(rows: Iterable[CoverageRow], results: Mapping[str, Quantized]) -> list[CoverageRow]:
    """Return the rows of :func:`coverage_before` with what has become of the quantized sites."""
    done = []
    for row in rows:
        one = results.get(row.name)
        if one is not None:
            kind = "fell back" if one.fell_back else "quantized"
            scheme, reason = one.qtensor.spec.describe(), "; ".join(one.notes) or None
            row = replace(
                row, kind=kind, bytes_after=one.qtensor.nbytes, scheme=scheme, reason=reason, tokens=one.tokens, missed=False
            )
        done.append(row)
    return done


def remark(rows: Iterable[CoverageRow], remarks: Mapping[str, str]) -> list[CoverageRow]:
    """Return the rows with what is unusual about a layer's scheme added to its reason."""
    return [replace(row, reason="; ".join(filter(None, (row.reason, remarks.get(row.name)))) or None) for row in rows]
