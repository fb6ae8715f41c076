"""Continue a prompt with GPTQModel, or quantize with it; see ``benchmarks/interop.py``."""

import importlib.metadata
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig


@torch.no_grad()
def main(job: dict) -> None:
    """Answer one job; with ``make``, first let GPTQModel quantize the float model."""
    if (make := job.get("options", {}).get("make")) and not Path(job["path"], "config.json").exists():
        maker = GPTQModel.load(job["model"], QuantizeConfig(**make), device="cpu")
        order = torch.Generator().manual_seed(0)
        ids = torch.randint(maker.model.config.vocab_size, (8, 128), generator=order).tolist()
        maker.quantize([{"input_ids": one, "attention_mask": [1] * len(one)} for one in ids], batch_size=1)
        maker.save(job["path"])
    started = time.perf_counter()
    model = GPTQModel.load(job["path"], device="cpu", backend=BACKEND.TORCH, dtype=getattr(torch, job["dtype"])).model.eval()
    load_s = time.perf_counter() - started
    step, past, tokens, logits = list(job["prompt"]), None, [], []
    for _ in range(job["tokens"]):
        found = model(input_ids=torch.tensor([step]), past_key_values=past, use_cache=True)
        past = found.past_key_values
        logits.append(found.logits[0, -1].float().numpy())
        step = [int(logits[-1].argmax())]
        tokens += step
    version = f"gptqmodel {importlib.metadata.version('gptqmodel')}"
    np.savez(job["out"], logits=np.stack(logits), tokens=tokens, load_s=load_s, version=version)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
