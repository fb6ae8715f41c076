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
    prompt = torch.tensor([job["prompt"]])
    found = model.generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=job["tokens"],
        min_new_tokens=job["tokens"],
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    logits = torch.cat(found.logits).float().numpy()
    tokens = found.sequences[0, prompt.shape[1] :].tolist()
    names = ["transformers", *job.get("packages", [])]
    version = " + ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
    np.savez(job["out"], logits=logits, tokens=tokens, load_s=load_s, version=version)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
