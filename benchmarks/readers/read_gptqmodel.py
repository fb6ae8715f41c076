"""Continue a prompt with GPTQModel, or quantize with it; see ``benchmarks/interop.py``."""

import importlib.metadata
import json
import sys
import time

import numpy as np
import torch
from gptqmodel import BACKEND, GPTQModel


@torch.no_grad()
def main(job: dict) -> None:
    """Answer one job."""
    started = time.perf_counter()
    model = GPTQModel.load(job["path"], device="cpu", backend=BACKEND.TORCH, dtype=getattr(torch, job["dtype"])).model.eval()
    load_s = time.perf_counter() - started
    ids, logits = list(job["prompt"]), []
    for _ in range(job["tokens"]):
        logits.append(model(input_ids=torch.tensor([ids])).logits[0, -1].float().numpy())
        ids.append(int(logits[-1].argmax()))
    version = f"gptqmodel {importlib.metadata.version('gptqmodel')}"
    np.savez(job["out"], logits=np.stack(logits), tokens=ids[len(job["prompt"]) :], load_s=load_s, version=version)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
