"""What each recipe loses: bits per weight, perplexity, KL, agreement, seconds and peak memory, in one table.

    python benchmarks/accuracy.py --data calib.txt --eval-data eval.txt --recipe gptq --scheme w4a16-asym-g64 w3a16-asym-g64

Every row is one recipe on one scheme, quantized in a process of its own: seconds are those of the quantizing call
(calibration included; loading the model and writing files are not), processor seconds those of the whole process, memory is
the peak resident size of the process up to its end. The result is written, its bits per weight are counted from the files,
and it is loaded again and scored in float32 beside the float model: perplexity over ``--windows`` windows of 1024 tokens
spread over the evaluation text, KL and agreement on the first ``--kl-windows`` of them. ``--quick`` takes fewer tokens of
both kinds: for a first look, not for a claim.

``--peer auto-round=PEER/bin/python`` adds that tool's row for the same schemes (a Python that has the package).
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from quantize_time import cpu_name, peak_mib, prepare

RECIPES: dict[str, dict] = {
    "rtn": {"quantizer": "rtn"},
    "rtn-importance": {"quantizer": "rtn-importance"},
    "hqq": {"quantizer": "hqq"},
    "gptq": {"quantizer": "gptq"},
    "gptaq": {"quantizer": "gptaq"},
    "gptq+distill": {"quantizer": "gptq", "distill": {"steps": 64, "windows": 2}},
    "gptaq+distill": {"quantizer": "gptaq", "distill": {"steps": 64, "windows": 2}},
    "w8a8-smoothquant": {"quantizer": "rtn", "transforms": ["smoothquant"]},
    "gptaq+codes": {"quantizer": "gptaq", "distill": {"steps": 192, "windows": 2, "code_rate": 0.03}},
}
"""Row name to what :func:`quantkit.quantize` is called with; ``options`` go to the quantizer."""

QUICK = {"samples": 32, "windows": 6, "kl_windows": 6}
COLUMNS = ("bits_per_weight", "perplexity", "kl", "kl_p99", "top1", "seconds", "cpu_seconds", "peak_mib")


def main() -> None:
    arguments = parse()
    if arguments.worker:
        print("RESULT " + json.dumps(WORKERS[arguments.worker](json.loads(arguments.job))))
        return
    work = Path(tempfile.mkdtemp(prefix="accuracy-")) if arguments.work is None else Path(arguments.work)
    if not (work / "calibration.safetensors").exists():
        work.mkdir(parents=True, exist_ok=True)
        prepare(arguments, work)
    tools = [("quantkit", name, sys.executable) for name in arguments.recipe]
    tools += [(name, name, python) for name, python in (peer.split("=", 1) for peer in arguments.peer)]
    protocol = {
        name: getattr(arguments, name) for name in ("samples", "length", "windows", "kl_windows", "eval_data", "compute")
    }
    rows: list[dict] = []
    for scheme in arguments.scheme:
        for worker, name, python in tools:
            job = protocol | {"scheme": scheme, "recipe": name, "work": str(work), "options": options(arguments.option)}
            job["distill"] = options(arguments.distill)
            job["out"] = str(work / f"{scheme}-{name}")
            cost = call(python, worker, job)
            rows.append({"scheme": scheme, "recipe": name, **cost, **call(sys.executable, "score", job | cost)})
            print_row(rows[-1], header=len(rows) == 1)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(protocol | {"cpu": cpu_name(), "rows": rows}, indent=2) + "\n")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="calibration text file (default: the text every Python carries)")
    parser.add_argument("--eval-data", help="evaluation text file")
    parser.add_argument("--scheme", nargs="+", default=["w4a16-asym-g64"])
    parser.add_argument("--recipe", nargs="*", default=["rtn", "rtn-importance", "gptq"], choices=sorted(RECIPES))
    parser.add_argument("--option", action="append", default=[], help="key=value, added to the options of every quantizer")
    parser.add_argument("--distill", action="append", default=[], help="key=value, added to the settings of distillation")
    parser.add_argument("--peer", action="append", default=[], help="name=python, name being one of: " + ", ".join(PEERS))
    parser.add_argument("--compute", default="float32", choices=["float32", "bfloat16"], help="dtype quantkit runs a block in")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--windows", type=int, default=30)
    parser.add_argument("--kl-windows", type=int, default=20)
    parser.add_argument("--quick", action="store_true", help=str(QUICK))
    parser.add_argument("--json", help="write rows and protocol here")
    parser.add_argument("--work", help="directory for model, tokens and checkpoints; what it holds already is used")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--job", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.quick:
        vars(arguments).update(QUICK)
    return arguments


def options(given: list[str]) -> dict:
    return {key: json.loads(value) for key, value in (item.split("=", 1) for item in given)}


def call(python: str, worker: str, job: dict) -> dict:
    command = [python, __file__, "--worker", worker, "--job", json.dumps(job)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if done.returncode or not lines:
        sys.exit(f"{worker} failed with status {done.returncode}; its messages are above")
    return json.loads(lines[-1].removeprefix("RESULT "))


def calibration_ids(job: dict):
    """Return ``samples`` of the prepared windows, evenly spread: int64 (samples, length)."""
    from safetensors.torch import load_file

    ids = load_file(Path(job["work"]) / "calibration.safetensors")["ids"]
    return ids[[i * len(ids) // job["samples"] for i in range(job["samples"])]]


def run_quantkit(job: dict) -> dict:
    import torch

    import quantkit
    from quantkit.blockwise import Compute
    from quantkit.distill import Distill
    from quantkit.hf.load import load_float
    from quantkit.quantizers.base import QUANTIZERS

    recipe = RECIPES[job["recipe"]]
    ids = calibration_ids(job)
    model, tokenizer = load_float(Path(job["work"]) / "float")
    quantizer = QUANTIZERS.get(recipe["quantizer"])(**{**recipe.get("options", {}), **job["options"]})
    distill = Distill(**{**recipe["distill"], **job["distill"]}) if "distill" in recipe else None
    compute = Compute(torch.device("cpu"), getattr(torch, job["compute"]))
    start, marks = time.perf_counter(), {}

    def progress(event) -> None:
        marks[event.stage] = time.perf_counter() - start

    transforms = recipe.get("transforms", ())
    result = quantkit.quantize(
        model, job["scheme"], quantizer=quantizer, transforms=transforms, distill=distill, data=list(ids.split(8)),
        tokenizer=tokenizer, compute=compute, progress=progress,
    )  # fmt: skip
    cost = cost_since(start) | {"marks": marks}
    cost |= {"distill_kl": result.metadata["distill"]["kl"]} if distill else {}
    quantkit.save(result.model, job["out"], tokenizer=tokenizer, overwrite=True)
    return cost


def run_auto_round(job: dict) -> dict:
    """AutoRound with 24 iterations over 48 windows: what it gets done in about the time of the others."""
    import torch
    from auto_round import AutoRound
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    bits, group, symmetric = grid_of(job["scheme"])
    model = AutoModelForCausalLM.from_pretrained(Path(job["work"]) / "float", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(Path(job["work"]) / "float")
    ids = calibration_ids(job | {"samples": min(48, job["samples"])})
    start = time.perf_counter()
    model, _ = AutoRound(
        model, tokenizer, bits=bits, group_size=group, sym=symmetric, iters=24, nsamples=len(ids), seqlen=ids.shape[1],
        batch_size=4, dataset=list(ids.split(1)), device_map="cpu", amp=False, enable_torch_compile=False,
    ).quantize()  # fmt: skip
    cost = cost_since(start)
    save_file({k: v.contiguous().clone() for k, v in model.state_dict().items()}, job["out"] + ".safetensors")
    return cost | {"weights": job["out"] + ".safetensors", "bits_per_weight": nominal_bits(bits, group, symmetric)}


def cost_since(start: float) -> dict:
    """Return wall and processor seconds (of all threads, which says more on a busy machine) and peak memory."""
    return {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time(), "peak_mib": peak_mib()}


def run_score(job: dict) -> dict:
    import torch

    import quantkit
    from quantkit.calibrate.data import encoder, load_texts, text_default
    from quantkit.evaluation.quality import score
    from quantkit.evaluation.windows import cut_windows
    from quantkit.hf.load import load_float

    base, tokenizer = load_float(Path(job["work"]) / "float")
    texts = load_texts(job["eval_data"]) if job["eval_data"] else text_default()[1]
    tokens = torch.tensor([token for text in texts for token in encoder(tokenizer)(text)])
    windows = cut_windows(tokens, length=1024, count=job["windows"])
    if "weights" in job:  # a peer's dequantized weights
        from safetensors.torch import load_file

        model, bits = load_float(Path(job["work"]) / "float")[0], job["bits_per_weight"]
        model.load_state_dict(load_file(job["weights"]), strict=False)
    else:
        model = quantkit.load(job["out"], dtype=torch.float32)
        bits = quantkit.inspect(job["out"])["quantized_bits_per_weight"]
    quality = score(model, windows, base, kl_windows=job["kl_windows"])
    divergence = quality.divergence
    assert divergence is not None
    return {
        "bits_per_weight": bits,
        "perplexity": quality.perplexity,
        "kl": divergence.mean,
        "kl_p99": divergence.p99,
        "top1": 100 * divergence.same_top1,
        "base_perplexity": divergence.base_perplexity,
    }


def grid_of(scheme: str) -> tuple[int, int, bool]:
    from quantkit.spec import preset

    spec = preset(scheme, (64,)).weight
    return spec.bits, spec.group_size, spec.symmetric


def nominal_bits(bits: int, group: int, symmetric: bool) -> float:
    return bits + (16 + (0 if symmetric else bits)) / group


def print_row(row: dict, header: bool) -> None:
    if header:
        print(f"{'scheme':20}{'recipe':16}" + "".join(f"{name:>16}" for name in COLUMNS))
    values = "".join(f"{row[name]:16.4f}" if name != "peak_mib" else f"{row[name]:16.0f}" for name in COLUMNS)
    print(f"{row['scheme']:20}{row['recipe']:16}{values}", flush=True)


PEERS = {"auto-round": run_auto_round}
WORKERS = {"quantkit": run_quantkit, "score": run_score, **PEERS}


if __name__ == "__main__":
    main()
