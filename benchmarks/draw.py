"""What choosing a token from logits costs on the CPU, beside transformers' processors with torch.multinomial.

    python benchmarks/draw.py [--rows 1] [--rounds 40] [--json results.json]

Microseconds per call on float32 logits of random numbers, medians of interleaved rounds, and how many times longer transformers
takes. Beside it the plain torch definition, which is what runs without a compiler.
"""

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import LogitsProcessorList, MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from quantkit.engine.sampling import Sampling, choose
from quantkit.kernels.functions.sampling import Draw, draw_plain
from quantkit.system.files import write_json

SAMPLINGS = {
    "greedy": Sampling(),
    "temperature": Sampling(0.8),
    "top-k 50": Sampling(0.8, top_k=50),
    "top-p 0.95": Sampling(0.8, top_p=0.95),
    "min-p 0.05": Sampling(0.8, min_p=0.05),
    "top-k 50, top-p 0.95": Sampling(0.8, top_k=50, top_p=0.95),
}


def theirs(sampling: Sampling) -> Callable[[Tensor], Tensor]:
    """Return what transformers' generate does with logits."""
    if sampling.greedy:
        return lambda logits: logits.argmax(-1)
    chain = LogitsProcessorList([TemperatureLogitsWarper(sampling.temperature)])
    chain.extend([] if sampling.top_k is None else [TopKLogitsWarper(sampling.top_k)])
    chain.extend([] if sampling.top_p is None else [TopPLogitsWarper(sampling.top_p)])
    chain.extend([] if sampling.min_p is None else [MinPLogitsWarper(sampling.min_p)])
    return lambda logits: torch.multinomial(chain(None, logits).softmax(-1), 1)


def measure(vocabulary: int, rows: int, rounds: int) -> list[dict[str, object]]:
    """Time every way for every sampling."""
    logits = 3 * torch.randn(rows, vocabulary)
    found: list[dict[str, object]] = []
    for name, sampling in SAMPLINGS.items():
        positions, seeds = list(range(rows)), [7] * rows
        draw, where = Draw.of([sampling] * rows, seeds, "cpu"), torch.arange(rows, dtype=torch.int32)
        transformers = theirs(sampling)
        ways: dict[str, Callable[[], object]] = {
            "ours": lambda sampling=sampling, s=seeds, p=positions: choose(logits, [sampling] * rows, s, p),
            "transformers": lambda run=transformers: run(logits).tolist(),
            "plain": lambda draw=draw, where=where: draw_plain(logits, draw, where).tolist(),
        }
        times: dict[str, list[float]] = {way: [] for way in ways}
        for turn in range(rounds + 2):
            for way, run in ways.items():
                start = time.perf_counter()
                run()
                if turn > 1:
                    times[way].append((time.perf_counter() - start) * 1e6)
        us = {way: round(statistics.median(taken), 1) for way, taken in times.items()}
        row = {"vocabulary": vocabulary, "how": name, **us, "ratio": round(us["transformers"] / us["ours"], 2)}
        found.append(row)
        print(row)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--json")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    found = [row for words in (49152, 128256) for row in measure(words, arguments.rows, arguments.rounds)]
    if arguments.json:
        machine = f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}"
        write_json(arguments.json, {"machine": machine, "rows": arguments.rows, "microseconds": found})


if __name__ == "__main__":
    main()
