"""Put recorded steps in order: separate the output head, and leave out what nothing needs."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from quantkit.hf.lowering.record import Ids, Recorder
from quantkit.hf.lowering.trace import CannotWatch
from quantkit.kernels.program.definition import Linear
from quantkit.kernels.program.tape import Attend, Compute, Load, Product, Read, Step, Store


@dataclass(frozen=True, slots=True, eq=False)
class Head:
    """The output head and what is done to its output."""

    linear: Linear
    read: Read
    scale: float
    softcap: float | None


def split_head(recorder: Recorder, ids: Ids) -> Head:
    """Return the linear layer that makes the logits, whose elements are ``ids``.

    Raises:
        CannotWatch: the logits are no linear layer's output that is only scaled and capped.
    """
    made = {step.out: step for step in recorder.steps}
    factor, inner, capped = 1.0, 1.0, False
    read = recorder.read(ids)
    vocabulary = ids.size
    while isinstance(read.source, int):
        step = made.get(read.source)
        if isinstance(step, Product) and read.offset == 0 and read.strides == (1,):
            linear = _first_rows(step.linear, vocabulary)
            if capped:  # factor * tanh(inner * y)
                return Head(linear, step.reads[0], inner * factor, factor)
            return Head(linear, step.reads[0], factor * inner, None)
        if not isinstance(step, Compute) or read.strides != (1,) or step.op not in ("mul", "div", "tanh"):
            break
        if step.op == "tanh" and not capped:
            capped, factor, inner = True, factor * inner, 1.0
        elif step.op in ("mul", "div"):
            number = _number(step.reads[1])
            other = step.reads[0]
            if number is None and step.op == "mul":
                number, other = _number(step.reads[0]), step.reads[1]
            if number is None:
                break
            inner *= number if step.op == "mul" else 1 / number
            read = replace(other, shape=(vocabulary,), offset=other.offset + read.offset)
            continue
        read = replace(step.reads[0], shape=(vocabulary,), offset=step.reads[0].offset + read.offset)
    raise CannotWatch("the logits are not the output of a linear layer, scaled or capped")


def _number(read: Read) -> float | None:
    constant = isinstance(read.source, Tensor) and (read.source.numel() == 1 or not any(read.strides))
    return float(read.source[read.offset]) if constant and isinstance(read.source, Tensor) else None


def _first_rows(linear: Linear, rows: int) -> Linear:
    if rows == linear.shape[0]:
        return linear
    if not isinstance(linear.weight, Tensor):
        raise CannotWatch("the logits are a part of a quantized layer's output")
    bias = None if linear.bias is None else linear.bias[:rows]
    return Linear(linear.weight[:rows], (rows, linear.shape[1]), bias)


def needed(steps: Sequence[Step], result: Read, states: Sequence[int]) -> tuple[list[Step], list[int]]:
    """Return the steps that the result, or the next token, needs, and the sizes of the states that are left."""
    made: dict[int, Step] = {step.out: step for step in steps}
    read_states: set[int] = set()
    while True:
        wanted, kept = set[int](), list[Step]()
        if isinstance(result.source, int):
            wanted.add(result.source)
        seen: set[int] = set()
        for step in reversed(steps):
            store = isinstance(step, Store) and step.state in read_states and not _unchanged(step, made)
            if step.out in wanted or store or isinstance(step, Attend):
                kept.append(step)
                wanted |= {one.source for one in step.reads if isinstance(one.source, int)}
                if isinstance(step, Load):
                    seen.add(step.state)
        if seen == read_states:
            break
        read_states = seen
    numbers = {old: new for new, old in enumerate(sorted(read_states))}
    ordered = [replace(step, state=numbers[step.state]) if isinstance(step, Load | Store) else step for step in reversed(kept)]
    return ordered, [states[old] for old in sorted(read_states)]


def _unchanged(step: Store, made: dict[int, Step]) -> bool:
    """Return whether a state is stored as it was."""
    read = step.reads[0]
    source = made.get(read.source) if isinstance(read.source, int) else None
    return isinstance(source, Load) and source.state == step.state and read.is_run and not read.offset
