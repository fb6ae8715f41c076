"""Continue a prompt with llama.cpp and return its logits, or let it quantize a file; see ``benchmarks/interop.py``.

With ``decode`` it first makes a file of float32 of the one to read: its products then round nothing, and what is compared is
how it decodes blocks.
"""

import json
import sys
import time
from pathlib import Path

import llama_cpp
import numpy as np


def quantize(source: Path, path: Path, kind: str) -> None:
    """Do what the program ``llama-quantize`` does."""
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype, settings.nthread, settings.allow_requantize = getattr(llama_cpp, f"LLAMA_FTYPE_{kind}"), 1, True
    status = llama_cpp.llama_model_quantize(str(source).encode(), str(path).encode(), settings)
    assert status == 0, f"llama_model_quantize: {status}"


def perplexity(file: Path, windows: list[list[int]]) -> float:
    """Score the second half of every window, as the program ``llama-perplexity`` does."""
    size = len(windows[0])
    model = llama_cpp.Llama(str(file), n_ctx=size, n_batch=size, n_threads=1, n_threads_batch=1, logits_all=True, verbose=False)
    losses = []
    for window in windows:
        model.reset()
        model.eval(window)
        logits = np.array(model.scores[size // 2 : size - 1], np.float64)
        logits -= logits.max(-1, keepdims=True)
        chosen = logits[np.arange(len(logits)), window[size // 2 + 1 :]]
        losses.append(np.log(np.exp(logits).sum(-1)) - chosen)
    return float(np.exp(np.mean(losses)))


def main(job: dict) -> None:
    """Answer one job; with ``make``, first let llama-quantize make a file of that type from a float one beside it."""
    path = Path(job["path"])
    if make := job.get("options", {}).get("make"):
        source = path.with_name(f"{path.name.partition('gguf')[0]}gguf-F16") / "model.gguf"
        if not path.exists():  # what the program llama-quantize calls
            quantize(source, path, f"MOSTLY_{make}")
    file = path if path.suffix == ".gguf" else path / "model.gguf"
    if job["options"].get("decode"):
        file, source = Path("decoded.gguf"), file  # in the folder that this runs in
        quantize(source, file, "ALL_F32")
    if job.get("windows"):
        np.savez(job["out"], perplexity=perplexity(file, job["windows"]), version=f"llama-cpp-python {llama_cpp.__version__}")
        return
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
