"""What each recipe loses: bits per weight, perplexity, KL, agreement, seconds and peak memory, in one table.

    python benchmarks/accuracy.py --data calib.txt --eval-data eval.txt --recipe gptq --scheme w4a16-asym-g64 w3a16-asym-g64

A scheme may be a budget (``"4.31 bpw"``), whose plan is searched first, or a mix of llama.cpp's (``Q4_K_M``): quantkit writes a
GGUF of the same bytes, and ``--peer llama.cpp`` its own; the token table is left in float by both while they are scored.

Every row is one recipe on one scheme, quantized in a process of its own: seconds and processor seconds (of all threads, which
say more on a busy machine) are those of the quantizing call, calibration included; loading the model and writing files are
not. Memory is the peak resident size of the process. The result is written, its bits per weight are counted from the files
(a peer that writes none has its format's nominal bits), and it is loaded again and scored in float32 beside the float model:
perplexity over ``--windows`` windows of 1024 tokens spread over the evaluation text, KL and agreement on the first
``--kl-windows`` of them, and the same KL on ``--other-windows`` of the text that every Python carries, which nothing here was
calibrated or chosen on. ``--quick`` takes fewer tokens of all kinds: for a first look, not for a claim.

``--peer auto-round=PEER/bin/python`` adds that tool's row for the same schemes (a Python that has the package);
``--peer llama.cpp=FOLDER`` takes the folder of ``llama-quantize``.
``--json FILE`` is written after every row and continued: rows of the same settings that it holds are not run again.
``--table FILE`` prints the table of such a file in markdown and does nothing else.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from peers import PEERS, Clock, calibration_ids
from quantize_time import cpu_name, prepare

RECIPES: dict[str, dict] = {
    "rtn": {"quantizer": "rtn"},
    "rtn-importance": {"quantizer": "rtn-importance"},
    "hqq": {"quantizer": "hqq"},
    "gptq": {"quantizer": "gptq"},
    "gptq-guided": {"quantizer": "gptq", "options": {"guided": True}},
    "gptaq": {"quantizer": "gptaq"},
    "gptaq-guided": {"quantizer": "gptaq", "options": {"guided": True}},
    "autoround": {"quantizer": "autoround"},
    "gptq+distill": {"quantizer": "gptq", "distill": {"steps": 64, "windows": 2}},
    "gptaq+distill": {"quantizer": "gptaq", "distill": {"steps": 64, "windows": 2}},
    "gptq-guided+distill": {
        "quantizer": "gptq",
        "options": {"guided": True},
        "distill": {"steps": 64, "windows": 2},
    },
    "gptaq-guided+distill": {
        "quantizer": "gptaq",
        "options": {"guided": True},
        "distill": {"steps": 64, "windows": 2},
    },
    "autoround+distill": {"quantizer": "autoround", "distill": {"steps": 64, "windows": 2}},
    "gptaq+codes": {"quantizer": "gptaq", "distill": {"steps": 192, "windows": 2, "code_rate": 0.03}},
    "w8a8-smoothquant": {"quantizer": "rtn", "transforms": ["smoothquant"]},
}
"""Row name to what :func:`quantkit.quantize` is called with; ``options`` go to the quantizer."""

LLAMA_MIXES = ("Q2_K", "Q3_K_S", "Q3_K_M", "Q3_K_L", "Q4_K_S", "Q4_K_M", "Q5_K_M", "Q6_K", "IQ4_XS")

QUICK = {"samples": 32, "windows": 6, "kl_windows": 6, "other_windows": 4}
PROTOCOL = ("samples", "length", "windows", "kl_windows", "other_windows", "data", "eval_data", "compute")
COLUMNS = {
    "bits_per_weight": ("bits per weight", ".2f"),
    "perplexity": ("perplexity", ".2f"),
    "kl": ("KL", ".3f"),
    "kl_p99": ("KL p99", ".2f"),
    "top1": ("top-1 %", ".1f"),
    "other_kl": ("KL, other text", ".3f"),
    "seconds": ("seconds", ".0f"),
    "cpu_seconds": ("CPU seconds", ".0f"),
    "peak_mib": ("peak MiB", ".0f"),
}


def main() -> None:
    arguments = parse()
    if arguments.worker == "score":
        run_scores(json.loads(arguments.job))
    elif arguments.worker:
        print("RESULT " + json.dumps(run_quantkit(json.loads(arguments.job))))
    elif arguments.table:
        print_table(json.loads(Path(arguments.table).read_text()))
    else:
        measure(arguments)


def measure(arguments: argparse.Namespace) -> None:
    work = Path(tempfile.mkdtemp(prefix="accuracy-")) if arguments.work is None else Path(arguments.work)
    if not (work / "calibration.safetensors").exists():
        work.mkdir(parents=True, exist_ok=True)
        prepare(arguments, work)
    report = Report(arguments, PROTOCOL)
    tools = [("quantkit", name, [sys.executable, __file__, "--worker", "quantkit", "--job"]) for name in arguments.recipe]
    peers = str(Path(__file__).with_name("peers.py"))
    for name, where in (peer.split("=", 1) for peer in arguments.peer):
        tools.append((name, name, [sys.executable if name == "llama.cpp" else where, peers, name]))
    extra = {"options": options(arguments.option), "distill": options(arguments.distill)}
    score = Scorer()
    for scheme in arguments.scheme:
        for tool, name, command in tools:
            if scheme in LLAMA_MIXES and tool not in ("llama.cpp", "quantkit"):
                continue
            row = {"scheme": scheme, "tool": tool, "recipe": name, **(extra if tool == "quantkit" else {})}
            report.measure(row, command, work / f"{scheme}-{name}", score)
    print_table(report.found)


class Report:
    """Rows and the protocol that they were measured with, in a file if one is given; what it holds is not measured again."""

    def __init__(self, arguments: argparse.Namespace, settings: Sequence[str]) -> None:
        self.arguments = arguments
        protocol = {name: getattr(arguments, name) for name in settings}
        protocol |= {name: protocol[name] and Path(protocol[name]).name for name in ("data", "eval_data")}
        self.found = protocol | {"cpu": cpu_name(), "rows": []}
        if arguments.json and Path(arguments.json).exists():
            found = json.loads(Path(arguments.json).read_text())
            if different := [name for name in protocol if found.get(name) != protocol[name]]:
                sys.exit(f"{arguments.json} was measured with another {different[0]}; give --json another name")
            self.found["rows"] = found["rows"]

    def measure(self, row: dict, command: Sequence[str], out: Path, score: "Scorer") -> None:
        """Have ``command`` make a row's model beside ``out``, score it, and note both, unless that is done."""
        if any(row.items() <= done.items() for done in self.found["rows"]):
            return
        job = {**vars(self.arguments), **row, **grid_of(row["scheme"]), "work": str(out.parent), "out": str(out)}
        cost = call([*command, json.dumps(job)])
        quality = score(job | cost)
        cost.pop("weights", None)  # where they lie says nothing
        self.found["rows"].append({**row, **cost, **quality})
        print(json.dumps(self.found["rows"][-1]), flush=True)
        if self.arguments.json:
            Path(self.arguments.json).write_text(json.dumps(self.found, indent=2) + "\n")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="calibration text file (default: the text every Python carries)")
    parser.add_argument("--eval-data", help="evaluation text file")
    parser.add_argument("--scheme", nargs="+", default=["w4a16-asym-g64"])
    parser.add_argument("--recipe", nargs="*", default=["rtn", "rtn-importance", "gptq"], choices=sorted(RECIPES))
    parser.add_argument("--option", action="append", default=[], help="key=value, added to the options of every quantizer")
    parser.add_argument("--distill", action="append", default=[], help="key=value, added to the settings of distillation")
    wanted = "name=python (llama.cpp=folder), name being one of: " + ", ".join(PEERS)
    parser.add_argument("--peer", action="append", default=[], help=wanted)
    parser.add_argument(
        "--compute", default="default", choices=["default", "float32", "bfloat16"], help="dtype quantkit runs a block in"
    )
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--windows", type=int, default=30)
    parser.add_argument("--kl-windows", type=int, default=20)
    parser.add_argument("--other-windows", type=int, default=8)
    parser.add_argument("--quick", action="store_true", help=str(QUICK))
    parser.add_argument("--json", help="write rows and protocol here; continued if it exists")
    parser.add_argument("--table", help="print the table of a JSON file and stop")
    parser.add_argument("--work", help="directory for model, tokens and checkpoints; what it holds already is used")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--job", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.quick:
        vars(arguments).update(QUICK)
    return arguments


