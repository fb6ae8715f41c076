"""The table of what ``benchmarks/gpu.py --json`` has measured, beside what the kernels are made to reach.

    python benchmarks/gpu_table.py results.json

A line per goal: measured, wanted first, wanted in the end. What a run has not measured is said, not left out. Ratios are of
contenders of one run; percentages are of that run's own read rate.
"""

import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

Found = dict[str, Any]


class Goal(NamedTuple):
    """What is measured, how it is read from a run, what is wanted first and in the end, and its unit."""

    name: str
    value: Callable[[Found], float]
    first: float
    stretch: float
    unit: str = "x"
    at_most: bool = False


def pick(rows: list[Found], **wanted: Any) -> Found:
    """Return the row with these values.

    Raises:
        LookupError: there is none.
    """
    for row in rows:
        if all(row.get(name) == value for name, value in wanted.items()):
            return row
    raise LookupError(wanted)


def speedup(found: Found, least: int, most: int, kind: str = "int4") -> float:
    """Return the geometric mean over shapes (the head where it was run) and numbers of tokens."""
    values = [row[f"{kind}_speedup"] for row in found["matmul"] if least <= row["tokens"] <= most]
    if not values:
        raise LookupError(least)
    return statistics.geometric_mean(values)


def of_read_rate(shape: str) -> Callable[[Found], float]:
    """Return what reads the share of the read rate that one token's product of a shape reaches."""
    return lambda found: 100 * pick(found["matmul"], shape=shape, tokens=1)["int4_tb_s"] / found["machine"]["read_tb_s"]


def rate(**wanted: Any) -> Callable[[Found], float]:
    """Return what reads the tokens per second of a decoding run."""
    return lambda found: pick(found["decode"], kv="float", context=128, **wanted)["tokens_per_s"]


def over_float(kind: str) -> Callable[[Found], float]:
    """Return what reads how much faster a token attends to a long past that is stored as ``kind``."""

    def read(found: Found) -> float:
        row = pick(found["attention"], context=32768)
        ratio: float = row["float"] / row[kind]
        return ratio

    return read


def flatness(found: Found) -> float:
    """Return how much longer 16 tokens take than one, over a layer's products."""
    return pick(found["chain"], tokens=16)["int4"] / pick(found["chain"], tokens=1)["int4"]


INT4, INT8_HEAD, BF16 = ({"weights": w, "head": h} for w, h in (("int4", "bf16"), ("int4", "int8"), ("bf16", "bf16")))
GOALS = [
    *(
        Goal(f"int4, one token, {shape}: of the read rate", of_read_rate(shape), first, stretch, "%")
        for shape, first, stretch in (("o", 55, 70), ("qkv", 62, 75), ("down", 78, 88), ("gate_up", 85, 92), ("head", 92, 96))
    ),
    Goal("a layer's products, one token: of the read rate",
         lambda f: 100 * pick(f["chain"], tokens=1)["tb_s"] / f["machine"]["read_tb_s"], 75, 88, "%"),
    Goal("int4 over bf16, 1 to 16 tokens, geometric mean", lambda f: speedup(f, 1, 16), 2.6, 3.3),
    Goal("16 tokens over one, a layer's products", flatness, 1.15, 1.05, at_most=True),
    *(
        Goal(f"int4 over bf16, {tokens} tokens", lambda f, t=tokens: speedup(f, t, t), first, stretch)
        for tokens, first, stretch in ((64, 1.8, 2.6), (128, 1.1, 1.5), (256, 0.8, 1.0), (1024, 0.85, 0.97), (4096, 0.92, 0.98))
    ),
    Goal("int8 over bf16, one token", lambda f: speedup(f, 1, 1, "int8"), 1.6, 1.9),
    Goal("decoding, bf16", rate(**BF16, batch=1), 150, 175, "tokens/s"),
    Goal("decoding, int4, bf16 head", rate(**INT4, batch=1), 360, 500, "tokens/s"),
    Goal("decoding, int4, int8 head", rate(**INT8_HEAD, batch=1), 390, 560, "tokens/s"),
    Goal("decoding, int4 over bf16", lambda f: rate(**INT4, batch=1)(f) / rate(**BF16, batch=1)(f), 2.3, 2.9),
    Goal("decoding, int4, 16 sequences", rate(**INT4, batch=16), 3500, 5500, "tokens/s"),
    Goal("decoding, int4, 64 sequences", rate(**INT4, batch=64), 8000, 16000, "tokens/s"),
    *(
        Goal(f"attention at 32768, {kind} over float", over_float(kind), first, stretch)
        for kind, first, stretch in (("int8", 1.6, 1.9), ("int4", 2.4, 3.3))
    ),
]  # fmt: skip


def table(found: Found) -> str:
    """Return the table of one run in Markdown."""
    device = found.get("machine", {}).get("device", "a device that was not measured")
    lines = [f"| {device} | measured | first | in the end | |", "|---|---|---|---|---|"]
    for goal in GOALS:
        try:
            value = goal.value(found)
        except (LookupError, TypeError):
            measured, verdict = "not measured", ""
        else:
            measured = f"{value:.3g} {goal.unit}"
            reached = [value <= wanted if goal.at_most else value >= wanted for wanted in (goal.first, goal.stretch)]
            verdict = "reached" if all(reached) else "first reached" if reached[0] else "missed"
        lines.append(f"| {goal.name} | {measured} | {goal.first:g} | {goal.stretch:g} | {verdict} |")
    return "\n".join(lines)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    print(table(json.loads(Path(sys.argv[1]).read_text())))
