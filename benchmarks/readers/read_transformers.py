"""Continue a prompt with transformers and the package that it takes a format's layers from; see ``benchmarks/interop.py``."""

import importlib.metadata
import json
import sys
import time

import numpy as np
import torch
from transformers import AutoModelForCausalLM


@torch.no_grad()
def main(job: dict) -> None:
    """Answer one job."""
    started = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(
        job["path"], dtype=job["dtype"], device_map="cpu", **job.get("options", {})
    ).eval()
    load_s = time.perf_counter() - started
    ids, logits = list(job["prompt"]), []
    for _ in range(job["tokens"]):
        logits.append(model(input_ids=torch.tensor([ids])).logits[0, -1].float().numpy())
        ids.append(int(logits[-1].argmax()))
    names = ["transformers", *job.get("packages", [])]
    version = " + ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
    np.savez(job["out"], logits=np.stack(logits), tokens=ids[len(job["prompt"]) :], load_s=load_s, version=version)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
