"""Other tools' quantizers on the benchmark's model and tokens: ``python peers.py NAME JOB``, run by a Python that has the tool.

JOB is JSON: ``work`` (directory with the model in ``float`` and the tokens in ``calibration.safetensors``), ``out`` (where
the result goes), ``samples``, ``bits``, ``group_size``, ``symmetric``. The last line printed is ``RESULT`` and a JSON object:
seconds, cpu_seconds, peak_mib, what was set otherwise than by default (``note``) and, if the result is dequantized weights in
one file instead of a checkpoint, ``weights`` and the nominal ``bits_per_weight``.
"""

import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path


def auto_round(job: dict) -> dict:
    """AutoRound with 24 iterations over 48 windows: what it gets done in about the time of the others."""
    from auto_round import AutoRound

    model, tokenizer = load(job)
    ids = calibration_ids(job, at_most=48)
    clock = Clock()
    model, _ = AutoRound(
        model, tokenizer, bits=job["bits"], group_size=job["group_size"], sym=job["symmetric"], iters=24, nsamples=len(ids),
        seqlen=ids.shape[1], batch_size=4, dataset=list(ids.split(1)), device_map="cpu", amp=False, enable_torch_compile=False,
    ).quantize()  # fmt: skip
    cost = clock.cost()
    return (
        cost
        | write_weights(model, job, job["bits"] + (16 + (0 if job["symmetric"] else job["bits"])) / job["group_size"])
        | {"note": f"24 iterations, {len(ids)} windows"}
    )


def auto_scheme(job: dict) -> dict:
    """AutoScheme of AutoRound, choosing from quantkit's own default choices within ``job["scheme"]`` bits per weight.

    Scored as it does by default, fused layers alike, over 16 windows of 256 tokens of the same text; carried out by AutoRound
    as in :func:`auto_round`. The bits that it ends with are counted from what every layer was given.
    """
    import torch
    from auto_round import AutoRound, AutoScheme
    from auto_round.schemes import QuantizationScheme

    model, tokenizer = load(job)
    ids = calibration_ids(job, at_most=96)
    lines = [json.dumps({"text": tokenizer.decode(row.flatten())}) for row in ids.split(2)]  # cut to length by AutoRound
    text = Path(job["out"] + "-text.jsonl")
    text.write_text("\n".join(lines) + "\n")
    bits = float(job["scheme"].removesuffix("bpw"))
    samples = len(lines)
    choices = [(2, 32, False), *((one, 64, False) for one in (2, 3, 4, 5, 6)), (8, 64, True)]
    clock = Clock()
    chooser = AutoScheme(
        avg_bits=bits, options=[QuantizationScheme(one, size, even) for one, size, even in choices],
        shared_layers=[["q_proj", "k_proj", "v_proj"], ["gate_proj", "up_proj"]], device_map="cpu",
    )  # fmt: skip
    tuner = AutoRound(
        model, tokenizer, scheme=chooser, iters=24, nsamples=samples, seqlen=ids.shape[1], batch_size=4,
        dataset=str(text), device_map="cpu", amp=False, enable_torch_compile=False,
    )  # fmt: skip
    model, plan = tuner.quantize()
    cost = clock.cost()
    linears = {name: one for name, one in model.model.layers.named_modules() if isinstance(one, torch.nn.Linear)}
    taken = weights = 0
    for name, layer in linears.items():
        given = plan[f"model.layers.{name}"]
        zero = 0 if given["sym"] else given["bits"]
        taken += layer.weight.numel() * (given["bits"] + (16 + zero) / given["group_size"])
        weights += layer.weight.numel()
    return cost | write_weights(model, job, taken / weights) | {"note": f"24 iterations, {samples} windows"}


def llm_compressor_gptq(job: dict) -> dict:
    """GPTQ of llm-compressor, with its default of static activation order."""
    from llmcompressor.modifiers.gptq import GPTQModifier

    return oneshot(job, [GPTQModifier(config_groups=groups(job, actorder="static"), ignore=["lm_head"])], 128)


