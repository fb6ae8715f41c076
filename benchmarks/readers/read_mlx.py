"""Continue a prompt with mlx-lm on the CPU, or convert a float model with it; see ``benchmarks/interop.py``."""

import importlib.metadata
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx.utils import tree_map
from mlx_lm import convert
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model


def main(job: dict) -> None:
    """Answer one job; with ``make``, first let mlx-lm convert the float model."""
    options = job.get("options", {})
    if (make := options.get("make")) and not Path(job["path"], "config.json").exists():
        source = Path(tempfile.mkdtemp(), "source")
        shutil.copytree(job["model"], source)
        config = json.loads((source / "config.json").read_text())
        rotary = config.get("rope_parameters", {})  # where mlx-lm does not look for it
        (source / "config.json").write_text(json.dumps({**config, "rope_theta": rotary.get("rope_theta", 10000.0)}))
        convert(str(source), job["path"], quantize=True, q_bits=make["bits"], q_group_size=make["group"], dtype=job["dtype"])
    mx.set_default_device(mx.cpu)
    started = time.perf_counter()
    model, _ = load_model(Path(job["path"]))
    load_s = time.perf_counter() - started
    if options.get("widen"):  # exact; its kernels for float16 add up in float16 on the CPU
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
