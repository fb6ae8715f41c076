"""Continue a prompt with mlx-lm on the CPU, or convert a float model with it; see ``benchmarks/interop.py``."""

import importlib.metadata
import json
import sys
import time

import mlx.core as mx
import numpy as np
from mlx_lm.utils import load_model
from pathlib import Path


def main(job: dict) -> None:
    """Answer one job."""
    mx.set_default_device(mx.cpu)
    started = time.perf_counter()
    model, _ = load_model(Path(job["path"]))
    load_s = time.perf_counter() - started
    ids, logits = list(job["prompt"]), []
    for _ in range(job["tokens"]):
        logits.append(np.array(model(mx.array([ids]))[0, -1].astype(mx.float32)))
        ids.append(int(logits[-1].argmax()))
    version = " + ".join(f"{name} {importlib.metadata.version(name)}" for name in ("mlx-lm", "mlx"))
    np.savez(job["out"], logits=np.stack(logits), tokens=ids[len(job["prompt"]) :], load_s=load_s, version=version)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
