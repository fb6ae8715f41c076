"""Continue a prompt with llama.cpp and return its logits, or let it quantize a file; see ``benchmarks/interop.py``."""

import json
import sys
import time
from pathlib import Path

import llama_cpp
import numpy as np


def main(job: dict) -> None:
    """Answer one job; with ``make``, first let llama-quantize make a file of that type from a float one beside it."""
    path = Path(job["path"])
    if make := job.get("options", {}).get("make"):
        source = path.with_name(f"{path.name.partition('gguf')[0]}gguf-F16") / "model.gguf"
        if not path.exists():  # what the program llama-quantize calls
            settings = llama_cpp.llama_model_quantize_default_params()
            settings.ftype, settings.nthread = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{make}"), 1
            status = llama_cpp.llama_model_quantize(str(source).encode(), str(path).encode(), settings)
            assert status == 0, f"llama_model_quantize: {status}"
    file = path if path.suffix == ".gguf" else path / "model.gguf"
    started = time.perf_counter()
    model = llama_cpp.Llama(str(file), n_ctx=256, n_threads=1, n_threads_batch=1, logits_all=True, verbose=False)
    load_s = time.perf_counter() - started
    step, tokens, logits = list(job["prompt"]), [], []
    for _ in range(job["tokens"]):
        model.eval(step)
        logits.append(np.array(model.scores[model.n_tokens - 1], np.float32))
        step = [int(logits[-1].argmax())]
        tokens += step
    version = f"llama-cpp-python {llama_cpp.__version__}"
    np.savez(job["out"], logits=np.stack(logits), tokens=tokens, load_s=load_s, version=version)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