def options(given: list[str]) -> dict:
    return {key: json.loads(value) for key, value in (item.split("=", 1) for item in given)}


def call(command: list[str]) -> dict:
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if done.returncode or not lines:
        sys.exit(f"{command[:4]} failed with status {done.returncode}; its messages are above")
    return json.loads(lines[-1].removeprefix("RESULT "))


class Scorer:
    """A process that loads the float model once, and scores row after row beside it; it sleeps while others quantize."""

    def __init__(self) -> None:
        self._process: subprocess.Popen | None = None

    def __call__(self, job: dict) -> dict:
        """Return the quality of one row."""
        if self._process is None:
            command = [sys.executable, __file__, "--worker", "score", "--job", json.dumps(job)]
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith("RESULT "):
                return json.loads(line.removeprefix("RESULT "))
        return sys.exit("scoring failed; its messages are above")


def run_quantkit(job: dict) -> dict:
    import torch

    import quantkit
    from quantkit.hf.load import load_float
    from quantkit.quantizers.base import QUANTIZERS
    from quantkit.system.compute import Compute
    from quantkit.transforms.distill import Distill

    recipe = RECIPES[job["recipe"]]
    ids = calibration_ids(job, job["samples"])
    model, tokenizer = load_float(Path(job["work"]) / "float")
    quantizer = QUANTIZERS.get(recipe["quantizer"])(**{**recipe.get("options", {}), **job["options"]})
    distill = Distill(**{**recipe["distill"], **job["distill"]}) if "distill" in recipe else None
    compute = None if job["compute"] == "default" else Compute(torch.device("cpu"), getattr(torch, job["compute"]))
    clock, marks = Clock(), {}

    def progress(event) -> None:
        marks[event.stage] = clock.cost()["cpu_seconds"]

    transforms = recipe.get("transforms", ())
    calibration, scheme = quantkit.Calibration(list(ids.split(8))), job["scheme"]
    if scheme.endswith("bpw"):
        run = quantkit.Run(compute=compute)
        scheme = quantkit.search(model, scheme, method=quantizer, calibration=calibration, run=run, tokenizer=tokenizer)
        marks["searched"] = clock.cost()["cpu_seconds"]
    result = quantkit.quantize(
        model, scheme, method=quantizer, steps=[*transforms, *([distill] if distill else [])],
        calibration=calibration, run=quantkit.Run(compute=compute, progress=progress),
        tokenizer=tokenizer, rules=[quantkit.Rule("embedding", skip=True)] if job["scheme"] in LLAMA_MIXES else [],
    )  # fmt: skip
    cost = clock.cost() | {"marks": marks}
    cost |= {"distill_kl": result.metadata["distill"]["kl"]} if distill else {}
    rotated = any(scheme.rotated for scheme in result.plan.values())  # which no format but ours can say
    form = "gguf" if job["scheme"] in LLAMA_MIXES else "native" if rotated else "compressed-tensors"
    quantkit.save(result.model, job["out"], tokenizer=tokenizer, format=form, overwrite=True)
    return cost


