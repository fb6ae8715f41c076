"""What loaders of servers that need a GPU register for a layer, by name, dtype and shape, held against what we write.

SGLang (main, 2026): ``layers/quantization/gptq/schemes/gptq_linear.py`` (0848df5) and ``gptq_marlin.py`` (4dbddf2),
``awq/schemes/awq_linear.py`` (31c9a9b), ``compressed_tensors/schemes/compressed_tensors_wNa16.py`` (255632e),
``compressed_tensors_w8a8_int8.py`` (0fbab45), ``compressed_tensors_w4a16_nvfp4.py`` (1402ae4),
``modelopt/schemes/modelopt_fp8.py`` (578ca2f). TensorRT-LLM (main, 2026): ``_torch/modules/linear.py`` (00bbf71):
FP8QDQLinearMethod, FP8RowwiseLinearMethod.
"""

from typing import Any, NamedTuple

import pytest
import torch

import quantkit
from quantkit.formats.base import FORMATS
from quantkit.presets import preset
from tests.tiny import FAMILIES, tiny_tokenizer

Registered = dict[str, tuple[torch.dtype, tuple[int, ...]]]
SCALES = torch.float16  # params_dtype of these checkpoints
I32, FP32, FP8, U8 = torch.int32, torch.float32, torch.float8_e4m3fn, torch.uint8


def sglang_gptq(out: int, columns: int, bits: int, group: int) -> Registered:
    """A fraction of a word is not rounded up: ``in // Fraction(32, bits)``."""
    assert columns % group == 0
    assert out * bits % 32 == 0
    groups = columns // group
    return {
        "qweight": (I32, (columns * bits // 32, out)),
        "qzeros": (I32, (groups, out * bits // 32)),
        "scales": (SCALES, (groups, out)),
        "g_idx": (I32, (columns,)),
    }


def sglang_awq(out: int, columns: int, bits: int, group: int) -> Registered:
    assert (columns % group, out % 8) == (0, 0)
    groups = columns // group
    return {
        "qweight": (I32, (columns, out // 8)),
        "qzeros": (I32, (groups, out // 8)),
        "scales": (SCALES, (groups, out)),
    }


def sglang_packed(out: int, columns: int, bits: int, group: int, zeros: bool = False) -> Registered:
    per_word, groups = 32 // bits, columns // group
    found: Registered = {
        "weight_packed": (I32, (out, columns // per_word)),
        "weight_scale": (SCALES, (out, groups)),
        "weight_shape": (torch.int64, (2,)),
    }
    return found | ({"weight_zero_point": (I32, (out // per_word, groups))} if zeros else {})


def sglang_packed_zeros(out: int, columns: int, bits: int, group: int) -> Registered:
    return sglang_packed(out, columns, bits, group, zeros=True)


def sglang_w8a8(out: int, columns: int, bits: int, group: int) -> Registered:
    """Scales are copied into float32."""
    return {"weight": (torch.int8, (out, columns)), "weight_scale": (SCALES, (out, 1))}


def sglang_nvfp4(out: int, columns: int, bits: int, group: int) -> Registered:
    """``weight_global_scale`` has one number for each of the layers that are joined."""
    return {
        "weight_packed": (U8, (out, columns // 2)),
        "weight_scale": (FP8, (out, columns // 16)),
        "weight_global_scale": (FP32, (1,)),
    }


def fp8_tensor(out: int, columns: int, bits: int, group: int) -> Registered:
    """TensorRT-LLM's FP8QDQLinearMethod reshapes both scales to (); SGLang puts one number for each of the joined layers."""
    return {"weight": (FP8, (out, columns)), "weight_scale": (FP32, ()), "input_scale": (FP32, ())}


def fp8_rows(out: int, columns: int, bits: int, group: int) -> Registered:
    """TensorRT-LLM's FP8RowwiseLinearMethod."""
    return {"weight": (FP8, (out, columns)), "weight_scale": (FP32, (out,))}


class Rule(NamedTuple):
    """A format and scheme that a server reads, what it registers, and what its config class asks of the config."""

    format: str
    scheme: str
    registers: Any
    config: dict[str, Any]


GPTQ = {"quant_method": "gptq", "desc_act": False, "lm_head": False, "sym": True}
RULES = (
    *(Rule("gptq", f"w{b}a16-g32", sglang_gptq, GPTQ | {"bits": b, "group_size": 32}) for b in (2, 3, 4, 8)),
    Rule("gptq-v2", "w4a16-asym-g32", sglang_gptq, GPTQ | {"sym": False, "checkpoint_format": "gptq_v2"}),
    Rule("awq", "w4a16-asym-g32", sglang_awq, {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True}),
    *(Rule("compressed-tensors", f"w{b}a16-g32", sglang_packed, {"quant_method": "compressed-tensors"}) for b in (4, 8)),
    Rule("compressed-tensors", "w4a16-asym-g32", sglang_packed_zeros, {"format": "pack-quantized"}),
    Rule("compressed-tensors", "w8a8", sglang_w8a8, {"format": "int-quantized"}),
    Rule("compressed-tensors", "nvfp4", sglang_nvfp4, {"format": "nvfp4-pack-quantized"}),
    Rule(
        "modelopt", "fp8-tensor-static", fp8_tensor, {"quant_method": "modelopt", "quant_algo": "FP8", "kv_cache_scheme": None}
    ),
    Rule("modelopt", "fp8-dynamic", fp8_rows, {"quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"}),
)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: f"{rule.format}-{rule.scheme}")
def test_every_tensor_of_a_layer_is_what_the_loader_registers(rule: Rule, tmp_path: Any) -> None:
    model = FAMILIES["llama"](intermediate_size=128)
    for parameter in model.parameters():  # rotary buffers stay in float32, as where a checkpoint is loaded
        parameter.data = parameter.data.half()
    calibration = quantkit.Calibration(["one two three four five"] * 4, samples=2, length=4)
    output = quantkit.Output(tmp_path / "x", format=rule.format)
    quantkit.quantize(model, rule.scheme, method="rtn", output=output, tokenizer=tiny_tokenizer(), calibration=calibration)
    form = FORMATS.get(rule.format)
    config = form.container.config(tmp_path / "x")["quantization_config"]
    assert {key: config.get(key) for key in rule.config} == rule.config
    with form.container.reader(tmp_path / "x") as reader:
        for name, module in model.named_modules():
            if not isinstance(module, torch.nn.Linear) and hasattr(module, "out_features") and ".layers." in name:
                stored = {
                    key.removeprefix(f"{name}."): (one.dtype, tuple(one.shape))
                    for key, one in reader.headers.items()
                    if key.startswith(f"{name}.")
                }
                stored.pop("bias", None)
                bits = preset(rule.scheme, ()).weight.bits
                assert stored == rule.registers(module.out_features, module.in_features, bits, 32), name


def test_layers_that_servers_join_have_one_second_scale(tmp_path: Any) -> None:
    """TensorRT-LLM's NVFP4LinearMethod asserts it, the others take the largest."""
    quantkit.quantize(
        FAMILIES["llama"](),
        "nvfp4",
        method="rtn",
        output=quantkit.Output(tmp_path / "x", format="modelopt"),
        tokenizer=tiny_tokenizer(),
    )
    with FORMATS.get("modelopt").container.reader(tmp_path / "x") as reader:
        for parent, parts in (("self_attn", "qkv"), ("mlp", ("gate", "up"))):
            seconds = {float(reader.read(f"model.layers.0.{parent}.{part}_proj.weight_scale_2")) for part in parts}
            assert len(seconds) == 1