def llm_compressor_awq(job: dict) -> dict:
    """AWQ of llm-compressor over 32 windows: it takes twice the time of its GPTQ over 128."""
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier
    from llmcompressor.pipelines.cache import IntermediatesCache

    # Version 0.14 pins memory for an accelerator that is not there, and fails.
    IntermediatesCache._pin_intermediate = classmethod(lambda _cls, value: None)
    return oneshot(job, [AWQModifier(), QuantizationModifier(config_groups=groups(job), ignore=["lm_head"])], 32)


def groups(job: dict, **more: object) -> dict:
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    weights = QuantizationArgs(
        num_bits=job["bits"], type="int", symmetric=job["symmetric"], strategy="group", group_size=job["group_size"], **more
    )
    return {"group_0": QuantizationScheme(targets=["Linear"], weights=weights)}


def oneshot(job: dict, recipe: list, samples: int) -> dict:
    import llmcompressor
    from datasets import Dataset

    model, tokenizer = load(job)
    ids = calibration_ids(job, at_most=samples)
    data = Dataset.from_dict({"input_ids": ids.tolist(), "attention_mask": [[1] * ids.shape[1]] * len(ids)})
    clock = Clock()
    llmcompressor.oneshot(
        model=model, dataset=data, recipe=recipe, max_seq_length=ids.shape[1], num_calibration_samples=len(ids),
        shuffle_calibration_samples=False,
    )  # fmt: skip
    cost = clock.cost()
    model.save_pretrained(job["out"], save_compressed=True)
    tokenizer.save_pretrained(job["out"])
    return cost | {"note": f"{len(ids)} windows"}


def hqq(job: dict) -> dict:
    """HQQ: no data, scale and zero point in float16."""
    import torch
    from hqq.core.quantize import Quantizer

    model, _ = load(job)
    clock = Clock()
    with torch.no_grad():
        for layer in (one for one in model.model.layers.modules() if isinstance(one, torch.nn.Linear)):
            packed, facts = Quantizer.quantize(
                layer.weight.data, nbits=job["bits"], group_size=job["group_size"], axis=1, device="cpu",
                compute_dtype=torch.float32,
            )  # fmt: skip
            layer.weight.data = Quantizer.dequantize(packed, facts).float().view_as(layer.weight)
    return clock.cost() | write_weights(model, job, job["bits"] + 32 / job["group_size"]) | {"note": "float16 zero points"}


def gptqmodel(job: dict) -> dict:
    """GPTQ of GPTQModel with its defaults."""
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # by default one, and then its own loader asks for two
    import torch
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig

    ids = calibration_ids(job, at_most=128)
    settings = QuantizeConfig(bits=job["bits"], group_size=job["group_size"], sym=job["symmetric"], device="cpu")
    quantizing = GPTQModel.load(str(Path(job["work"]) / "float"), settings)
    clock = Clock()
    quantizing.quantize([{"input_ids": row[None], "attention_mask": torch.ones_like(row[None])} for row in ids], batch_size=8)
    cost = clock.cost()
    quantizing.save(job["out"])
    made = GPTQModel.load(job["out"], device="cpu", backend=BACKEND.TORCH)
    model, _ = load(job)
    with torch.no_grad():
        for name, layer in made.model.named_modules():
            if hasattr(layer, "dequantize_weight"):
                model.get_submodule(name).weight.copy_(layer.dequantize_weight().T)
    nominal = job["bits"] + (16 + job["bits"]) / job["group_size"]  # zero points are written for symmetric grids too
    return cost | write_weights(model, job, nominal) | {"note": f"{len(ids)} windows"}


