"""The models and files of ``benchmarks/cpu.py``: SmolLM2-135M, and random llamas of a 1B's and a 3B's shape.

Every contender reads the same weights: a float directory (bfloat16 safetensors), from it checkpoints of quantkit, and GGUF
files (16 bits, then ``llama-quantize``). Speed does not depend on the values, so the large models are random; they are
written tensor by tensor and never whole in memory. A finished file is never made again.
"""

import json
import math
import os
import shutil
import subprocess
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

GGUF_TYPES = ("Q4_0", "Q8_0", "Q4_K_M")
SHAPES: dict[str, dict[str, Any]] = {
    "1b": {
        "hidden_size": 2048,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 8192,
        "vocab_size": 32000,
        "tie_word_embeddings": False,
    },
    "3b": {
        "hidden_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 24,
        "num_key_value_heads": 8,
        "intermediate_size": 8192,
        "vocab_size": 32000,
        "tie_word_embeddings": False,
    },
}
"""Random llamas by name; the shapes of Llama 3.2, with a smaller vocabulary and a head of its own."""

MODELS = ("smollm2", *SHAPES)
SCHEMES = {"int4": "w4a16-g32", "int8": "w8a16-g32"}
"""Schemes with the bits of Q4_0 and Q8_0: 4.5 and 8.5 per weight, scales included."""


def float_directory(name: str, work: Path) -> Path:
    """Return the directory of a model's bfloat16 weights, made if need be."""
    path = work / f"{name}-bf16"
    if not (path / "config.json").exists():
        path.mkdir(parents=True, exist_ok=True)
        _save_smollm2(path) if name == "smollm2" else _save_random(name, path)
    return path


def _save_smollm2(path: Path) -> None:
    from quantkit.checkpoint.open import open_model

    model: Any
    model, tokenizer = open_model("demo", torch.bfloat16)
    model.config.dtype = torch.bfloat16
    tokenizer.save_pretrained(path)
    model.save_pretrained(path)


def _save_random(name: str, path: Path) -> None:
    from transformers import LlamaConfig

    shape = SHAPES[name]
    config = LlamaConfig(**shape, architectures=["LlamaForCausalLM"], max_position_embeddings=4096, dtype="bfloat16")
    weight_map, total = {}, 0
    for number, shard in enumerate(_shards(config)):
        tensors = {tensor: _random(tensor, size) for tensor, size in shard.items()}
        file = f"model-{number:05}.safetensors"
        save_file(tensors, path / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
        total += sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    config.save_pretrained(path)  # last: its presence says that the rest is there


def _shards(config: Any) -> Iterator[dict[str, tuple[int, ...]]]:
    """Yield names and shapes of a llama's tensors: what stands outside, then layer by layer."""
    hidden, inner, head_dim = config.hidden_size, config.intermediate_size, config.hidden_size // config.num_attention_heads
    keys = config.num_key_value_heads * head_dim
    yield {
        "model.embed_tokens.weight": (config.vocab_size, hidden),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (config.vocab_size, hidden),
    }
    for layer in range(config.num_hidden_layers):
        yield {
            f"model.layers.{layer}.{part}.weight": shape
            for part, shape in {
                "input_layernorm": (hidden,),
                "post_attention_layernorm": (hidden,),
                "self_attn.q_proj": (hidden, hidden),
                "self_attn.k_proj": (keys, hidden),
                "self_attn.v_proj": (keys, hidden),
                "self_attn.o_proj": (hidden, hidden),
                "mlp.gate_proj": (inner, hidden),
                "mlp.up_proj": (inner, hidden),
                "mlp.down_proj": (hidden, inner),
            }.items()
        }


def _random(name: str, shape: tuple[int, ...]) -> Tensor:
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return (torch.randn(shape, generator=generator) / math.sqrt(shape[1])).bfloat16()


def quantized_directory(name: str, bits: str, work: Path) -> Path:
    """Return the directory of quantkit's checkpoint of ``bits`` ("int4", "int8"), made if need be, by round to nearest."""
    from quantkit import checkpoint
    from quantkit.hf.load import load_float
    from quantkit.hf.structure import describe
    from quantkit.nn.install import install
    from quantkit.nn.sites import read_weight
    from quantkit.numerics import grid
    from quantkit.presets import preset
    from quantkit.qtensor import GridTensor

    path = work / f"{name}-{bits}"
    if not (path / "config.json").exists():
        model: Any = load_float(float_directory(name, work))[0]
        for site in describe(model).sites:
            weight = read_weight(model, site).float()
            spec = preset(SCHEMES[bits], [site.in_features]).weight
            scale, zero = grid.choose_qparams(weight, spec)
            install(model, site, GridTensor.from_codes(grid.quantize(weight, scale, zero, spec), scale, zero, spec))
        checkpoint.save(model, path, format="native")
        for file in float_directory(name, work).glob("*token*") if name == "smollm2" else ():
            shutil.copy(file, path)
    return path


def gguf_file(name: str, kind: str, work: Path, binaries: Path) -> Path:
    """Return the GGUF file of ``kind``, made if need be by ``llama-quantize`` in ``binaries``."""
    path = work / f"{name}-{kind}.gguf"
    if path.exists():
        return path
    base = work / f"{name}-F16.gguf"
    if not base.exists():
        write_gguf(float_directory(name, work), base)
    made = path.with_suffix(".tmp")
    command = [str(binaries / "llama-quantize"), str(base), str(made), kind, str(os.cpu_count())]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    made.rename(path)
    return path


def gguf_facts(file: Path) -> dict[str, Any]:
    """Return bytes of a GGUF file, and bytes and bits of what a token reads: all matrices but an untied embedding."""
    import gguf

    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors if len(tensor.shape) > 1}
    if "output.weight" in tensors:
        del tensors["token_embd.weight"]
    read, weights = (
        sum(int(value) for value in values)
        for values in zip(*((t.n_bytes, t.n_elements) for t in tensors.values()), strict=True)
    )
    return {"bytes": file.stat().st_size, "read_bytes": read, "bits_per_read_weight": read * 8 / weights}


