"""Does llama.cpp read the GGUF files that quantkit writes, and compute the same?

    python benchmarks/interop_gguf.py FOLDER --python PYTHON --text eval.txt [--json FILE]

FOLDER is a checkpoint of format gguf, PYTHON that of an environment with ``llama-cpp-python``. Both programs score the same
windows of 512 tokens in the way of ``llama-perplexity`` (tokens of the second half of each) and go on with the same prompt,
greedily. llama.cpp rounds activations to 8 bits in its products with blocks, quantkit computes in float32.
"""

import argparse
import json
import math
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import torch

import quantkit
from quantkit.hf.load import load_tokenizer

WINDOW, PROMPT = 512, "The history of the city begins in the"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--python", required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    tokenizer = load_tokenizer(arguments.folder)
    ids = tokenizer(arguments.text.read_text(), add_special_tokens=False)["input_ids"]
    windows = [ids[start : start + WINDOW] for start in range(0, arguments.windows * WINDOW, WINDOW)]
    prompt = tokenizer(PROMPT, add_special_tokens=False)["input_ids"]
    theirs, ours = (read(arguments, windows, prompt) for read in (read_by_llama, read_by_quantkit))
    row = {"folder": arguments.folder.name, "windows": len(windows), "window": WINDOW, "reader": theirs["version"]}
    row |= {"perplexity_llama_cpp": theirs["perplexity"], "perplexity_quantkit": ours["perplexity"]}
    row["relative_difference"] = theirs["perplexity"] / ours["perplexity"] - 1
    row |= {"greedy_llama_cpp": tokenizer.decode(theirs["tokens"]), "greedy_quantkit": tokenizer.decode(ours["tokens"])}
    row["greedy_equal"] = theirs["tokens"] == ours["tokens"]
    print(json.dumps(row, indent=1))
    if arguments.json:
        rows = json.loads(arguments.json.read_text()) if arguments.json.exists() else []
        rows = [one for one in rows if one["folder"] != row["folder"]]
        arguments.json.write_text(json.dumps([*rows, row], indent=1) + "\n")


def read_by_llama(arguments: argparse.Namespace, windows: list[list[int]], prompt: list[int]) -> dict:
    """Return the perplexity, the tokens that follow the prompt, and the version."""
    reader = Path(__file__).parent / "readers" / "read_llama.py"
    found: dict = {}
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch, "answer.npz")
        job = {"path": str(arguments.folder.resolve()), "out": str(out), "options": {}, "prompt": prompt}
        for more in ({"windows": windows}, {"tokens": arguments.tokens}):
            subprocess.run(
                [arguments.python, str(reader), json.dumps(job | more)], cwd=scratch, check=True, capture_output=True
            )
            with np.load(out) as answer:
                found |= {name: answer[name].tolist() for name in ("perplexity", "tokens", "version") if name in answer.files}
    return found


def read_by_quantkit(arguments: argparse.Namespace, windows: list[list[int]], prompt: list[int]) -> dict:
    """Return the perplexity and the tokens that follow the prompt."""
    model = quantkit.load(arguments.folder, dtype=torch.float32, compute="exact")
    losses = []
    with torch.inference_mode():
        for window in torch.tensor(windows):
            logits = model(input_ids=window[None], use_cache=False).logits[0, WINDOW // 2 : -1]
            losses.append(torch.nn.functional.cross_entropy(logits, window[WINDOW // 2 + 1 :]))
        ids = torch.tensor([prompt])
        for _ in range(arguments.tokens):
            ids = torch.cat([ids, model(input_ids=ids, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)], 1)
    return {"perplexity": math.exp(float(torch.stack(losses).mean())), "tokens": ids[0, len(prompt) :].tolist()}


if __name__ == "__main__":
    main()
