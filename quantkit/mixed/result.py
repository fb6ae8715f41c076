"""What a search found: a plan, why, and what a little more or less would buy."""

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quantkit.errors import SpecError
from quantkit.mixed.allocate import Allocation, Option
from quantkit.mixed.budget import Budget
from quantkit.mixed.groups import Menu
from quantkit.pipeline.plan import Resolution
from quantkit.spec import Scheme
from quantkit.system.tables import facts_html

POINTS = 40
"""Points of a frontier."""


@dataclass(frozen=True, slots=True)
class Point:
    """One best plan among all of its size.

    Attributes:
        bits_per_weight: of the layers that were searched, as files count.
        nbytes: of the whole checkpoint directory.
        kl: expected KL divergence from the float model, in nats per token: it tells which plan is better, and only roughly how
            far from the float model it will be.
        ms: expected time per token, if kernels were timed.
    """

    bits_per_weight: float
    nbytes: int
    kl: float
    ms: float | None = None


@dataclass(frozen=True)
class Scores:
    """Everything that a plan for another budget needs: no model, no text.

    Attributes:
        menu: groups and their candidates.
        losses: for every group the expected KL of its candidates.
        times: for every group the time of its candidates for one token, in nanoseconds; None if kernels were not timed.
        rest_ms: time for one token of everything that is not searched.
        scale: measured KL to expected KL, if it was measured; 1 else.
    """

    menu: Menu
    losses: tuple[tuple[float, ...], ...]
    times: tuple[tuple[int, ...], ...] | None = None
    rest_ms: float = 0.0
    scale: float = 1.0

    def allocation(self, kind: str) -> Allocation:
        """Return the best choices for every budget in bytes, or in nanoseconds if ``kind`` is ``"ms"``.

        Raises:
            SpecError: times are wanted, and kernels were not timed.
        """
        if kind == "ms" and self.times is None:
            raise SpecError("budget in ms: kernels were not timed in this search; search again with such a budget")
        groups = []
        for number, (group, losses) in enumerate(zip(self.menu.groups, self.losses, strict=True)):
            weights = self.times[number] if kind == "ms" and self.times else [one.nbytes for one in group.candidates]
            groups.append([Option(weight, loss) for weight, loss in zip(weights, losses, strict=True)])
        return Allocation(groups)

    def capacity(self, budget: Budget) -> int:
        """Return what of a budget is there for the groups, in bytes or nanoseconds."""
        limit = min(budget.limit, 1e15)  # a float that is larger may become infinite
        if budget.kind == "bits":
            return math.floor(limit * self.menu.numel / 8 + 1e-6)
        if budget.kind == "bytes":
            return math.floor(limit) - self.menu.fixed_bytes - self.menu.files_bytes
        return math.floor((limit - self.rest_ms) * 1e6)

    def point(self, choices: Sequence[int]) -> Point:
        """Return what choices amount to."""
        chosen = [group.candidates[index] for group, index in zip(self.menu.groups, choices, strict=True)]
        nbytes = sum(one.nbytes for one in chosen)
        ms = None
        if self.times is not None:
            ms = self.rest_ms + sum(times[index] for times, index in zip(self.times, choices, strict=True)) / 1e6
        kl = self.scale * math.fsum(losses[index] for losses, index in zip(self.losses, choices, strict=True))
        return Point(nbytes * 8 / self.menu.numel, nbytes + self.menu.fixed_bytes + self.menu.files_bytes, kl, ms)

    def frontier(self, kind: str = "bits", points: int = POINTS) -> list[Point]:
        """Return the best plans from the smallest to the largest."""
        return [self.point(choices) for choices in self.allocation(kind).frontier(points)]

    def solve(self, budget: Budget) -> list[int]:
        """Return the number of the best candidate of every group within a budget.

        Raises:
            SpecError: a budget that the choices cannot meet, with what they can.
        """
        if budget.kind == "kl":
            return self._least(budget)
        allocation = self.allocation(budget.kind)
        choices = allocation.at(self.capacity(budget))
        if choices is None:
            smallest = self.point(self._cheapest(budget.kind))
            reach = f"out of reach; {self._range(budget.kind, smallest)}"
            raise SpecError(f"budget {budget}: {reach}; {self._way_out(budget.kind)}")
        return choices

    def _way_out(self, kind: str) -> str:
        """Say how a budget that is too small could be met."""
        rest = self.menu.fixed_bytes + self.menu.files_bytes
        if kind != "bytes" or rest < 0.2 * (rest + self.allocation("bits").least):
            return "add smaller choices"
        return (
            f"{rest / 1e6:.4g} MB are taken by what is not searched (embedding and head, unless included; norms; tokenizer); "
            "include embedding and head (--include embedding --include head, --format native), or add smaller choices"
        )

    def _least(self, budget: Budget) -> list[int]:
        """Return the smallest choices whose expected KL is within a budget."""
        allocation = self.allocation("bits")
        low, high = allocation.least, allocation.most
        best = allocation.at(high)
        assert best is not None
        if self.point(best).kl > budget.limit:
            raise SpecError(
                f"budget {budget}: out of reach; the choices give at least {self.point(best).kl:.3g}; add larger ones"
            )
        while high - low > 1:
            middle = (low + high) // 2
            choices = allocation.at(middle)
            if choices is not None and self.point(choices).kl <= budget.limit:
                best, high = choices, middle
            else:
                low = middle
        return best

    def _cheapest(self, kind: str) -> list[int]:
        if kind == "ms" and self.times is not None:
            return [min(range(len(times)), key=times.__getitem__) for times in self.times]
        return [0] * len(self.menu.groups)  # candidates stand in order of size

    def _range(self, kind: str, smallest: Point) -> str:
        """Say what the choices can reach."""
        weights = self.times if kind == "ms" and self.times else None
        choices = [
            max(range(len(group.candidates)), key=weights[number].__getitem__) if weights else len(group.candidates) - 1
            for number, group in enumerate(self.menu.groups)
        ]
        largest = self.point(choices)
        value = {
            "bits": lambda p: f"{p.bits_per_weight:.4g} bpw",
            "bytes": lambda p: f"{p.nbytes / 1e6:.4g} MB",
            "ms": lambda p: f"{p.ms:.4g} ms",
        }[kind]
        return f"the choices reach from {value(smallest)} to {value(largest)}"


