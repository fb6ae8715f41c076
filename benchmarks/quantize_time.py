"""GPTQ side by side with llm-compressor: seconds, peak memory and KL, same model, same tokens, same scheme, one run.

    python benchmarks/quantize_time.py --peer-python PEER/bin/python --data calib.txt --eval-data eval.txt

Each tool runs in a process of its own, one after the other, ``--rounds`` times in turn. Time is that of the quantizing call
(calibration included; loading the model and writing files are printed apart), memory the peak resident size of the process up
to the end of that call. KL and perplexity of both checkpoints are measured by quantkit against the float model, over
``--windows`` windows of 1024 tokens of the evaluation text. ``--peer-python`` is a Python with ``llmcompressor`` and
``datasets``; without it only quantkit is timed.
"""

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SCHEMES = {"w4a16-asym-g64": (4, 64, False), "w4a16-g64": (4, 64, True), "w3a16-asym-g64": (3, 64, False)}


def main() -> None:
    arguments = parse()
    if arguments.worker:
        worker = {"quantkit": run_quantkit, "llm-compressor": run_peer, "score": run_score}[arguments.worker]
        print("RESULT " + json.dumps(worker(arguments)))
        return
    work = Path(tempfile.mkdtemp(prefix="quantize-time-")) if arguments.work is None else Path(arguments.work)
    prepare(arguments, work)
    tools = {"quantkit": sys.executable} | ({"llm-compressor": arguments.peer_python} if arguments.peer_python else {})
    runs: dict[str, list[dict]] = {name: [] for name in tools}
    for _ in range(arguments.rounds):
        for name, python in tools.items():
            runs[name].append(call(python, name, arguments, work))
            print(name, json.dumps(runs[name][-1]), flush=True)
    rows = {}
    for name in tools:
        quality = call(sys.executable, "score", arguments, work, checkpoint=work / name)
        rows[name] = {key: statistics.median(run[key] for run in runs[name]) for key in runs[name][0]} | quality
    print_table(rows, arguments)
    if arguments.json:
        facts = {
            "scheme": arguments.scheme,
            "compute": arguments.compute,
            "samples": arguments.samples,
            "rounds": arguments.rounds,
            "cpu": cpu_name(),
        }
        Path(arguments.json).write_text(json.dumps(facts | {"rows": rows, "runs": runs}, indent=2) + "\n")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python")
    parser.add_argument("--data", help="calibration text file (default: the text every Python carries)")
    parser.add_argument("--eval-data", help="evaluation text file")
    parser.add_argument("--scheme", default="w4a16-asym-g64", choices=sorted(SCHEMES))
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--windows", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--compute", default="float32", choices=["float32", "bfloat16"], help="dtype quantkit runs a block in")
    parser.add_argument("--json")
    parser.add_argument("--work", help="directory for models and checkpoints (default: a temporary one)")
    parser.add_argument("--worker", choices=["quantkit", "llm-compressor", "score"], help=argparse.SUPPRESS)
    parser.add_argument("--checkpoint", help=argparse.SUPPRESS)
    return parser.parse_args()


def prepare(arguments: argparse.Namespace, work: Path) -> None:
    """Write the float32 model and the calibration tokens where both tools read them."""
    import torch
    from safetensors.torch import save_file

    from quantkit.calibrate.data import token_batches
    from quantkit.calibrate.texts import encoder, load_texts, text_default
    from quantkit.hf.demo_model import demo_model_path
    from quantkit.hf.load import load_float

    model, tokenizer = load_float(demo_model_path(), dtype=torch.float32)
    model.save_pretrained(work / "float")
    tokenizer.save_pretrained(work / "float")
    texts = load_texts(arguments.data) if arguments.data else text_default()[0]
    batches = token_batches(texts, encoder(tokenizer), samples=arguments.samples, length=arguments.length, batch_size=1)
    save_file({"ids": torch.cat([batch.ids for batch in batches])}, work / "calibration.safetensors")