def run_scores(first: dict) -> None:
    """Answer every job on a line of the standard input; all have the protocol of the first."""
    import torch

    import quantkit
    from quantkit.calibrate.texts import encoder, load_texts, text_default
    from quantkit.evaluation import BaseLogits, cut_windows, score
    from quantkit.hf.load import load_float

    model, tokenizer = load_float(Path(first["work"]) / "float")
    base = BaseLogits(model)

    def windows_of(texts: list[str], count: int):
        tokens = torch.tensor([token for text in texts for token in encoder(tokenizer)(text)])
        return cut_windows(tokens, length=1024, count=count)

    windows = windows_of(load_texts(first["eval_data"]) if first["eval_data"] else text_default()[1], first["windows"])
    other = windows_of(text_default()[1], first["other_windows"])
    for job in map(json.loads, sys.stdin):
        if "weights" in job:  # a peer's dequantized weights
            from safetensors.torch import load_file

            quantized, bits = load_float(Path(job["work"]) / "float")[0], job["bits_per_weight"]
            quantized.load_state_dict(load_file(job["weights"]), strict=False)
        else:
            quantized = quantkit.load(job["out"], dtype=torch.float32, compute="exact")
            bits = quantkit.inspect(job["out"])["quantized_bits_per_weight"]
        quality = score(quantized, windows, base, kl_windows=job["kl_windows"])
        divergence, elsewhere = quality.divergence, score(quantized, other, base).divergence
        assert divergence is not None
        assert elsewhere is not None
        found = {
            "bits_per_weight": bits,
            "perplexity": quality.perplexity,
            "kl": divergence.mean,
            "kl_p99": divergence.p99,
            "top1": 100 * divergence.same_top1,
            "other_kl": elsewhere.mean,
            "base_perplexity": divergence.base_perplexity,
        }
        print("RESULT " + json.dumps(found), flush=True)


def grid_of(scheme: str) -> dict:
    from quantkit.presets import preset

    if scheme in LLAMA_MIXES or scheme.endswith("bpw"):
        return {}
    spec = preset(scheme, (64,)).weight
    return {"bits": spec.bits, "group_size": spec.group_size, "symmetric": spec.symmetric}


def print_table(report: dict) -> None:
    """Print rows by scheme and KL."""
    texts = f"calibrated on {report['samples']} x {report['length']} tokens of {report['data'] or 'the default text'}"
    texts += (
        f", scored on {report['windows']} x 1024 (KL {report['kl_windows']}) of {report['eval_data'] or 'the default text'}"
    )
    print(f"{texts}; other text: {report['other_windows']} x 1024. {report['cpu']}\n")
    print("| scheme | method | " + " | ".join(title for title, _ in COLUMNS.values()) + " | |")
    print("|---" * (len(COLUMNS) + 3) + "|")
    for row in sorted(report["rows"], key=lambda row: (row["scheme"], row["kl"])):
        method = f"**{row['recipe']}**" if row["tool"] == "quantkit" else row["recipe"]
        method += "".join(f" {key}={value}" for given in ("options", "distill") for key, value in row.get(given, {}).items())
        values = " | ".join(f"{row[name]:{form}}" for name, (_, form) in COLUMNS.items())
        print(f"| {row['scheme']} | {method} | {values} | {row.get('note', '')} |")


if __name__ == "__main__":
    main()
