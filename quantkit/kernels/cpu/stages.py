"""Arrange a tape for the CPU: which steps run between two barriers, and where in a row's memory each value is.

Arithmetic runs row by row, without a barrier, as soon as its operands exist; products, attention and mixtures run together
after it. So a *stage* is the arithmetic that became possible, and then the products that became possible by it. Values share
memory where the one is no longer needed when the other is made.

A state is loaded in the stage that stores it, because a row must see what the row before it stored. Where a stage lies between
(a product whose input depends on the state, and whose output the state depends on), rows of one sequence cannot run together
at all: :attr:`Plan.one_by_one`.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from quantkit.kernels.program.tape import (
    POSITION,
    TOKEN,
    Attend,
    Compute,
    Join,
    Load,
    Lookup,
    Mixture,
    Product,
    Step,
    Steps,
    Store,
    Tape,
)

_TOGETHER = (Product, Attend, Mixture)
ROW = 2
"""Where in a row's memory its number in the call is; token and position are before it."""
_ALIGNED = 16


@dataclass(slots=True)
class Stage:
    """Steps between barriers: arithmetic, products by common input, the rest."""

    rows: list[Step] = field(default_factory=list)
    products: list[list[Product]] = field(default_factory=list)
    attends: list[Attend] = field(default_factory=list)
    mixtures: list[Mixture] = field(default_factory=list)

    @property
    def ordered(self) -> bool:
        """Whether rows of one sequence must run in order."""
        return any(isinstance(step, Load | Store) for step in self.rows)


@dataclass(frozen=True, slots=True)
class Plan:
    """Stages, and the place of every value.

    Attributes:
        stages: in order.
        places: value to offset in a row's memory.
        width: floats of a row's memory.
        one_by_one: whether a call may have only one row of every sequence.
    """

    stages: tuple[Stage, ...]
    places: dict[int, int]
    width: int
    one_by_one: bool


TOGETHER = 3
"""Most products of one input between two barriers: kForms of ``csrc/buffers.h``, as each may round it in a way of its own."""


def plan(tape: Tape) -> Plan:
    """Arrange a tape."""
    levels, one_by_one = _levels(tape.body.steps)
    stages = [Stage() for _ in range(max(levels, default=0) + 1)]
    for step, level in zip(tape.body.steps, levels, strict=True):
        stage = stages[level]
        match step:
            case Product():
                _add_product(stage.products, step)
            case Attend():
                stage.attends.append(step)
            case Mixture():
                stage.mixtures.append(step)
            case _:
                stage.rows.append(step)
    places, width = _places(tape, stages)
    return Plan(tuple(stages), places, width, one_by_one)


def _add_product(groups: list[list[Product]], step: Product) -> None:
    read = step.reads[0]
    for group in groups:
        first = group[0].reads[0]
        if len(group) == TOGETHER:
            continue
        if (first.source, first.offset, first.shape) == (read.source, read.offset, read.shape):
            group.append(step)
            return
    groups.append([step])


def _levels(steps: Sequence[Step]) -> tuple[list[int], bool]:
    """Return the stage of every step, and whether a state's store comes after its load's stage."""
    wanted: dict[int, int] = {}
    for attempt in range(4 + len(steps)):
        levels = _forward(steps, wanted)
        stores = {step.state: level for step, level in zip(steps, levels, strict=True) if isinstance(step, Store)}
        if all(wanted.get(state, 0) == level for state, level in stores.items()):
            return levels, False
        if attempt and any(level > wanted[state] for state, level in stores.items() if state in wanted):
            break
        wanted = stores
    return _forward(steps, {}), True


def _forward(steps: Sequence[Step], wanted: dict[int, int]) -> list[int]:
    ready: dict[int, int] = defaultdict(int)
    after: dict[int, int] = {}  # cache to the first stage in which it may be read
    levels = []
    for step in steps:
        level = max((ready[one.source] for one in step.reads if isinstance(one.source, int)), default=0)
        if isinstance(step, Load):
            level = wanted.get(step.state, 0)
        if isinstance(step, Attend):
            level = level if step.append else max(level, after[step.cache])
            after[step.cache] = max(level, after.get(step.cache, 0))
        levels.append(level)
        if step.out >= 0:
            ready[step.out] = level + isinstance(step, _TOGETHER)
    return levels


def _places(tape: Tape, stages: Sequence[Stage]) -> tuple[dict[int, int], int]:
    """Return where values are, and the length of a row's memory."""
    blocks: list[tuple[int, list[int]]] = []  # time at which values are made that must be neighbours
    last: dict[int, int] = {}
    time = 0
    for stage in stages:
        for step in stage.rows:
            time += 1
            last.update({one.source: time for one in step.reads if isinstance(one.source, int)})
            if step.out >= 0:
                blocks.append((time, [step.out]))
        time += 1
        for group in stage.products:
            blocks.append((time, [step.out for step in group]))
        others: list[Step] = [*stage.attends, *stage.mixtures]
        blocks += [(time, [step.out]) for step in others]
        together: list[Step] = [step for group in stage.products for step in group]
        for step in together + others:
            last.update({one.source: time for one in step.reads if isinstance(one.source, int)})
    if isinstance(tape.body.result.source, int):
        last[tape.body.result.source] = time + 1
    return allocate(blocks, last, tape.body.widths, {TOKEN: 0, POSITION: 1}, _ALIGNED)


def allocate(
    blocks: Sequence[tuple[int, list[int]]], last: dict[int, int], widths: dict[int, int], places: dict[int, int], first: int
) -> tuple[dict[int, int], int]:
    """Give values memory, that of values whose last use is over included; values of one block are neighbours."""
    used: list[tuple[int, int, int]] = []  # begin, end, last use
    width = first
    for time, values in blocks:
        used = sorted(one for one in used if one[2] >= time)
        size = sum(widths[value] for value in values)
        begin = first
        for start, end, _ in used:
            if begin + size <= start:
                break
            begin = max(begin, -(-end // _ALIGNED) * _ALIGNED)
        used.append((begin, begin + size, max(last.get(value, time) for value in values)))
        width = max(width, begin + size)
        for value in values:
            places[value] = begin
            begin += widths[value]
    return places, -(-width // _ALIGNED) * _ALIGNED


def plan_inside(steps: Steps, places: dict[int, int], first: int) -> tuple[dict[int, int], int]:
    """Arrange the steps inside of a mixture, whose input is value 0."""
    last, blocks = {}, []
    for time, step in enumerate(steps.steps, 1):
        assert isinstance(step, Compute | Join | Lookup)
        last.update({one.source: time for one in step.reads if isinstance(one.source, int)})
        blocks.append((time, [step.out]))
    if isinstance(steps.result.source, int):
        last[steps.result.source] = len(blocks) + 1
    return allocate(blocks, last, steps.widths, places, first)
