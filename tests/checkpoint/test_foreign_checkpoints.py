"""Whole checkpoints as other programs leave them: opened, run, and told apart."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import quantkit
from quantkit import Output
from quantkit.checkpoint.read import open_checkpoint
from quantkit.errors import FormatError, SpecError
from tests.tiny import FAMILIES, TEXT, tiny_llama, tiny_tokenizer

IDS = torch.arange(3, 23)[None]


def made(path: Path, scheme: Any, format: str, family: str = "llama") -> Path:
    quantkit.quantize(FAMILIES[family](), scheme, method="rtn", output=Output(path, format=format))
    return path


def edit(path: Path, tensors: dict[str, torch.Tensor] | None = None, **config: Any) -> None:
    """Replace tensors, and keys of ``quantization_config``; None takes a key away."""
    if tensors is not None:
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    values = json.loads((path / "config.json").read_text())
    kept = {**values["quantization_config"], **config}
    values["quantization_config"] = {key: value for key, value in kept.items() if value is not None}
    (path / "config.json").write_text(json.dumps(values))


@torch.no_grad()
def by_hand(path: Path) -> torch.Tensor:
    """Return the logits of a float model with the weights that a checkpoint's codes stand for."""
    model = tiny_llama()
    with open_checkpoint(path) as opened:
        for name in opened.schemes:
            model.get_submodule(name).weight.copy_(opened.qtensor(opened.contents.sites[name]).dequantize())
    found: torch.Tensor = model(input_ids=IDS).logits
    return found


@torch.no_grad()
def loaded(path: Path) -> torch.Tensor:
    found: torch.Tensor = quantkit.load(path)(input_ids=IDS).logits
    return found


@pytest.mark.parametrize("scheme", ["w4a16-asym-g32", "w3a16-g32"])
def test_act_order_checkpoints_run(tmp_path: Path, scheme: str) -> None:
    path = made(tmp_path / "m", scheme, "gptq-v2")
    tensors = load_file(path / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith("g_idx"):
            tensors[name] = tensor[torch.randperm(len(tensor))].contiguous()
    with pytest.raises(FormatError, match="desc_act is false"):
        edit(path, tensors)
        loaded(path)
    edit(path, desc_act=True)
    with open_checkpoint(path) as opened:
        assert {scheme.weight.block for scheme in opened.schemes.values()} == {(1, 1)}
    assert torch.allclose(loaded(path), by_hand(path), atol=1e-4)


def test_the_file_beside_config_json_is_enough(tmp_path: Path) -> None:
    for format, scheme in (("gptq", "w4a16-g32"), ("modelopt", "nvfp4"), ("mlx", "w4a16-g32")):
        path = made(tmp_path / format, scheme, format)
        want = loaded(path)
        config = json.loads((path / "config.json").read_text())
        del config["quantization_config"]
        (path / "config.json").write_text(json.dumps(config))
        assert torch.equal(loaded(path), want)
        opened, _ = quantkit.open_model(path)
        assert any(type(module).__name__ == "QuantLinear" for module in opened.modules())


def test_biases_of_zeros_that_the_model_does_not_have_are_passed_over_and_others_are_not(tmp_path: Path) -> None:
    path = made(tmp_path / "m", "w4a16-g32", "gptq")
    tensors, want = load_file(path / "model.safetensors"), loaded(path)
    for name in [name for name in tensors if name.endswith("qweight")]:
        tensors[name.replace("qweight", "bias")] = torch.zeros(tensors[name].shape[1], dtype=torch.float16)
    edit(path, tensors)
    assert torch.equal(loaded(path), want)
    tensors["model.layers.0.mlp.up_proj.bias"][3] = 0.5
    edit(path, tensors)
    with pytest.raises(FormatError, match=r"does not account for: model\.layers\.0\.mlp\.up_proj\.bias"):
        loaded(path)


def test_a_mixed_plan_with_a_head_comes_back_from_its_rules(tmp_path: Path) -> None:
    rules = [
        quantkit.Rule("*.mlp.*", scheme="w8a16-g32"),
        quantkit.Rule("*.layers.1.mlp.*", skip=True),
        quantkit.Rule("head", scheme="w8a16-g32"),
    ]
    plan = quantkit.plan(FAMILIES["llama"](), "w4a16-g32", rules=rules)
    for format in ("gptq", "mlx", "native"):
        quantkit.quantize(FAMILIES["llama"](), plan, method="rtn", output=Output(tmp_path / format, format=format))
    for format in ("gptq", "mlx"):
        assert torch.equal(loaded(tmp_path / format), loaded(tmp_path / "native"))
        with open_checkpoint(tmp_path / format) as opened:
            assert opened.schemes == plan.plan
    config = json.loads((tmp_path / "gptq" / "quantize_config.json").read_text())
    assert config["lm_head"]
    assert (config["bits"], config["desc_act"], config["checkpoint_format"]) == (4, False, "gptq")
    assert {key[:2] for key in config["dynamic"]} == {"+:", "-:"}
    with pytest.raises(SpecError, match="one grid for all layers"):
        asym = quantkit.plan(FAMILIES["llama"](), "w4a16-asym-g32", rules=[quantkit.Rule("*.mlp.*", scheme="w4a16-asym-g16")])
        quantkit.quantize(FAMILIES["llama"](), asym, method="rtn", output=Output(tmp_path / "awq", format="awq"))


def test_static_fp8_goes_to_modelopt_with_float32_scales(tmp_path: Path) -> None:
    output = Output(tmp_path / "m", format="modelopt")
    texts = quantkit.Calibration(data=[TEXT], samples=2, length=32)
    result = quantkit.quantize(
        FAMILIES["llama"](), "fp8-tensor-static", method="rtn", calibration=texts, tokenizer=tiny_tokenizer(), output=output
    )
    assert {scheme.weight.scale_dtype for scheme in result.plan.values()} == {"float32"}
    config = json.loads((tmp_path / "m" / "hf_quant_config.json").read_text())
    assert config["quantization"]["quant_algo"] == "FP8"
    assert config["quantization"]["exclude_modules"] == ["lm_head"]
    with torch.no_grad():
        assert torch.allclose(loaded(tmp_path / "m"), result.model(input_ids=IDS).logits, atol=1e-4)


def test_routers_stay_in_float_and_are_named(tmp_path: Path) -> None:
    path = made(tmp_path / "m", "nvfp4", "modelopt", family="qwen3_moe")
    excluded = json.loads((path / "hf_quant_config.json").read_text())["quantization"]["exclude_modules"]
    assert {"lm_head", "model.layers.0.mlp.gate", "model.layers.1.mlp.gate"} <= set(excluded)
    path = made(tmp_path / "g", "w4a16-g32", "gptq", family="qwen3_moe")
    dynamic = json.loads((path / "config.json").read_text())["quantization_config"]["dynamic"]
    assert dynamic == {r"-:^model\.layers\.\d+\.mlp\.gate$": {}}
