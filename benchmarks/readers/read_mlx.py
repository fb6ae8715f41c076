"""Continue a prompt with mlx-lm on the CPU, or convert a float model with it; see ``benchmarks/interop.py``."""

import importlib.metadata
import json
import sys
import time
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx.utils import tree_map
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model


def main(job: dict) -> None:
    """Answer one job."""
    mx.set_default_device(mx.cpu)
    started = time.perf_counter()
    model, _ = load_model(Path(job["path"]))
    load_s = time.perf_counter() - started
    if job.get("options", {}).get("widen"):  # exact; its kernels for float16 add up in float16 on the CPU
        model.update(tree_map(lambda p: p.astype(mx.float32) if mx.issubdtype(p.dtype, mx.floating) else p, model.parameters()))
    cache, step, tokens, logits = make_prompt_cache(model), job["prompt"], [], []
    for _ in range(job["tokens"]):
        logits.append(np.array(model(mx.array([step]), cache=cache)[0, -1].astype(mx.float32)))
        step = [int(logits[-1].argmax())]
        tokens += step
    version = " + ".join(f"{name} {importlib.metadata.version(name)}" for name in ("mlx-lm", "mlx"))
    np.savez(job["out"], logits=np.stack(logits), tokens=tokens, load_s=load_s, version=version)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
