"""The CPU kernels on several instruction sets of one machine: ``benchmarks/kernels_isa.py --isa avx512-bf16 avx512-amx``.

Every round runs each instruction set once, in turn, on one thread and distinct weights; the smallest processor time over rounds
counts, so that other processes disturb it least. ``exact`` has bfloat16 activations, ``int8`` rounds them to int8; weights have
4 bits in groups of 64 with zero points, or are bfloat16. torch's own bfloat16 product runs beside them.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from quantkit.kernels import KERNELS, build
from quantkit.kernels.cpu import layout
from quantkit.kernels.cpu.matmul import State
from quantkit.numerics import grid
from quantkit.qtensor import GridTensor
from quantkit.spec import QuantSpec

SPEC = QuantSpec("int4", (1, 64), False)
COMPUTE = {"w4-exact": "cpu", "w4-int8": "cpu-int8", "bfloat16": "cpu"}
ROUND_FLOPS = 4e8
WEIGHT_BYTES = 8e7
"""Of distinct weights, so that they are not all in the second cache."""


def states(kind: str, shape: tuple[int, int]) -> list[State]:
    """Return distinct copies of one prepacked weight."""
    copies = max(1, min(6, int(WEIGHT_BYTES / (shape[0] * shape[1]))))
    weight = torch.randn(shape)
    if kind == "bfloat16":
        packed = [layout.prepack_float(weight.bfloat16()) for _ in range(copies)]
        return [State(one, one.struct()) for one in packed]
    scale, zero = grid.choose_qparams(weight, SPEC)
    qtensor = GridTensor.from_codes(grid.quantize(weight, scale, zero, SPEC), scale, zero, SPEC)
    return [KERNELS.get(COMPUTE[kind]).prepack(qtensor) for _ in range(copies)]


def fastest(calls: dict[str, Callable[[int], Tensor]], repeats: int, rounds: int) -> dict[str, float]:
    """Return the least processor seconds of one call, by name."""
    best = dict.fromkeys(calls, float("inf"))
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.process_time()
            for i in range(repeats):
                call(i)
            best[name] = min(best[name], (time.process_time() - start) / repeats)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--isa", nargs="+", default=["avx512-bf16", "avx512-amx"], choices=list(build.ISA_FLAGS))
    parser.add_argument("--shapes", nargs="+", default=["8192x2048", "1536x576", "49152x576"], help="outputs x inputs")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 16, 64, 512])
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--out", type=Path, help="JSON of the results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    libraries = {isa: build.load(isa) for isa in options.isa}
    results = []
    for shape in (tuple(int(n) for n in text.split("x")) for text in options.shapes):
        float_weight = torch.randn(shape).bfloat16()
        for kind, name in COMPUTE.items():
            kernel, weights = KERNELS.get(name), states(kind, shape)
            for rows in options.rows:
                x, flops = torch.randn(rows, shape[1]).bfloat16(), 2 * rows * shape[0] * shape[1]

                def ours(isa: str, i: int, x: Tensor = x, kernel=kernel, weights=weights) -> Tensor:
                    build.library = lambda: libraries[isa]
                    return kernel.matmul(x, weights[i % len(weights)], None)

                calls = {isa: lambda i, isa=isa, ours=ours: ours(isa, i) for isa in libraries}
                calls["torch-bfloat16"] = lambda _, x=x, weight=float_weight: F.linear(x, weight)
                times = fastest(calls, max(1, int(ROUND_FLOPS / flops)), options.rounds)
                rates = {isa: round(flops / seconds / 1e9, 1) for isa, seconds in times.items()}
                results.append({"shape": list(shape), "weight": kind, "rows": rows, "gigaflops": rates})
                print(
                    f"{shape[0]}x{shape[1]} {kind} {rows} rows:", *(f"{isa} {rate}" for isa, rate in rates.items()), flush=True
                )
    if options.out:
        options.out.write_text(json.dumps({"isa": options.isa, "results": results}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
