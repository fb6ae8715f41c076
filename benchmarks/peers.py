"""Other tools' quantizers on the benchmark's model and tokens: ``python peers.py NAME JOB``, run by a Python that has the tool.

JOB is JSON: ``work`` (directory with the model in ``float`` and the tokens in ``calibration.safetensors``), ``out`` (where
the result goes), ``samples``, ``bits``, ``group_size``, ``symmetric``. The last line printed is ``RESULT`` and a JSON object:
seconds, cpu_seconds, peak_mib, what was set otherwise than by default (``note``) and, if the result is dequantized weights in
one file instead of a checkpoint, ``weights`` and the nominal ``bits_per_weight``.
"""

import json
import resource
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
        self.wall, self.cpu = time.perf_counter(), time.process_time()

    def cost(self) -> dict:
        """Return what has passed."""
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        return {"seconds": time.perf_counter() - self.wall, "cpu_seconds": time.process_time() - self.cpu, "peak_mib": peak}


PEERS = {
    "auto-round": auto_round,
    "llm-compressor-gptq": llm_compressor_gptq,
    "llm-compressor-awq": llm_compressor_awq,
    "hqq": hqq,
}

if __name__ == "__main__":
    print("RESULT " + json.dumps(PEERS[sys.argv[1]](json.loads(sys.argv[2]))))