def torchao_qat(job: dict) -> dict:
    """QAT of torchao towards the float model's predictions: the windows, steps and products of quantkit's training.

    Its grids follow the weights' extremes anew in every forward. ``job["options"]`` has ``steps``, ``windows`` per step and
    ``peer_rate``, AdamW's highest learning rate, which rises and falls as quantkit's does.
    """
    import copy
    import math

    import torch
    from safetensors.torch import load_file
    from torch.nn import functional as F
    from torchao.quantization import quantize_
    from torchao.quantization.qat import FakeQuantizedLinear, IntxFakeQuantizeConfig, QATConfig

    model, _ = load(job)
    teacher = copy.deepcopy(model).to(torch.bfloat16)
    options = {"steps": 200, "windows": 4, "peer_rate": 2e-5, "warm_steps": 10, **job["options"]}
    grid = IntxFakeQuantizeConfig(
        getattr(torch, f"int{job['bits']}"), group_size=job["group_size"], is_symmetric=job["symmetric"]
    )
    linears = {name for name, one in model.named_modules() if isinstance(one, torch.nn.Linear) and ".layers." in name}
    quantize_(model, QATConfig(weight_config=grid, step="prepare"), filter_fn=lambda _one, name: name in linears)
    fakes = [one for one in model.modules() if isinstance(one, FakeQuantizedLinear)]
    assert len(fakes) == len(linears), "torchao left layers out"
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    weights = [one.weight.requires_grad_(True) for one in fakes]
    optimizer = torch.optim.AdamW(weights, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    ids = load_file(Path(job["work"]) / "training.safetensors")["ids"]
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))
    clock, losses = Clock(), []
    for step in range(options["steps"]):
        places = [order[i % len(ids)] for i in range(step * options["windows"], (step + 1) * options["windows"])]
        for row in (ids[place][None] for place in places):
            with torch.no_grad():
                wanted = teacher(input_ids=row, use_cache=False).logits.float().log_softmax(-1).flatten(0, 1)
            with torch.autocast("cpu", torch.bfloat16):
                found = model(input_ids=row, use_cache=False).logits
            loss = F.kl_div(found.float().log_softmax(-1).flatten(0, 1), wanted, log_target=True, reduction="batchmean")
            (loss / len(places)).backward()
            losses.append(loss.item())
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        warm, rest = options["warm_steps"], options["steps"] - options["warm_steps"]
        falling = 0.5 * (1 + math.cos(math.pi * min(1.0, max(0, step - warm) / max(1, rest))))
        optimizer.param_groups[0]["lr"] = options["peer_rate"] * min((step + 1) / (warm + 1), 1.0) * falling
        optimizer.step()
        optimizer.zero_grad()
    cost = clock.cost()
    clean, _ = load(job)
    with torch.no_grad():
        for name in linears:
            layer = model.get_submodule(name)
            clean.get_submodule(name).weight.copy_(layer.weight_fake_quantizer(layer.weight))
    bits = job["bits"] + (16 + (0 if job["symmetric"] else job["bits"])) / job["group_size"]
    note = f"AdamW {options['peer_rate']:g}, {len(losses)} windows"
    return cost | write_weights(clean, job, bits) | {"note": note, "training_kl": losses}


def llama_cpp(job: dict) -> dict:
    """llama.cpp with an importance matrix over all windows: Q4_0, every matrix alike (``--pure``), or the mix that is named.

    ``job["peer"]`` says where ``llama-quantize`` is. Needs gguf in this Python. K-quants want rows of a multiple of 256, and
    llama.cpp takes larger types for others.
    """
    import gguf
    from cpu_models import heads_of, write_gguf

    kind = ["Q4_0"] if job.get("bits") == 4 else [job["scheme"]]
    if "bits" in job and job["bits"] != 4:
        sys.exit("llama.cpp: of its formats only Q4_0 (4 bits) takes rows of any multiple of 32")
    binaries = Path(dict(one.split("=", 1) for one in job["peer"])["llama.cpp"])
    source, base, made = Path(job["work"]) / "float", job["out"] + "-f32.gguf", job["out"] + ".gguf"
    write_gguf(source, Path(base), "float32")
    model, _ = load(job)
    ids = calibration_ids(job, at_most=128)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, model.config.num_hidden_layers)
    linears = {f"{name}.weight": layer for name, layer in model.model.layers.named_modules() if hasattr(layer, "weight")}
    linears = {f"model.layers.{name}": layer for name, layer in linears.items() if layer.weight.ndim == 2}
    clock = Clock()
    importance = {str(names.get_name(name, (".weight",))): value for name, value in mean_squares(model, linears, ids).items()}
    write_importance(Path(made + ".imatrix"), importance)
    pure = ["--pure"] if kind == ["Q4_0"] else []
    command = [str(binaries / "llama-quantize"), *pure, "--imatrix", made + ".imatrix", base, made, *kind]
    subprocess.run([*command, str(os.cpu_count())], check=True, stdout=subprocess.DEVNULL)
    cost = clock.cost()
    heads, keys, _ = heads_of(json.loads((source / "config.json").read_text()))
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(made).tensors}
    nbytes = 0
    for name, layer in linears.items():
        tensor = stored[names.get_name(name, (".weight",))]
        nbytes += int(tensor.n_bytes)
        weight = layer.weight.data.new_tensor(gguf.dequantize(tensor.data, tensor.tensor_type))
        if name.endswith(("q_proj.weight", "k_proj.weight")):  # back from neighbours to halves
            weight = weight.view(heads if "q_proj" in name else keys, -1, 2, weight.shape[1]).transpose(1, 2)
        layer.weight.data = weight.reshape(layer.weight.shape)
    bits = nbytes * 8 / sum(layer.weight.numel() for layer in linears.values())
    return cost | write_weights(model, job, bits) | {"note": f"{kind[0]}, importance of {len(ids)} windows"}


