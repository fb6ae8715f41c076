"""Time the compiled CPU kernel against ``F.linear`` on the shapes of SmolLM2-135M: ``python benchmarks/kernels_cpu.py``.

Every round runs each contender once, in turn, over 30 layers of distinct weights (so caches are as cold as in a model), and
the median over rounds is printed: microseconds per call, and how many times faster than torch in bfloat16 and float32.
"""

import argparse
import functools
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from quantkit.kernels import report
from quantkit.nn.linear import QuantLinear
from quantkit.numerics import grid
from quantkit.presets import preset
from quantkit.qtensor import GridTensor
from quantkit.spec import QuantSpec

SHAPES = {"q, o": (576, 576), "k, v": (192, 576), "gate, up": (1536, 576), "down": (576, 1536)}
PER_LAYER = {"q, o": 2, "k, v": 2, "gate, up": 2, "down": 1}
LAYERS = 30


def quantize(weight: Tensor, spec: QuantSpec) -> QuantLinear:
    scale, zero = grid.choose_qparams(weight, spec)
    return QuantLinear(GridTensor.from_codes(grid.quantize(weight, scale, zero, spec), scale, zero, spec))


def layers(scheme: str) -> dict[str, dict[str, list[Callable[[Tensor], Tensor]]]]:
    """Return contender -> shape -> one callable per distinct weight."""
    spec = preset(scheme, [576, 1536]).weight
    calls: dict[str, dict[str, list[Callable[[Tensor], Tensor]]]] = {"quantkit": {}, "bf16": {}, "fp32": {}}
    for name, shape in SHAPES.items():
        weights = [torch.randn(shape) for _ in range(LAYERS * PER_LAYER[name])]
        calls["quantkit"][name] = [quantize(weight, spec) for weight in weights]
        calls["fp32"][name] = [functools.partial(F.linear, weight=weight) for weight in weights]
        calls["bf16"][name] = [functools.partial(F.linear, weight=weight.bfloat16()) for weight in weights]
    return calls


def measure(calls: dict[str, dict[str, list[Callable[[Tensor], Tensor]]]], rows: int, rounds: int, dtype: torch.dtype) -> dict:
    """Return median seconds of one pass over all weights of a shape, per contender and shape."""
    times: dict[tuple[str, str], list[float]] = {}
    for round_ in range(rounds + 1):
        for contender, shapes in calls.items():
            own = {"bf16": torch.bfloat16, "fp32": torch.float32, "quantkit": dtype}[contender]
            for name, functions in shapes.items():
                x = torch.randn(rows, SHAPES[name][1]).to(own)
                start = time.perf_counter()
                for function in functions:
                    function(x)
                if round_:  # the first round warms up
                    times.setdefault((contender, name), []).append(time.perf_counter() - start)
    return {key: statistics.median(values) for key, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scheme", default="w4a16-g64")
    parser.add_argument("--dtype", default="float32", help="activations of the quantized layers")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32, 512])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    for row in report():
        print(row["kernel"], "available" if row["available"] else row["reason"], row["details"])
    print(f"{arguments.scheme}, {arguments.dtype} activations, {arguments.threads} threads; microseconds per call")
    with torch.inference_mode():
        calls = layers(arguments.scheme)
        for rows in arguments.rows:
            rounds = arguments.rounds if rows < 64 else max(3, arguments.rounds // 5)
            times = measure(calls, rows, rounds, getattr(torch, arguments.dtype))
            for name, (out, in_) in SHAPES.items():
                ours, bf16, fp32 = (times[c, name] / len(calls[c][name]) * 1e6 for c in ("quantkit", "bf16", "fp32"))
                print(
                    f"M={rows:<4} {name:9} {in_:>4}x{out:<4}  quantkit {ours:8.1f}  bf16 {bf16:8.1f} ({bf16 / ours:4.1f}x)"
                    f"  fp32 {fp32:8.1f} ({fp32 / ours:4.1f}x)"
                )
            step = {c: sum(times[c, name] for name in SHAPES) * 1e3 for c in calls}
            print(
                f"M={rows:<4} all {LAYERS * sum(PER_LAYER.values())} linears, ms: "
                + ", ".join(f"{c} {t:.2f}" for c, t in step.items())
            )


if __name__ == "__main__":
    main()
