"""Does the search for mixed precision keep its promises? Four checks on one model, in one run.

    python benchmarks/search.py [--model demo] [--data calib.txt] [--eval-data eval.txt] [--json results.json]

1. *Prediction*: ``--plans`` random plans, all of ``--bits`` bits per weight, are made with ``--method`` and compared with the
   float model: Spearman's rank correlation of the expected with the measured KL.
2. *Frontier*: the best plans of 40 sizes are expected to lose less and less; ``--points`` of them are measured. Where a larger
   plan measures a larger KL than the next smaller one, the pair is printed with a 95 % interval of the difference, from
   resampling the evaluation windows 2000 times: it is noise if the interval holds 0.
3. *Cost*: seconds of the search beside those of GPTQ with the same calibration, on the plan that was found for ``--bits``.
4. *Time*: a budget in milliseconds per token halfway between the quickest and the slowest choice: what the plan is measured to
   take, again, after the search.

The default method is rounding to nearest, for which every plan takes seconds; ``--method gptq`` takes a minute or two for each.
"""

import argparse
import platform
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

import quantkit
from quantkit.evaluation import choose_windows
from quantkit.evaluation.quality import score
from quantkit.evaluation.record import cpu_name
from quantkit.evaluation.windows import Windows
from quantkit.mixed import CHOICES
from quantkit.mixed.measured import milliseconds
from quantkit.mixed.result import SearchResult
from quantkit.nn.sites import sharing_copy
from quantkit.system.files import write_json


class Judge:
    """Measures the KL of plans, window by window."""

    def __init__(self, model: Any, tokenizer: Any, arguments: argparse.Namespace) -> None:
        self.model, self.tokenizer, self.arguments = model, tokenizer, arguments
        found = choose_windows(arguments.eval_data, tokenizer, None, windows=arguments.windows, length=512)[0]
        self.windows = [Windows(found.ids[i : i + 1], found.scored[i : i + 1]) for i in range(len(found))]
        self.base = quantkit.BaseLogits(model, max_bytes=1 << 33)
        self.calibration = quantkit.Calibration(arguments.data, arguments.samples, 512)
        if arguments.method != "rtn":
            statistics, _ = quantkit.collect(model, calibration=self.calibration, tokenizer=tokenizer)
            self.calibration = quantkit.Calibration(statistics=statistics)

    def __call__(self, plan: SearchResult) -> list[float]:
        """Return the mean KL of every window."""
        made = quantkit.quantize(
            sharing_copy(self.model),
            plan,
            method=self.arguments.method,
            calibration=self.calibration,
            tokenizer=self.tokenizer,
        )
        found = []
        for window in self.windows:
            divergence = score(made.model, window, self.base).divergence
            assert divergence is not None
            found.append(divergence.mean)
        return found


def ranks(values: list[float]) -> np.ndarray:
    return np.argsort(np.argsort(values)).astype(float)


def spearman(a: list[float], b: list[float]) -> float:
    return float(np.corrcoef(ranks(a), ranks(b))[0, 1])


def random_plans(found: SearchResult, bits: float, count: int, seed: int) -> list[SearchResult]:
    """Return plans of random choices, each within 0.5 % of ``bits`` and not above."""
    scores, draw, plans = found.scores, random.Random(seed), []
    groups = scores.menu.groups
    most = bits * scores.menu.numel / 8
    while len(plans) < count:
        lean = draw.uniform(0, 1)  # some plans are nearly even, some are wild
        near = found.at(f"{bits} bpw").choices
        size = [len(group.candidates) for group in groups]
        choices = [draw.randrange(n) if draw.random() < lean else near[i] for i, n in enumerate(size)]
        for _ in range(20000):
            taken = sum(group.candidates[c].nbytes for group, c in zip(groups, choices, strict=True))
            if 0.995 * most < taken <= most:
                plans.append(SearchResult.make(scores, found.budget, choices))
                break
            i = draw.randrange(len(groups))
            choices[i] = max(0, min(size[i] - 1, choices[i] + (1 if taken < most else -1)))
    return plans


def check_prediction(found: SearchResult, judge: Judge, arguments: argparse.Namespace) -> dict[str, Any]:
    rows = []
    for plan in random_plans(found, arguments.bits, arguments.plans, arguments.seed):
        measured = float(np.mean(judge(plan)))
        rows.append({"bits": plan.point.bits_per_weight, "expected": plan.point.kl, "measured": measured})
        print(f"  {rows[-1]['bits']:.3f} bits   expected KL {rows[-1]['expected']:.4f}   measured {measured:.4f}", flush=True)
    rank = spearman([row["expected"] for row in rows], [row["measured"] for row in rows])
    print(f"prediction: Spearman {rank:.3f} over {len(rows)} random plans of {arguments.bits} bits per weight")
    return {"spearman": rank, "plans": rows}


