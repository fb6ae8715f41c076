"""GGUF files of one size: quantkit's GPTQ on ggml's blocks beside llama-quantize, from the same statistics.

    python benchmarks/gguf_mixes.py MODEL --data calib.txt --eval-data eval.txt --llama BIN --work FOLDER --json FILE

MODEL is a float directory of a Llama, BIN the folder of ``llama-quantize``. The float model runs over the calibration text
once; from that come the Hessians for quantkit and, as their diagonals, llama.cpp's importance matrix (E[x^2] of every input
channel). Both files then have the same type for every tensor, and the KL divergence to the float model of what each stands for
is measured by quantkit's harness in float32: what is scored is read from the files. The token table is left in float while they
are scored (``--ends`` takes it from the files as well).

Statistics are kept in ``--work`` and used again; ``--json`` is written after every row and continued.
"""

import argparse
import json
import os
import subprocess
import time
from pathlib import Path

import torch
from peers import write_importance

import quantkit
from quantkit.calibrate.texts import encoder, load_texts
from quantkit.evaluation import BaseLogits, cut_windows, score
from quantkit.hf.load import load_float

PROTOCOL = ("samples", "length", "windows", "ends", "data", "eval_data")


def main() -> None:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    arguments.work.mkdir(parents=True, exist_ok=True)
    protocol = {name: getattr(arguments, name) for name in PROTOCOL}
    protocol |= {name: Path(protocol[name]).name for name in ("data", "eval_data")}
    report = protocol | {"rows": []}
    if arguments.json.exists():
        report = json.loads(arguments.json.read_text())
        assert all(report[name] == value for name, value in protocol.items()), "the file was measured with another protocol"
    model, tokenizer = load_float(arguments.model, torch.float32)
    statistics = collected(arguments, model, tokenizer)
    base = BaseLogits(model)
    tokens = torch.tensor([token for text in load_texts(arguments.eval_data) for token in encoder(tokenizer)(text)])
    windows = cut_windows(tokens, length=1024, count=arguments.windows)
    for mix in arguments.mix:
        for tool in ("quantkit", "llama.cpp"):
            if any((row["mix"], row["tool"]) == (mix, tool) for row in report["rows"]):
                continue
            before = processor()
            file = (ours if tool == "quantkit" else theirs)(arguments, mix, statistics)
            row = {"mix": mix, "tool": tool, "cpu_seconds": processor() - before, **measured(arguments, file, windows, base)}
            report["rows"].append(row)
            print(json.dumps(row), flush=True)
            arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    print_table(report)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--data", required=True)
    parser.add_argument("--eval-data", required=True)
    parser.add_argument("--llama", type=Path, required=True)
    parser.add_argument("--mix", nargs="+", default=["Q4_0", "Q4_K_M", "Q3_K_M", "Q2_K"])
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--windows", type=int, default=10)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--ends", action="store_true")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--json", type=Path, required=True)
    return parser.parse_args()


def collected(arguments: argparse.Namespace, model, tokenizer):
    """Return the statistics of every layer of the blocks."""
    from quantkit.calibrate.statistics import load_statistics, save_statistics

    kept = arguments.work / "statistics.safetensors"
    if not kept.exists():
        calibration = quantkit.Calibration(arguments.data, samples=arguments.samples, length=arguments.length)
        found, fingerprint = quantkit.collect(model, calibration=calibration, tokenizer=tokenizer)
        save_statistics(kept, found, fingerprint)
    return load_statistics(kept)[0]


def ours(arguments: argparse.Namespace, mix: str, statistics) -> Path:
    out = arguments.work / f"quantkit-{mix}"
    model, tokenizer = load_float(arguments.model, torch.float32)
    result = quantkit.quantize(model, mix, calibration=quantkit.Calibration(statistics=statistics), tokenizer=tokenizer)
    quantkit.save(result.model, out, tokenizer=tokenizer, format="gguf", overwrite=True)
    return out / "model.gguf"


def theirs(arguments: argparse.Namespace, mix: str, statistics) -> Path:
    """Let llama-quantize make the file of float tensors that quantkit's would be made of."""
    import gguf
    from cpu_models import write_gguf

    source, out = arguments.work / "float32.gguf", arguments.work / f"llama-{mix}.gguf"
    if not source.exists():
        write_gguf(arguments.model, source, "float32")
    layers = json.loads((arguments.model / "config.json").read_text())["num_hidden_layers"]
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, layers)
    importance = {f"{names.get_name(name)}.weight": one.results["hessian"].diagonal() for name, one in statistics.items()}
    write_importance(out.with_suffix(".imatrix"), importance)
    command = [str(arguments.llama / "llama-quantize"), "--imatrix", str(out.with_suffix(".imatrix"))]
    subprocess.run([*command, str(source), str(out), mix, str(arguments.threads)], check=True, capture_output=True)
    return out


def measured(arguments: argparse.Namespace, file: Path, windows, base) -> dict:
    """Return size and quality of a file, and the types of its tensors."""
    import gguf

    model, _ = load_float(arguments.model, torch.float32)
    config = model.config
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    types: dict[str, int] = {}
    nbytes = weights = 0
    for name, parameter in model.named_parameters():
        tensor = stored[names.get_name(name, (".weight",))]
        if parameter.ndim < 2 or (not arguments.ends and not name.startswith("model.layers")):
            continue
        kind = gguf.GGMLQuantizationType(tensor.tensor_type).name
        types[kind] = types.get(kind, 0) + 1
        nbytes, weights = nbytes + int(tensor.n_bytes), weights + parameter.numel()
        weight = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
        if "q_proj" in name or "k_proj" in name:  # from neighbours back to halves
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            weight = weight.view(heads, -1, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)
        parameter.data = weight.reshape(parameter.shape)
    quality = score(model, windows, base)
    assert quality.divergence is not None
    return {
        "bytes": nbytes, "bits_per_weight": nbytes * 8 / weights, "types": types, "file_bytes": file.stat().st_size,
        "perplexity": quality.perplexity, "kl": quality.divergence.mean, "kl_p99": quality.divergence.p99,
        "top1": 100 * quality.divergence.same_top1, "base_perplexity": quality.divergence.base_perplexity,
    }  # fmt: skip


def processor() -> float:
    return sum(os.times()[:4])


def print_table(report: dict) -> None:
    print(f"{report['samples']} x {report['length']} tokens of {report['data']}, scored on {report['windows']} x 1024 of")
    print(f"{report['eval_data']}; {time.strftime('%Y-%m')}\n\n| mix | bytes | KL, llama-quantize | KL, quantkit | lower by |")
    print("|---|---|---|---|---|")
    for mix in dict.fromkeys(row["mix"] for row in report["rows"]):
        rows = {row["tool"]: row for row in report["rows"] if row["mix"] == mix}
        if len(rows) < 2:
            continue
        a, b = rows["llama.cpp"], rows["quantkit"]
        same = f"{a['bytes']:,}" if a["types"] == b["types"] else f"{a['bytes']:,} and {b['bytes']:,}"
        print(f"| {mix} | {same} | {a['kl']:.4f} | {b['kl']:.4f} | {100 * (1 - b['kl'] / a['kl']):.0f} % |")


if __name__ == "__main__":
    main()