def mean_squares(model, linears: dict, ids) -> dict:
    """Return E[x^2] of every input channel of the named layers."""
    import torch

    sums = {name: torch.zeros(layer.in_features, dtype=torch.float64) for name, layer in linears.items()}

    def watch(total: torch.Tensor):
        def add(_layer, given) -> None:
            total.add_(given[0].flatten(0, -2).double().square().sum(0))

        return add

    for name, layer in linears.items():
        layer.register_forward_pre_hook(watch(sums[name]))
    with torch.inference_mode():
        for batch in ids.split(8):
            model(input_ids=batch, use_cache=False, logits_to_keep=1)
    return {name: total / ids.numel() for name, total in sums.items()}


def write_importance(path: Path, importance: dict) -> None:
    """Write llama.cpp's importance matrix in its older binary form: per name the number of calls and a float32 per channel."""
    import struct

    with path.open("wb") as file:
        file.write(struct.pack("<i", len(importance)))
        for name, values in importance.items():
            encoded = name.encode()
            file.write(struct.pack("<i", len(encoded)) + encoded + struct.pack("<ii", 1, len(values)))
            file.write(values.float().numpy().tobytes())


def load(job: dict):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = Path(job["work"]) / "float"
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32), AutoTokenizer.from_pretrained(path)


def calibration_ids(job: dict, at_most: int):
    """Return evenly spread windows of the prepared ones: int64 (samples, length)."""
    from safetensors.torch import load_file

    ids = load_file(Path(job["work"]) / "calibration.safetensors")["ids"]
    count = min(at_most, job["samples"])
    return ids[[i * len(ids) // count for i in range(count)]]


def write_weights(model, job: dict, bits: float) -> dict:
    from safetensors.torch import save_file

    path = job["out"] + ".safetensors"
    save_file({key: value.contiguous().clone() for key, value in model.state_dict().items()}, path)
    return {"weights": path, "bits_per_weight": bits}


class Clock:
    """Wall and processor seconds (of all threads, which says more on a busy machine) since it was made, and peak memory."""

    def __init__(self) -> None:
        self.wall, self.cpu = time.perf_counter(), self._processor()

    def cost(self) -> dict:
        """Return what has passed."""
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        return {"seconds": time.perf_counter() - self.wall, "cpu_seconds": self._processor() - self.cpu, "peak_mib": peak}

    @staticmethod
    def _processor() -> float:
        return sum(os.times()[:4])  # with children


PEERS = {
    "auto-round": auto_round,
    "auto-scheme": auto_scheme,
    "llm-compressor-gptq": llm_compressor_gptq,
    "llm-compressor-awq": llm_compressor_awq,
    "hqq": hqq,
    "gptqmodel": gptqmodel,
    "torchao-qat": torchao_qat,
    "llama.cpp": llama_cpp,
}

if __name__ == "__main__":
    print("RESULT " + json.dumps(PEERS[sys.argv[1]](json.loads(sys.argv[2]))))
