"""Pack a float model with AutoAWQ's layers and continue a prompt with them; see ``benchmarks/interop.py``.

AutoAWQ 0.2.9, the last, imports parts of transformers that are gone; its layers need none of them, so they are imported without
the package around them. They pack what is rounded here to the nearest, as AutoAWQ does with scales of its search. ``gemm`` runs
in AutoAWQ's own product without a GPU. ``gemv`` has none (``WQLinear_GEMV`` calls ``awq_ext``): its codes are the same, so the
answer is that of the ``gemm`` layers made from them.
"""

import importlib.metadata
import json
import shutil
import sys
import time
import types
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

ROOT = next(Path(one, "awq") for one in sys.path if Path(one, "awq").is_dir())
for package in ("awq", "awq.modules", "awq.modules.linear", "awq.utils"):
    shell = types.ModuleType(package)
    shell.__path__ = [str(ROOT.joinpath(*package.split(".")[1:]))]
    sys.modules[package] = shell

from awq.modules.linear.gemm import WQLinear_GEMM  # noqa: E402
from awq.modules.linear.gemv import WQLinear_GEMV  # noqa: E402


@torch.no_grad()
def main(job: dict) -> None:
    """Answer one job; the checkpoint is written if it is not there."""
    make, path = job["options"]["make"], Path(job["path"])
    started = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float16).eval()
    size = make["group_size"]
    tensors = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("lm_head")}
    for name, linear in [one for one in model.model.layers.named_modules() if isinstance(one[1], torch.nn.Linear)]:
        grouped = linear.weight.unflatten(1, (-1, size)).float()
        low, high = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
        scales = ((high - low).clamp(min=1e-5) / 15).half()
        zeros = (-low / scales).round().clamp(0, 15)
        codes = ((grouped / scales[..., None]).round() + zeros[..., None]).clamp(0, 15)
        linear.weight.copy_(((codes - zeros[..., None]) * scales[..., None]).flatten(1))
        gemm = WQLinear_GEMM.from_linear(linear, 4, size, scales=scales.T.contiguous(), zeros=zeros.T.contiguous())
        stored = gemm if make["version"] == "gemm" else WQLinear_GEMV.from_linear(linear, 4, size, scales=scales, zeros=zeros)
        del tensors[f"model.layers.{name}.weight"]
        tensors |= {f"model.layers.{name}.{key}": value.contiguous() for key, value in stored.state_dict().items()}
        model.model.layers.set_submodule(name, gemm)
    if not (path / "config.json").exists():
        write(path, Path(job["model"]), tensors, make)
    load_s = time.perf_counter() - started
    step, past, tokens, logits = list(job["prompt"]), None, [], []
    for _ in range(job["tokens"]):
        found = model(input_ids=torch.tensor([step]), past_key_values=past, use_cache=True)
        past = found.past_key_values
        logits.append(found.logits[0, -1].float().numpy())
        step = [int(logits[-1].argmax())]
        tokens += step
    version = f"autoawq {importlib.metadata.version('autoawq')}"
    np.savez(job["out"], logits=np.stack(logits), tokens=tokens, load_s=load_s, version=version)


def write(path: Path, source: Path, tensors: dict[str, torch.Tensor], make: dict) -> None:
    """Write a directory as AutoAWQ's ``save_quantized`` does."""
    path.mkdir(parents=True)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(source / name, path)
    said = {"quant_method": "awq", "bits": 4, "zero_point": True, "modules_to_not_convert": None, **make}
    config = json.loads((source / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "dtype": "float16", "quantization_config": said}))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
