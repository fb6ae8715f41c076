"""Let vLLM's CPU build read and answer from a tiny quantized Gemma-3 with its vision tower, and compare log-probabilities.

    python -m benchmarks.interop_towers --vllm-python ~/vllm/bin/python --json benchmarks/results/interop_towers.json

The model is that of ``tests/towers.py`` with random weights and heads as wide as vLLM wants them, quantized to 8 bits, inputs
too. vLLM (see ``interop_vllm.py`` for its environment, which needs a torchvision that fits its torch here) continues a text
greedily; the model here reads prompt and continuation, must choose the same tokens and find about the same probability of every
one. The float model is compared first: there the two agree to rounding. The integer products differ more where a CPU has no
instructions for them. Exit status 1 if they differ by more than ``--largest``.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

import quantkit
from quantkit.hf.load import load_float
from quantkit.system.files import write_json
from tests import towers

NAME, SCHEME, TOKENS = "gemma3", "w8a8", 16
PROMPT = [5, 17, 33, 90, 12, 44, 101, 60]
PROGRAM = """
import json, sys
from vllm import LLM, SamplingParams, TokensPrompt

if __name__ == "__main__":
    job = json.loads(sys.argv[1])
    options = {"dtype": "float32", "enforce_eager": True, "max_model_len": 256, "max_num_seqs": 1}
    llm = LLM(job["path"], limit_mm_per_prompt={"image": 0}, **options)
    sampling = SamplingParams(temperature=0.0, max_tokens=job["tokens"], ignore_eos=True, logprobs=0, prompt_logprobs=0)
    done = llm.generate([TokensPrompt(prompt_token_ids=job["prompt"])], sampling)[0]
    found = [*done.prompt_logprobs[1:], *done.outputs[0].logprobs]
    tokens = list(done.outputs[0].token_ids)
    read = [one[token].logprob for one, token in zip(found, [*job["prompt"][1:], *tokens])]
    open(job["out"], "w").write(json.dumps({"tokens": tokens, "logprobs": read}))
"""


def make(folder: Path) -> Path:
    """Write the float model and its quantized checkpoint; return the latter's directory."""
    text = towers.CONFIGS[NAME]["text_config"]
    text |= {"head_dim": 32, "hidden_size": 128}
    towers.write(NAME, folder / "float")
    towers.write_files(NAME, folder / "float")
    (folder / "float" / "consolidated.safetensors").unlink()  # no such file, and vLLM would read it
    quantkit.quantize(folder / "float", SCHEME, method="rtn", out=folder / "quantized")
    return folder / "quantized"


def ask_vllm(python: str, path: Path, folder: Path) -> dict[str, Any]:
    """Return the tokens with which vLLM continues the prompt, and the log-probability of every token after the first."""
    program, out = folder / "run.py", folder / f"{path.name}.json"
    program.write_text(PROGRAM)
    job = {"path": str(path), "prompt": PROMPT, "tokens": TOKENS, "out": str(out)}
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    command = [python, str(program), json.dumps(job)]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode or not out.exists():
        sys.exit(f"vLLM could not run {path}:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    found: dict[str, Any] = json.loads(out.read_text())
    return found


def compare(python: str, path: Path, model: Any) -> dict[str, Any]:
    """Let vLLM and a loaded model read the same tokens."""
    theirs = ask_vllm(python, path, path.parent)
    ids = torch.tensor([PROMPT + theirs["tokens"]])
    with torch.no_grad():
        read = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
    difference = (read.gather(-1, ids[0, 1:, None])[:, 0] - torch.tensor(theirs["logprobs"])).abs()
    chosen = int((read[len(PROMPT) - 1 :].argmax(-1) == ids[0, len(PROMPT) :]).sum())
    return {
        "tokens": TOKENS,
        "vllm_tokens_chosen_here": chosen,
        "logprobs_compared": len(difference),
        "largest_logprob_difference": float(difference.max()),
        "mean_logprob_difference": float(difference.mean()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm-python", required=True, help="python of an environment that has vllm or vllm-cpu")
    parser.add_argument("--largest", type=float, default=0.25, help="difference of log-probabilities that is allowed")
    parser.add_argument("--json", type=Path, help="write the results there")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        path = make(Path(scratch))
        floats, _ = load_float(path.parent / "float")
        result = {
            "model": f"{NAME} with vision tower, {SCHEME}, float32",
            "float": compare(args.vllm_python, path.parent / "float", floats),
            "quantized": compare(args.vllm_python, path, quantkit.load(path, compute="exact")),
        }
    result["passed"] = all(
        result[kind]["vllm_tokens_chosen_here"] == TOKENS and result[kind]["largest_logprob_difference"] <= args.largest
        for kind in ("float", "quantized")
    )
    print(json.dumps(result, indent=1))
    if args.json:
        write_json(args.json, result)
    sys.exit(0 if result["passed"] else 1)


if __name__ == "__main__":
    main()
