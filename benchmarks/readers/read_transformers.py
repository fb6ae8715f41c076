"""Continue a prompt with transformers and the package that it takes a format's layers from; see ``benchmarks/interop.py``."""

import importlib.metadata
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, CompressedTensorsConfig


@torch.no_grad()
def main(job: dict) -> None:
    """Answer one job; with ``make``, first let bitsandbytes round the float model and save it."""
    options = job.get("options", {})
    if (make := options.get("make")) and not Path(job["path"], "config.json").exists():
        kind = {"load_in_8bit": True} if make.get("load_in_8bit") else {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
        how = BitsAndBytesConfig(
            **kind, bnb_4bit_use_double_quant=make.get("nested", False), bnb_4bit_compute_dtype=torch.float32
        )
        made = AutoModelForCausalLM.from_pretrained(job["model"], quantization_config=how, device_map="cpu", dtype=job["dtype"])
        made.save_pretrained(job["path"])
    started = time.perf_counter()
    told = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if options.get("dequantize") else {}
    model = AutoModelForCausalLM.from_pretrained(job["path"], dtype=job["dtype"], device_map="cpu", **told).eval()
    model = model.dequantize() if options.get("decode") else model
    load_s = time.perf_counter() - started
    step, past, tokens, logits = list(job["prompt"]), None, [], []
    for _ in range(job["tokens"]):
        found = model(input_ids=torch.tensor([step]), past_key_values=past, use_cache=True)
        past = found.past_key_values
        logits.append(found.logits[0, -1].float().numpy())
        step = [int(logits[-1].argmax())]
        tokens += step
    names = ["transformers", *job.get("packages", [])]
    version = " + ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
    np.savez(job["out"], logits=np.stack(logits), tokens=tokens, load_s=load_s, version=version)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