@dataclass(frozen=True, repr=False)
class SearchResult(Resolution):
    """A plan that was searched; :func:`quantkit.quantize` takes it as its scheme.

    Attributes:
        budget: what was asked for.
        choices: the number of the chosen candidate of every group.
        scores: what everything would cost.
        seconds: how long the search took.
        measured: what was measured of the plan itself: ``{"kl": ...}`` or ``{"ms": ...}``; empty for a budget of size.
    """

    budget: Budget = field(default=Budget("bits", 4.25))
    choices: tuple[int, ...] = ()
    scores: Scores = field(default=None)  # type: ignore[assignment]
    seconds: float = 0.0
    measured: dict[str, float] = field(default_factory=dict)

    @classmethod
    def make(
        cls, scores: Scores, budget: Budget, choices: Sequence[int], seconds: float = 0.0, **measured: float
    ) -> "SearchResult":
        """Return the plan that choices stand for."""
        menu, plan, skipped = scores.menu, dict[str, Scheme](), dict[str, str]()
        for group, index in zip(menu.groups, choices, strict=True):
            candidate = group.candidates[index]
            plan |= candidate.schemes
            if not candidate.schemes:
                skipped |= {site.name: "left in float by the search" for site in group.sites}
        if not plan:
            raise SpecError(f"budget {budget}: every layer may stay in float; there is nothing to quantize")
        order = {site.name: index for index, site in enumerate((*menu.structure.sites, *menu.structure.after))}
        plan = dict(sorted(plan.items(), key=lambda item: order[item[0]]))
        base = {name: reason for name, reason in menu.base.skipped.items() if name not in plan}
        point = scores.point(choices)
        origin = {"budget": str(budget), "bits_per_weight": point.bits_per_weight, "expected_kl": point.kl, **measured}
        return cls(plan, base | skipped, (), {}, origin, budget, tuple(choices), scores, seconds, dict(measured))

    @property
    def point(self) -> Point:
        """What the plan amounts to."""
        return self.scores.point(self.choices)

    @property
    def frontier(self) -> list[Point]:
        """The best plans from the smallest to the largest, with equal steps between them."""
        return self.scores.frontier("ms" if self.budget.kind == "ms" else "bits")

    def save(self, path: str | Path) -> None:
        """Write the plan, why it was chosen, and the frontier, as JSON; :func:`quantkit.load_plan` reads the plan back."""
        from quantkit.mixed.recorded import save_plan

        save_plan(Path(path), self)

    def at(self, budget: str | Budget) -> "SearchResult":
        """Return the best plan within another budget, without looking at the model again.

        Raises:
            SpecError: it cannot be met, or is in milliseconds and kernels were not timed.
        """
        other = Budget.parse(budget)
        return SearchResult.make(self.scores, other, self.scores.solve(other), self.seconds)

    def rows(self) -> list[dict[str, Any]]:
        """Return for every group: layers, weights, choice, bits, expected KL, and what one choice less or more would change.

        ``sensitivity`` is the expected KL of the smallest choice, in nats per million weights: why a group gets more bits.
        """
        found = []
        for group, losses, index in zip(self.scores.menu.groups, self.scores.losses, self.choices, strict=True):
            bits = [one.nbytes * 8 / group.numel for one in group.candidates]
            row: dict[str, Any] = {"layers": group.name, "weights": group.numel, "choice": group.candidates[index].choice}
            row |= {"bits": bits[index], "kl": losses[index], "sensitivity": losses[0] / group.numel * 1e6}
            for name, other in (("smaller", index - 1), ("larger", index + 1)):
                if 0 <= other < len(losses):
                    row[name] = {"choice": group.candidates[other].choice, "bits": bits[other], "kl": losses[other]}
            found.append(row)
        return found

    def moved(self, other: "SearchResult") -> list[dict[str, Any]]:
        """Return the groups to which another plan of the same search gives another choice, those that change KL most first.

        Each has ``layers``, ``before`` and ``after`` (choices), and ``kl``: how much the expected KL goes up, or down.
        """
        pairs = [
            (mine, theirs) for mine, theirs in zip(self.rows(), other.rows(), strict=True) if mine["choice"] != theirs["choice"]
        ]
        found = [
            {"layers": mine["layers"], "before": mine["choice"], "after": theirs["choice"], "kl": theirs["kl"] - mine["kl"]}
            for mine, theirs in pairs
        ]
        return sorted(found, key=lambda row: -abs(row["kl"]))

    def choice_names(self) -> list[str]:
        """Return the names of all choices, the smallest first."""
        sizes: dict[str, float] = {}
        for group in self.scores.menu.groups:
            for one in group.candidates:
                sizes.setdefault(one.choice, one.nbytes / group.numel)
        return sorted(sizes, key=lambda name: sizes[name])

    def by_kind(self) -> dict[str, list[float]]:
        """Return kind of layer (its name without the block's number) to the share of its weights with each choice, in order."""
        names, found = self.choice_names(), dict[str, list[float]]()
        for row in self.rows():
            shares = found.setdefault(kind_of(row["layers"]), [0.0] * len(names))
            shares[names.index(row["choice"])] += row["weights"]
        return {kind: [one / sum(shares) for one in shares] for kind, shares in found.items()}

    def plot(self) -> Any:
        """Return a figure: how sensitive every layer is and what it got, by block and kind, and this plan on the frontier.

        Raises:
            QuantkitError: matplotlib is missing.
        """
        from quantkit.mixed.picture import draw

        return draw(self)

    def facts(self) -> dict[str, str]:
        """Return what a reader wants to know first, label to value."""
        point, counts = self.point, Counter[str]()
        for row in self.rows():
            counts[row["choice"]] += row["weights"]
        total = sum(counts.values())
        found = {
            "budget": str(self.budget),
            "bits per weight": f"{point.bits_per_weight:.3f} over the {total / 1e6:.1f} million weights that were searched",
            "checkpoint": f"{point.nbytes / 1e6:.1f} MB",
            "choices": ", ".join(f"{count / total:.0%} {name}" for name, count in counts.most_common()),
            "expected KL": f"{point.kl:.4f} nats per token",
        }
        if point.ms is not None:
            found["time per token"] = f"{point.ms:.2f} ms"
        found |= {f"measured {name}": f"{value:.4g}" for name, value in self.measured.items()}
        for label, other in self.nearby(0.95, 1.05).items():
            found[label] = f"expected KL {other.kl:.4f} at {other.bits_per_weight:.3f} bits per weight"
        return found | {"search": f"{self.seconds:.1f} s"}

    def nearby(self, *factors: float) -> dict[str, Point]:
        """Return the best plans of sizes near this one's, by what they are called: ``nearby(1.05)`` is ``"5% larger"``.

        Sizes are those of the layers that are searched. What no choices can reach is left out.
        """
        allocation, found = self.scores.allocation("bits"), dict[str, Point]()
        taken = allocation.weight(self.choices)
        for factor in factors:
            choices = allocation.at(round(taken * factor))
            if choices is not None and list(choices) != list(self.choices):
                found[f"{abs(factor - 1):.0%} {'larger' if factor > 1 else 'smaller'}"] = self.scores.point(choices)
        return found

    def uniform(self) -> dict[str, Point]:
        """Return what every choice that all layers can have would amount to, if all of them had it."""
        found = {}
        for name in self.choice_names():
            places = [[one.choice for one in group.candidates] for group in self.scores.menu.groups]
            if all(name in names for names in places):
                found[name] = self.scores.point([names.index(name) for names in places])
        return found

    def __repr__(self) -> str:
        facts = self.facts()
        width = max(map(len, facts))
        return "SearchResult\n" + "\n".join(f"  {name:{width}}  {value}" for name, value in facts.items())

    def _repr_html_(self) -> str:
        return facts_html(self.facts())


def kind_of(name: str) -> str:
    """Return a group's name without the numbers in it: ``model.layers.3.mlp.down_proj`` is of kind ``mlp.down_proj``."""
    return re.split(r"\.\d+\.", name)[-1]
