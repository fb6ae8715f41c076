"""Choose one option for every group of layers so that the sum of losses is least within a budget: exact, for all budgets.

This is the multiple-choice knapsack problem. With integer weights :math:`w_{go}` and losses :math:`l_{go}` of option o of group
g, the dynamic programme

.. math:: L_g(b) = \\min_o \\; L_{g-1}(b - w_{go}) + l_{go}

gives the least loss :math:`L(b)` for *every* budget b in one pass (Kellerer, Pferschy, Pisinger 2004, Knapsack Problems,
section 11.5), and the table of choices gives the options of each. Weights are counted in a unit that divides all their
differences; only where that makes too many steps, in a larger one, each rounded up: a budget is never exceeded, and missed by
at most one unit a group.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

MOST_STEPS = 1 << 17
"""Budgets that are told apart."""


@dataclass(frozen=True, slots=True)
class Option:
    """One way to store a group.

    Attributes:
        weight: what it takes of the budget: bytes, or nanoseconds.
        loss: what it costs; the sum over groups is made least.
    """

    weight: int
    loss: float


class Allocation:
    """The best choices for every budget.

    Args:
        groups: the options of every group, at least one each.
    """

    def __init__(self, groups: Sequence[Sequence[Option]]) -> None:
        self.groups = [list(options) for options in groups]
        self.least = sum(min(one.weight for one in options) for options in self.groups)
        self.most = sum(max(one.weight for one in options) for options in self.groups)
        spare = [[one.weight - min(o.weight for o in options) for one in options] for options in self.groups]
        self._unit = max(1, math.gcd(*(value for values in spare for value in values)))
        if (self.most - self.least) // self._unit > MOST_STEPS:
            self._unit = -(-(self.most - self.least) // MOST_STEPS)
        self._steps = [[-(-value // self._unit) for value in values] for values in spare]
        size = sum(max(steps) for steps in self._steps) + 1
        self._loss, self._chosen = self._solve(size)

    def _solve(self, size: int) -> tuple[NDArray[np.float64], list[NDArray[np.uint8]]]:
        """Return the least loss for every budget in units above the least, and the option of every group that gives it."""
        loss, chosen = np.zeros(size), []
        for options, steps in zip(self.groups, self._steps, strict=True):
            best, choice = np.full(size, np.inf), np.zeros(size, np.uint8)
            for index, (option, step) in enumerate(zip(options, steps, strict=True)):
                candidate = np.full(size, np.inf)
                candidate[step:] = loss[: size - step] + option.loss
                better = candidate < best
                best[better], choice[better] = candidate[better], index
            loss = best
            chosen.append(choice)
        return loss, chosen

    def at(self, budget: int) -> list[int] | None:
        """Return the number of the option of every group that lose least within ``budget``; None if nothing fits."""
        if budget < self.least:
            return None
        left = min((budget - self.least) // self._unit, len(self._loss) - 1)
        found: list[int] = []
        for choice, steps in zip(reversed(self._chosen), reversed(self._steps), strict=True):
            found.append(int(choice[left]))
            left -= steps[found[-1]]
        return found[::-1]

    def weight(self, choices: Sequence[int]) -> int:
        """Return what choices take of the budget."""
        return sum(options[index].weight for options, index in zip(self.groups, choices, strict=True))

    def loss(self, choices: Sequence[int]) -> float:
        """Return the sum of losses of choices."""
        return math.fsum(options[index].loss for options, index in zip(self.groups, choices, strict=True))

    def frontier(self, points: int) -> list[list[int]]:
        """Return at most so many choices from the smallest to the largest, each with less loss than the one before."""
        found: list[list[int]] = []
        for budget in np.linspace(self.least, self.most, points):
            choices = self.at(round(float(budget)))
            if choices is not None and (not found or self.loss(choices) < self.loss(found[-1])):
                found.append(choices)
        return found
