"""What decoding loses where other programs use the cores, and what it costs: ``python benchmarks/neighbours.py CHECKPOINT``.

Busy loops (one Python process each, of the same priority) are stopped and continued in turn, round by round, while tokens are
decoded all the time. Per number of loops: tokens per second, processor milliseconds per token of the decoding process, and the
share of the cores that it, the loops, and everything else on the machine had; medians over rounds, smallest and largest beside.

Threads that only wait for each other must not use the time of a core that somebody else could use. So with as many loops as
cores, half of the cores is the decode's fair share, and it should keep at least (1 - 0.15) of half its speed, at no more
processor time per token.
"""

import argparse
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from quantkit.checkpoint.open import open_model
from quantkit.engine.backend import OneSequence
from quantkit.evaluation.record import cpu_name
from quantkit.hf.backend import make_backend
from quantkit.nn.embedding import input_table
from quantkit.system.cores import usable_cores
from quantkit.system.files import write_json  # quantkit before torch, as in the command: OpenMP reads how long to wait

CONTEXT, NEW_TOKENS = 128, 384
LOOP = "while True: pass"
TICK = os.sysconf("SC_CLK_TCK")
FIGURES = ("tokens_per_s", "cpu_ms_per_token", "own_share", "loops_share", "others_share")


def used_s(pid: int) -> float:
    """Return the processor seconds of a process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICK


def machine_used_s() -> float:
    """Return the processor seconds that everything on the machine has used, guests and stolen time included."""
    values = [int(text) for text in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    return (sum(values) - values[3] - values[4]) / TICK


class Decode:
    """A model that decodes, over and over, after a prompt of :data:`CONTEXT` tokens."""

    def __init__(self, model: Any, engine: str) -> None:
        self.step = OneSequence(make_backend(model, engine=engine), CONTEXT + NEW_TOKENS)
        self.prompt = [token % input_table(model)[0] for token in range(3, 3 + CONTEXT)]
        self.at, self.token = NEW_TOKENS, 0

    def run(self, seconds: float) -> tuple[int, float]:
        """Decode for about so long; return the number of tokens, and seconds without the prompts in between."""
        tokens, busy, deadline = 0, 0.0, time.perf_counter() + seconds
        while time.perf_counter() < deadline:
            if self.at == NEW_TOKENS:
                self.token, self.at = int(self.step(self.prompt, 0).argmax()), 0
            begin = time.perf_counter()
            while self.at < NEW_TOKENS and time.perf_counter() < deadline:
                self.token = int(self.step([self.token], CONTEXT + self.at).argmax())
                self.at, tokens = self.at + 1, tokens + 1
            busy += time.perf_counter() - begin
        return tokens, busy


def one_round(decode: Decode, loops: list[subprocess.Popen[bytes]], seconds: float) -> dict[str, float]:
    """Decode beside ``loops``, which run meanwhile."""
    for loop in loops:
        loop.send_signal(signal.SIGCONT)
    time.sleep(0.05)
    before = (machine_used_s(), sum(used_s(loop.pid) for loop in loops), time.process_time(), time.perf_counter())
    tokens, busy = decode.run(seconds)
    after = (machine_used_s(), sum(used_s(loop.pid) for loop in loops), time.process_time(), time.perf_counter())
    for loop in loops:
        loop.send_signal(signal.SIGSTOP)
    everything, theirs, own, wall = (b - a for a, b in zip(before, after, strict=True))
    cores = wall * (os.cpu_count() or 1)
    return {
        "tokens_per_s": tokens / busy,
        "cpu_ms_per_token": 1e3 * own / tokens * busy / wall,
        "own_share": own / cores,
        "loops_share": theirs / cores,
        "others_share": max(everything - theirs - own, 0.0) / cores,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path")
    parser.add_argument("--loops", type=int, nargs="+", default=[0, usable_cores()])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=2.0, help="of a round")
    parser.add_argument("--engines", nargs="+", default=["native", "modules"])
    parser.add_argument("--json")
    arguments = parser.parse_args()
    model: Any = open_model(arguments.path)[0].eval()
    decodes = {engine: Decode(model, engine) for engine in arguments.engines}
    for decode in decodes.values():
        decode.run(1.0)
    loops = [subprocess.Popen([sys.executable, "-S", "-c", LOOP]) for _ in range(max(arguments.loops))]
    cells = [(engine, count) for engine in decodes for count in arguments.loops]
    rounds: dict[tuple[str, int], list[dict[str, float]]] = {cell: [] for cell in cells}
    try:
        for loop in loops:
            loop.send_signal(signal.SIGSTOP)
        for _ in range(arguments.rounds):
            for engine, count in cells:
                rounds[engine, count].append(one_round(decodes[engine], loops[:count], arguments.seconds))
    finally:
        for loop in loops:
            loop.kill()
    table: list[dict[str, Any]] = []
    for (engine, count), found in rounds.items():
        columns = {name: sorted(row[name] for row in found) for name in FIGURES}
        spread = {name: [statistics.median(v), v[0], v[-1]] for name, v in columns.items()}
        table.append({"engine": decodes[engine].step.engine, "loops": count, "median_smallest_largest": spread})
        shown = ", ".join(f"{name} {v[0]:.3g} ({v[1]:.3g}..{v[2]:.3g})" for name, v in spread.items())
        print(f"{engine}, {count} loops: {shown}")
    import torch

    result = {
        "cpu": cpu_name(),
        "cores": usable_cores(),
        "threads": torch.get_num_threads(),
        "context": CONTEXT,
        "rounds": arguments.rounds,
        "seconds": arguments.seconds,
        "rows": table,
    }
    if arguments.json:
        write_json(arguments.json, result)


if __name__ == "__main__":
    main()
