"""Does llama.cpp read the GGUF files that quantkit writes, and compute the same?

    python benchmarks/interop_gguf.py FOLDER --llama BIN --text eval.txt [--json FILE]

FOLDER is a checkpoint of format gguf, BIN the folder of ``llama-perplexity`` and ``llama-simple``. Both programs score the same
windows of 512 tokens in the way of ``llama-perplexity`` (tokens of the second half of each) and go on with the same prompt,
greedily. llama.cpp rounds activations to 8 bits in its products with blocks, quantkit computes in float32.
"""

import argparse
import json
import math
import re
import subprocess
from pathlib import Path

WINDOW, PROMPT = 512, "The history of the city begins in the"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--llama", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    theirs, ours = read_by_llama(arguments), read_by_quantkit(arguments)
    row = {"folder": arguments.folder.name, "windows": arguments.windows, "window": WINDOW}
    row |= {"perplexity_llama_cpp": theirs["perplexity"], "perplexity_quantkit": ours["perplexity"]}
    row["relative_difference"] = theirs["perplexity"] / ours["perplexity"] - 1
    row |= {"greedy_llama_cpp": theirs["greedy"], "greedy_quantkit": ours["greedy"]}
    row["greedy_equal"] = theirs["greedy"].strip() == ours["greedy"].strip()
    print(json.dumps(row, indent=1))
    if arguments.json:
        rows = json.loads(arguments.json.read_text()) if arguments.json.exists() else []
        rows = [one for one in rows if one["folder"] != row["folder"]]
        arguments.json.write_text(json.dumps([*rows, row], indent=1) + "\n")


def read_by_llama(arguments: argparse.Namespace) -> dict:
    file = str(arguments.folder / "model.gguf")
    threads = ["-t", str(arguments.threads)]
    command = [str(arguments.llama / "llama-perplexity"), "-m", file, "-f", str(arguments.text), "-c", str(WINDOW)]
    done = subprocess.run([*command, "--chunks", str(arguments.windows), *threads], capture_output=True, text=True, check=True)
    found = re.search(r"Final estimate: PPL = ([\d.]+)", done.stdout + done.stderr)
    assert found is not None, done.stderr[-2000:]
    command = [str(arguments.llama / "llama-simple"), "-m", file, "-ngl", "0", "-n", str(arguments.tokens), PROMPT]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {"perplexity": float(found[1]), "greedy": said.strip().split(PROMPT, 1)[-1]}


def read_by_quantkit(arguments: argparse.Namespace) -> dict:
    import torch

    import quantkit
    from quantkit.hf.load import load_tokenizer

    model = quantkit.load(arguments.folder, dtype=torch.float32, compute="exact")
    tokenizer = load_tokenizer(arguments.folder)
    ids = torch.tensor(tokenizer(arguments.text.read_text(), add_special_tokens=False)["input_ids"])
    windows = ids[: len(ids) // WINDOW * WINDOW].view(-1, WINDOW)[: arguments.windows]
    losses = []
    with torch.inference_mode():
        for window in windows:
            logits = model(input_ids=window[None], use_cache=False).logits[0, WINDOW // 2 : -1]
            losses.append(torch.nn.functional.cross_entropy(logits, window[WINDOW // 2 + 1 :], reduction="sum"))
        count = len(windows) * (WINDOW - 1 - WINDOW // 2)
        prompt = torch.tensor([tokenizer(PROMPT, add_special_tokens=False)["input_ids"]])
        for _ in range(arguments.tokens):
            prompt = torch.cat([prompt, model(input_ids=prompt, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)], 1)
    text = tokenizer.decode(prompt[0]).split(PROMPT, 1)[-1]
    return {"perplexity": math.exp(float(sum(losses)) / count), "greedy": text}


if __name__ == "__main__":
    main()
