"""Damaged checkpoints of every format: one error that says what is wrong, or the numbers that stand there.

``python -m tests.checkpoint.test_hostile_formats 300`` tries 300 per format.
"""

import json
import random
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import quantkit
from quantkit import Output, QuantSpec, Scheme
from quantkit.checkpoint.read import open_checkpoint
from quantkit.errors import QuantkitError
from quantkit.formats.codecs.modelopt import SCHEMES
from tests.tiny import build

FORMATS: dict[str, Any] = {
    "gptq": "w4a16-g32",
    "gptq-v2": "w3a16-asym-g32",
    "awq": "w4a16-asym-g32",
    "mlx": "w6a16-asym-g32",
    "modelopt": SCHEMES["W4A16_NVFP4"],
    "compressed-tensors": "w4a16-asym-g32",
    "onnx": "w4a16-asym-g32",
    "native": Scheme(QuantSpec("nf4", (1, 32))),
}
FEW = 25
ODD: tuple[Any, ...] = (
    None,
    0,
    -1,
    3,
    7,
    1e9,
    True,
    "",
    "gptq_v2",
    "\0",
    [],
    [1],
    {},
    {"bits": 2},
    {"-:(a+)+$": {}},
    {"(": {}},
)


def small(format: str, path: Path) -> Path:
    """Write a checkpoint of two layers."""
    model = build("llama", hidden_size=32, intermediate_size=64, num_attention_heads=2, num_key_value_heads=2)
    quantkit.quantize(model, FORMATS[format], method="rtn", output=Output(path, format=format))
    return path


def damage(source: Path, out: Path, choose: random.Random) -> str:
    """Copy a checkpoint with one thing wrong; return what."""
    out.mkdir()
    for file in source.iterdir():
        (out / file.name).write_bytes(file.read_bytes())
    kind = choose.choice(("config", "config", "drop", "shape", "dtype", "content", "rename", "truncate", "flip", "twin"))
    weights = next(out.glob("*.safetensors"))
    if kind in ("config", "twin"):
        config = json.loads((out / "config.json").read_text())
        places = [config["quantization_config"]]
        places += [value for value in places[0].values() if isinstance(value, dict)]
        place = choose.choice(places)
        key = choose.choice([*place, "pack_dtype", "mode", "desc_act", "dynamic", "quantized_layers", "modules_to_not_convert"])
        place[key] = choose.choice(ODD)
        if kind == "twin":
            config.pop("quantization", None)
        (out / "config.json").write_text(json.dumps(config))
        return f"config {key}={place[key]!r}"
    if kind in ("truncate", "flip"):
        data = bytearray(weights.read_bytes())
        place = choose.randrange(len(data))
        if kind == "truncate":
            del data[place:]
        else:
            data[min(place, choose.choice((place, 2000)))] ^= 1 << choose.randrange(8)
        weights.write_bytes(data)
        return f"{kind} at {place}"
    tensors = load_file(weights)
    name = choose.choice([name for name in tensors if "layers." in name])
    tensor = tensors[name]
    changes: dict[str, Callable[[], torch.Tensor]] = {
        "shape": lambda: tensor.reshape(-1)[: max(1, tensor.numel() // 2)].clone(),
        "dtype": lambda: tensor.view(torch.uint8) if tensor.dtype != torch.uint8 else tensor.view(torch.int8),
        "content": lambda: torch.randint(0, 256, (tensor.nbytes,), dtype=torch.uint8).view(tensor.dtype).view(tensor.shape),
    }
    if kind in changes:
        tensors[name] = changes[kind]().contiguous()
    else:
        del tensors[name]
        if kind == "rename":
            tensors[f"{name}x"] = tensor
    save_file(tensors, weights, metadata={"format": "pt"})
    return f"{kind} {name}"


def look(path: Path) -> None:
    """Read everything that a checkpoint holds."""
    with open_checkpoint(path) as opened:
        for name in opened.schemes:
            assert opened.qtensor(opened.contents.sites[name]).dequantize().isfinite


def attack(format: str, count: int, folder: Path) -> int:
    """Damage a checkpoint ``count`` times; return how often that was refused."""
    source, choose, refused = small(format, folder / "source"), random.Random(format), 0
    look(source)
    for index in range(count):
        what = damage(source, folder / str(index), choose)
        try:
            look(folder / str(index))
        except QuantkitError as error:
            refused += 1 if len(str(error).splitlines()) == 1 else 0
        except Exception as error:
            raise AssertionError(f"{format}: {what}: {type(error).__name__}: {error}") from error
    return refused


@pytest.mark.parametrize("format", FORMATS)
def test_damage_is_one_error_or_none(tmp_path: Path, format: str) -> None:
    assert attack(format, FEW, tmp_path) > FEW // 3


if __name__ == "__main__":
    for each in FORMATS:
        with tempfile.TemporaryDirectory() as scratch:
            print(each, attack(each, int(sys.argv[1]), Path(scratch)), "refused", flush=True)