def openvino_directory(name: str, work: Path, python: str) -> Path:
    """Return the directory of OpenVINO's int4 export (groups of 32, symmetric), made if need be by the peer's own tools."""
    path = work / f"{name}-openvino"
    if not (path / "openvino_model.bin").exists():
        source = float_directory(name, work)
        if not (source / "tokenizer.json").exists():  # the pipeline will not start without one; nobody asks it anything
            for file in float_directory("smollm2", work).glob("*token*"):
                shutil.copy(file, source)
        options = [
            "--task",
            "text-generation-with-past",
            "--weight-format",
            "int4",
            "--sym",
            "--group-size",
            "32",
            "--ratio",
            "1.0",
        ]
        made = path.with_suffix(".tmp")
        tool = str(Path(python).parent / "optimum-cli")
        subprocess.run([tool, "export", "openvino", "--model", str(source), *options, str(made)], check=True)
        made.rename(path)
    return path


def write_gguf(source: Path, path: Path, dtype: str = "float16") -> None:
    """Write a llama directory as a GGUF without a tokenizer, matrices in ``dtype``, one tensor at a time."""
    import gguf
    import numpy as np

    config = json.loads((source / "config.json").read_text())
    heads, keys, head_dim = heads_of(config)
    layers = config["num_hidden_layers"]
    theta = (config.get("rope_parameters") or config).get("rope_theta", 10000.0)
    made = path.with_suffix(".tmp")
    writer = gguf.GGUFWriter(made, "llama")
    writer.add_tokenizer_model("none")
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(layers)
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(keys)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(theta)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16 if dtype == "float16" else gguf.LlamaFileType.ALL_F32)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, layers)
    places = dict(_places(source))
    for name, (_, shape) in places.items():
        own = names.get_name(name, (".weight",))
        stored = np.dtype(dtype if len(shape) > 1 else "float32")
        writer.add_tensor_info(own, shape, stored, math.prod(shape) * stored.itemsize)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, (file, shape) in places.items():
        with safe_open(file, "pt") as handle:
            tensor = handle.get_tensor(name)
        if name.endswith(("q_proj.weight", "k_proj.weight")):  # llama.cpp rotates neighbours, transformers halves
            count = heads if name.endswith("q_proj.weight") else keys
            tensor = tensor.view(count, 2, shape[0] // count // 2, shape[1]).transpose(1, 2).reshape(shape)
        writer.write_tensor_data(tensor.float().numpy().astype(dtype if len(shape) > 1 else "float32"))
    writer.close()
    made.rename(path)


def heads_of(config: dict[str, Any]) -> tuple[int, int, int]:
    """Return the numbers of query heads and of key heads, and the size of one, from a llama's config."""
    heads = config["num_attention_heads"]
    return heads, config["num_key_value_heads"], config.get("head_dim") or config["hidden_size"] // heads


def _places(source: Path) -> Iterator[tuple[str, tuple[Path, tuple[int, ...]]]]:
    for file in sorted(source.glob("*.safetensors")):
        with safe_open(file, "pt") as handle:
            for name in handle.keys():  # noqa: SIM118 - not a mapping
                yield name, (file, tuple(handle.get_slice(name).get_shape()))