def check_frontier(found: SearchResult, judge: Judge, arguments: argparse.Namespace) -> dict[str, Any]:
    points = found.frontier
    expected = [point.kl for point in points]
    assert expected == sorted(expected, reverse=True), "expected KL goes up with size"
    chosen = [points[round(i)] for i in np.linspace(0, len(points) - 1, min(arguments.points, len(points)))]
    windows, rows = [], []
    for point in chosen:
        plan = found.at(f"{point.bits_per_weight + 1e-6} bpw")
        windows.append(judge(plan))
        rows.append({"bits": point.bits_per_weight, "expected": point.kl, "measured": float(np.mean(windows[-1]))})
        print(
            f"  {point.bits_per_weight:.3f} bits   expected KL {point.kl:.4f}   measured {rows[-1]['measured']:.4f}", flush=True
        )
    draw, odd = np.random.default_rng(0), []
    for i in range(len(rows) - 1):
        change = np.array(windows[i + 1]) - np.array(windows[i])
        if change.mean() <= 0:
            continue
        means = change[draw.integers(0, len(change), (2000, len(change)))].mean(1)
        low, high = (float(value) for value in np.quantile(means, (0.025, 0.975)))
        odd.append({"from": rows[i]["bits"], "to": rows[i + 1]["bits"], "rise": float(change.mean()), "low": low, "high": high})
        step = f"{rows[i]['bits']:.3f} -> {rows[i + 1]['bits']:.3f} bits"
        print(f"  {step}: KL +{change.mean():.5f} [{low:.5f}, {high:.5f}]: {'noise' if low <= 0 else 'NOT noise'}")
    beyond = sum(row["low"] > 0 for row in odd)
    print(
        f"frontier: {len(points)} points expect less and less; of {len(rows)} measured {len(odd)} go up, {beyond} beyond noise"
    )
    return {"points": len(points), "measured": rows, "rises": odd, "beyond_noise": beyond}


def check_cost(model: Any, tokenizer: Any, arguments: argparse.Namespace) -> dict[str, Any]:
    calibration = quantkit.Calibration(arguments.data, arguments.cost_samples, 512)
    run: dict[str, Any] = {"calibration": calibration, "tokenizer": tokenizer}
    found = quantkit.search(model, f"{arguments.bits} bpw", arguments.choices, **run)
    begin = time.perf_counter()
    quantkit.quantize(sharing_copy(model), found, **run)
    seconds = time.perf_counter() - begin
    print(f"cost: search {found.seconds:.1f} s, GPTQ of {arguments.cost_samples} x 512 tokens {seconds:.1f} s: ", end="")
    print(f"{found.seconds / seconds:.0%}")
    return {"search_seconds": found.seconds, "gptq_seconds": seconds, "share": found.seconds / seconds}


def check_time(model: Any, tokenizer: Any, arguments: argparse.Namespace) -> dict[str, Any]:
    run: dict[str, Any] = {"method": "rtn", "tokenizer": tokenizer}
    run["calibration"] = quantkit.Calibration(arguments.data, arguments.samples, 512)
    run["scoring"] = quantkit.Scoring(windows=arguments.score_windows)
    timed = quantkit.search(model, "1000 s", arguments.choices, **run)  # times every choice, and says how long each takes
    every = [point.ms for point in timed.uniform().values() if point.ms is not None]
    limit = arguments.ms or round((min(every) + max(every)) / 2, 2)
    found = quantkit.search(model, f"{limit} ms", arguments.choices, **run)
    again = [milliseconds(model, found.scores.menu.structure, found.plan, quantkit.Decoding(rounds=9)) for _ in range(3)]
    row = {"budget_ms": limit, "expected_ms": found.point.ms, "measured_ms": found.measured["ms"], "again_ms": again}
    row |= {"choices_ms": {name: point.ms for name, point in timed.uniform().items()}, "bits": found.point.bits_per_weight}
    print(
        f"time: budget {limit} ms; measured {row['measured_ms']:.2f} ms in the search, then {[round(one, 2) for one in again]}"
    )
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--data", help="calibration text; default: the text that every Python carries")
    parser.add_argument("--eval-data", help="evaluation text; default: other such text")
    parser.add_argument("--choices", nargs="+", default=[*CHOICES])
    parser.add_argument("--method", default="rtn", help="quantizer of the plans that are measured")
    parser.add_argument("--bits", type=float, default=4.0)
    parser.add_argument("--plans", type=int, default=20)
    parser.add_argument("--points", type=int, default=12)
    parser.add_argument("--windows", type=int, default=8, help="evaluation windows of 512 tokens")
    parser.add_argument(
        "--samples", type=int, default=32, help="calibration windows of 512 tokens, from which the scores' are taken"
    )
    parser.add_argument("--score-windows", type=int, default=8)
    parser.add_argument(
        "--cost-samples", type=int, default=128, help="calibration windows of 512 tokens where seconds are compared"
    )
    parser.add_argument("--ms", type=float, help="budget in milliseconds; default: halfway")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--check", nargs="+", default=["prediction", "frontier", "cost", "time"])
    parser.add_argument("--json", type=Path, help="write the results there")
    arguments = parser.parse_args()
    model, tokenizer = quantkit.open_model(arguments.model, torch.float32)
    judge = Judge(model, tokenizer, arguments)
    found = quantkit.search(
        model,
        f"{arguments.bits} bpw",
        arguments.choices,
        method=arguments.method,
        calibration=quantkit.Calibration(arguments.data, arguments.samples, 512),
        scoring=quantkit.Scoring(windows=arguments.score_windows),
        tokenizer=tokenizer,
    )
    print(found)
    given = {
        key: Path(value).name if isinstance(value, Path | str) else value
        for key, value in vars(arguments).items()
        if key != "json"
    }
    results: dict[str, Any] = {
        "settings": given,
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
    }
    checks: dict[str, Any] = {
        "prediction": lambda: check_prediction(found, judge, arguments),
        "frontier": lambda: check_frontier(found, judge, arguments),
        "cost": lambda: check_cost(model, tokenizer, arguments),
        "time": lambda: check_time(model, tokenizer, arguments),
    }
    for name in arguments.check:
        results[name] = checks[name]()
        if arguments.json:
            write_json(arguments.json, results)


if __name__ == "__main__":
    main()