def call(python: str, worker: str, arguments: argparse.Namespace, work: Path, **extra: object) -> dict:
    command = [python, __file__, "--worker", worker, "--work", str(work), "--scheme", arguments.scheme]
    command += ["--windows", str(arguments.windows), "--compute", arguments.compute]
    command += ["--eval-data", arguments.eval_data] if arguments.eval_data else []
    for key, value in extra.items():
        command += [f"--{key}", str(value)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if done.returncode or not lines:
        sys.exit(f"{worker} failed with status {done.returncode}; its messages are above")
    return json.loads(lines[-1].removeprefix("RESULT "))


def run_quantkit(arguments: argparse.Namespace) -> dict:
    import torch
    from safetensors.torch import load_file

    import quantkit
    from quantkit.hf.load import load_float
    from quantkit.system.compute import Compute

    work = Path(arguments.work)
    ids = load_file(work / "calibration.safetensors")["ids"]
    model, tokenizer = load_float(work / "float")
    start = time.perf_counter()
    compute = Compute(torch.device("cpu"), getattr(torch, arguments.compute))
    result = quantkit.quantize(
        model,
        arguments.scheme,
        method="gptq",
        calibration=quantkit.Calibration(data=list(ids.split(8))),
        run=quantkit.Run(compute=compute),
        tokenizer=tokenizer,
    )
    seconds, peak = time.perf_counter() - start, peak_mib()
    start = time.perf_counter()
    quantkit.save(result.model, work / "quantkit", tokenizer=tokenizer, overwrite=True)
    return {"seconds": seconds, "peak_mib": peak, "save_seconds": time.perf_counter() - start}


def run_peer(arguments: argparse.Namespace) -> dict:
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    work = Path(arguments.work)
    ids = load_file(work / "calibration.safetensors")["ids"]
    model = AutoModelForCausalLM.from_pretrained(work / "float")
    tokenizer = AutoTokenizer.from_pretrained(work / "float")
    bits, group, symmetric = SCHEMES[arguments.scheme]
    weights = QuantizationArgs(
        num_bits=bits, type="int", symmetric=symmetric, strategy="group", group_size=group, actorder="static"
    )
    recipe = GPTQModifier(
        config_groups={"group_0": QuantizationScheme(targets=["Linear"], weights=weights)}, ignore=["lm_head"]
    )
    data = Dataset.from_dict({"input_ids": ids.tolist(), "attention_mask": [[1] * ids.shape[1]] * len(ids)})
    start = time.perf_counter()
    oneshot(
        model=model, dataset=data, recipe=recipe, max_seq_length=ids.shape[1], num_calibration_samples=len(ids),
        shuffle_calibration_samples=False,
    )  # fmt: skip
    seconds, peak = time.perf_counter() - start, peak_mib()
    start = time.perf_counter()
    model.save_pretrained(work / "llm-compressor", save_compressed=True)
    tokenizer.save_pretrained(work / "llm-compressor")
    return {"seconds": seconds, "peak_mib": peak, "save_seconds": time.perf_counter() - start}


def run_score(arguments: argparse.Namespace) -> dict:
    import torch

    import quantkit
    from quantkit.calibrate.texts import encoder, load_texts, text_default
    from quantkit.evaluation.quality import score
    from quantkit.evaluation.windows import cut_windows
    from quantkit.hf.load import load_float

    base, tokenizer = load_float(Path(arguments.work) / "float")
    texts = load_texts(arguments.eval_data) if arguments.eval_data else text_default()[1]
    tokens = torch.tensor([token for text in texts for token in encoder(tokenizer)(text)])
    windows = cut_windows(tokens, length=1024, count=arguments.windows)
    quality = score(quantkit.load(arguments.checkpoint, dtype=torch.float32), windows, base)
    divergence = quality.divergence
    assert divergence is not None
    return {
        "bits_per_weight": quantkit.inspect(arguments.checkpoint)["quantized_bits_per_weight"],
        "kl": divergence.mean,
        "kl_p99": divergence.p99,
        "top1": divergence.same_top1,
        "perplexity": quality.perplexity,
        "base_perplexity": divergence.base_perplexity,
    }


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def cpu_name() -> str:
    return platform.processor() or platform.machine()


def print_table(rows: dict[str, dict], arguments: argparse.Namespace) -> None:
    tokens = f"{arguments.samples} x {arguments.length} calibration tokens, {arguments.windows} x 1024 evaluated"
    print(f"\n{arguments.scheme}, {tokens}")
    print(f"{'':16}{'seconds':>9}{'peak MiB':>10}{'bits':>7}{'KL':>9}{'KL p99':>9}{'top-1':>8}{'ppl':>8}")
    for name, row in rows.items():
        print(
            f"{name:16}{row['seconds']:9.1f}{row['peak_mib']:10.0f}{row['bits_per_weight']:7.3f}{row['kl']:9.4f}"
            f"{row['kl_p99']:9.3f}{row['top1'] * 100:7.2f}%{row['perplexity']:8.3f}"
        )
    if len(rows) == 2:
        ours, peer = rows.values()
        print(
            f"quantkit / llm-compressor: time {ours['seconds'] / peer['seconds']:.3f}, memory "
            f"{ours['peak_mib'] / peer['peak_mib']:.3f}, KL {ours['kl'] / peer['kl']:.3f}"
        )


if __name__ == "__main__":
    main()
