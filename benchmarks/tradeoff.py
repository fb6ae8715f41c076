"""The picture on the README's first page: bits against KL, one scheme for all layers beside plans that were searched.

    python benchmarks/tradeoff.py measure results.json --out FOLDER [--quantizer gptq] [--samples 16] ...
    python benchmarks/tradeoff.py draw results.json docs/images/tradeoff.png

``measure`` is a sweep (:func:`quantkit.sweep`) in ``--out``, which continues where it was stopped, and writes what the picture
needs: ``{"settings": {...}, "rows": [{"name", "bits", "kl", "kl_se", "searched"}, ...]}``. Rows that were measured otherwise
can be put into such a file by hand. ``draw`` marks the frontier: the rows that no other beats in both bits and KL.
"""

import argparse
import json
from pathlib import Path

import quantkit
from quantkit.evaluation.record import cpu_name
from quantkit.mixed import CHOICES
from quantkit.report.plots import Point
from quantkit.report.trade_off import TradeOff, figure_of
from quantkit.system.files import write_json

SCHEMES = ("w2a16-asym-g64", "w3a16-asym-g64", "w4a16-asym-g64", "w5a16-asym-g64", "w6a16-asym-g64", "w8a16-g64")
BUDGETS = ("2.5 bpw", "2.75 bpw", "3 bpw", "3.3 bpw", "3.75 bpw", "4.31 bpw", "4.75 bpw", "5.3 bpw", "6.3 bpw")


def measure(arguments: argparse.Namespace) -> None:
    result = quantkit.sweep(
        arguments.model,
        arguments.schemes,
        [arguments.quantizer],
        budgets=arguments.budgets,
        choices=arguments.choices,
        out=arguments.out,
        calibration=quantkit.Calibration(arguments.data, arguments.samples, 512),
        evaluate={"data": arguments.eval_data, "windows": arguments.windows, "length": 1024},
        dtype="float32",
        run=quantkit.Run(progress=lambda event: print(event.detail, flush=True) if event.stage == "sweep" else None),
    )
    print(result)
    names = ("model", "quantizer", "samples", "windows", "choices")
    given = {name: getattr(arguments, name) for name in names}
    given |= {
        name: value and Path(value).name for name, value in (("data", arguments.data), ("eval_data", arguments.eval_data))
    }
    rows = [
        {"name": row.budget or row.scheme, "bits": row.bits, "kl": row.kl, "kl_se": row.kl_se, "searched": bool(row.budget)}
        for row in result.done
    ]
    write_json(arguments.json, {"settings": given, "cpu": cpu_name(), "rows": rows})


def draw(arguments: argparse.Namespace) -> None:
    rows = json.loads(arguments.json.read_text())["rows"]
    best = {
        row["name"] for row in rows if not any(o["bits"] <= row["bits"] and o["kl"] < row["kl"] for o in rows if o is not row)
    }
    points = tuple(
        Point(row["name"], row["bits"], row["kl"], y_error=(row["kl_se"] or 0.0,) * 2, style=int(row["searched"]))
        for row in rows
    )
    families = ("one scheme for all layers", "searched within a budget")
    labels = ("bits per weight", "KL from the float model, nats per token")
    figure = figure_of(TradeOff(points, frozenset(best), families, *labels))
    arguments.picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(arguments.picture, dpi=110)
    print(f"written: {arguments.picture}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("measure")
    one.add_argument("json", type=Path)
    one.add_argument("--out", required=True, help="directory of the sweep")
    one.add_argument("--model", default="demo")
    one.add_argument("--quantizer", default="gptq")
    one.add_argument("--schemes", nargs="+", default=[*SCHEMES])
    one.add_argument("--budgets", nargs="+", default=[*BUDGETS])
    one.add_argument("--choices", nargs="+", default=[*CHOICES])
    one.add_argument("--data", help="calibration text; default: the text that every Python carries")
    one.add_argument("--eval-data", help="evaluation text; default: other such text")
    one.add_argument("--samples", type=int, default=128, help="calibration windows of 512 tokens")
    one.add_argument("--windows", type=int, default=8, help="evaluation windows of 1024 tokens")
    one.set_defaults(do=measure)
    two = commands.add_parser("draw")
    two.add_argument("json", type=Path)
    two.add_argument("picture", type=Path, help="PNG or SVG")
    two.set_defaults(do=draw)
    arguments = parser.parse_args()
    arguments.do(arguments)


if __name__ == "__main__":
    main()
