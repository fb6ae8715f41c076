"""What training recovers of what quantizing lost: rounding to nearest, a quantizer, and training, in one table.

    python benchmarks/qat.py --data calib.txt --eval-data eval.txt --scheme w4a16-asym-g64 --set steps=200 --set windows=2

Rows and scores are those of ``accuracy.py``, whose options for text and evaluation are the same: every row is made in a process
of its own, written, read back and scored beside the float model; seconds are those of the call that made it. The last columns
are shares of a loss, of KL on the evaluation text, KL on the other text, and perplexity:

    of RTN   (RTN - trained) / (RTN - float)          of PTQ   (PTQ - trained) / (PTQ - float)

PTQ being the best of the ``--ptq`` rows. ``--set key=value`` changes settings of training; ``--train-samples`` is how many
windows of 512 tokens are trained on. ``--json FILE`` is written after every row and continued.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import accuracy
from peers import Clock
from quantize_time import prepare

SHARES = (("KL", "kl", 0.0), ("KL, other text", "other_kl", 0.0), ("perplexity", "perplexity", None))


def main() -> None:
    arguments = parse()
    if arguments.worker:
        print("RESULT " + json.dumps(run_training(json.loads(arguments.job))))
        return
    if arguments.table:
        print_shares(json.loads(Path(arguments.table).read_text()))
        return
    work = Path(arguments.work or tempfile.mkdtemp(prefix="qat-"))
    if not (work / "training.safetensors").exists():
        work.mkdir(parents=True, exist_ok=True)
        prepare(arguments, work)
        prepare_training(arguments, work)
    report, score = accuracy.Report(arguments, (*accuracy.PROTOCOL, "train_samples")), accuracy.Scorer()
    by_recipe = [sys.executable, accuracy.__file__, "--worker", "quantkit", "--job"]
    by_training = [sys.executable, __file__, "--worker", "--job"]
    peers, settings = str(Path(__file__).with_name("peers.py")), accuracy.options(arguments.set)
    for scheme in arguments.scheme:
        rows = [("quantkit", name, {}, by_recipe) for name in ("rtn", *arguments.ptq)]
        rows.append(("quantkit", "qat", settings, by_training))
        for name, where in (peer.split("=", 1) for peer in arguments.peer):
            rows.append((name, name, settings | {"peer_rate": arguments.peer_rate}, [where, peers, name]))
        for tool, name, options, command in rows:
            row = {"scheme": scheme, "tool": tool, "recipe": name, "options": options, "distill": {}}
            if name == "qat":
                row["start"] = arguments.start
            report.measure(row, command, work / f"{scheme}-{name}", score)
    accuracy.print_table(report.found)
    print_shares(report.found)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="text to calibrate and train on (default: the text every Python carries)")
    parser.add_argument("--eval-data", help="evaluation text file")
    parser.add_argument("--scheme", nargs="+", default=["w4a16-asym-g64"])
    parser.add_argument("--ptq", nargs="*", default=["gptq+distill"], choices=sorted(accuracy.RECIPES))
    parser.add_argument("--start", default="gptq", choices=sorted(accuracy.RECIPES), help="what training begins with")
    parser.add_argument("--peer", action="append", default=[], help="torchao-qat=python, with as many steps")
    parser.add_argument("--peer-rate", type=float, default=2e-5, help="the peer's highest learning rate")
    parser.add_argument("--set", action="append", default=[], help="key=value, a setting of training")
    parser.add_argument("--train-samples", type=int, default=512)
    parser.add_argument("--compute", default="default", help=argparse.SUPPRESS)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--windows", type=int, default=30)
    parser.add_argument("--kl-windows", type=int, default=20)
    parser.add_argument("--other-windows", type=int, default=8)
    parser.add_argument("--json", help="write rows and protocol here; continued if it exists")
    parser.add_argument("--table", help="print the shares of a JSON file and stop")
    parser.add_argument("--work", help="directory for model, tokens and checkpoints; what it holds already is used")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--job", help=argparse.SUPPRESS)
    return parser.parse_args()


def prepare_training(arguments: argparse.Namespace, work: Path) -> None:
    """Write the windows (n, length) that are trained on, spread evenly over the text."""
    import torch
    from safetensors.torch import save_file

    from quantkit.calibrate.texts import encoder, load_texts, text_default
    from quantkit.hf.load import load_tokenizer

    tokenizer = load_tokenizer(work / "float")
    texts = load_texts(arguments.data) if arguments.data else text_default()[0]
    tokens = torch.tensor([token for text in texts for token in encoder(tokenizer)(text)])
    rows = tokens[: len(tokens) // arguments.length * arguments.length].view(-1, arguments.length)
    count = min(arguments.train_samples, len(rows))
    save_file({"ids": rows[[i * len(rows) // count for i in range(count)]].contiguous()}, work / "training.safetensors")


def run_training(job: dict) -> dict:
    from safetensors.torch import load_file

    import quantkit
    from quantkit.hf.load import load_float
    from quantkit.quantizers.base import QUANTIZERS
    from quantkit.transforms.distill import Distill

    model, tokenizer = load_float(Path(job["work"]) / "float")
    ids = load_file(Path(job["work"]) / "training.safetensors")["ids"]
    start = accuracy.RECIPES[job["start"]]
    clock = Clock()
    result = quantkit.train(
        model, job["scheme"], out=job["out"], training=quantkit.Training(**job["options"]),
        method=QUANTIZERS.get(start["quantizer"])(**start.get("options", {})),
        steps=[Distill(**start["distill"])] if "distill" in start else [],
        calibration=quantkit.Calibration(list(ids.split(8))), tokenizer=tokenizer,
        run=quantkit.Run(progress=lambda event: print(event, file=sys.stderr, flush=True)),
    )  # fmt: skip
    return clock.cost() | {"training": result.metadata["training"]}


def print_shares(report: dict) -> None:
    """Print how much of the loss is recovered, scheme by scheme."""
    print("\n| scheme | figure | float | RTN | best PTQ | trained | recovered of RTN | recovered of PTQ |")
    print("|---" * 8 + "|")
    for scheme in dict.fromkeys(row["scheme"] for row in report["rows"]):
        rows = {row["recipe"]: row for row in report["rows"] if row["scheme"] == scheme}
        ptq = [row for name, row in rows.items() if name in accuracy.RECIPES and name != "rtn"]
        if "qat" not in rows or "rtn" not in rows or not ptq:
            continue
        for title, key, ideal in SHARES:
            best = min(row[key] for row in ptq)
            ideal = rows["qat"]["base_perplexity"] if ideal is None else ideal
            rtn, qat = rows["rtn"][key], rows["qat"][key]
            shares = [(start - qat) / (start - ideal) for start in (rtn, best)]
            numbers = " | ".join(f"{value:.4g}" for value in (ideal, rtn, best, qat))
            print(f"| {scheme} | {title} | {numbers} | " + " | ".join(f"{share:.0%}" for share in shares) + " |")


if __name__ == "__main__":
    main()
