"""Checkpoints in another format: number for number the same, or refused by name."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

import quantkit
from quantkit import Output, QuantSpec, Scheme, reformat
from quantkit.checkpoint.read import open_checkpoint
from quantkit.checkpoint.regrid import neighbours, regridded
from quantkit.errors import FormatError
from quantkit.formats.base import FORMATS
from tests.qtensors import assert_same, random_qtensor
from tests.tiny import FAMILIES, tiny_tokenizer

WRITTEN = ("awq", "compressed-tensors", "gptq", "gptq-v2", "mlx", "native")
IDS = torch.arange(3, 23)[None]


def made(path: Path, scheme: Any, format: str = "native", family: str = "llama") -> Path:
    output = Output(path, format=format)
    quantkit.quantize(FAMILIES[family](), scheme, method="rtn", output=output, tokenizer=tiny_tokenizer())
    return path


@torch.no_grad()
def logits(path: Path) -> torch.Tensor:
    found: torch.Tensor = quantkit.load(path)(input_ids=IDS).logits
    return found


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_every_pair_of_formats_that_share_a_grid_goes_there_and_back(data: st.DataObject) -> None:
    spec = QuantSpec(
        f"int{data.draw(st.integers(2, 8))}",
        (1, data.draw(st.sampled_from([32, 64, -1]))),
        data.draw(st.booleans()),
        data.draw(st.sampled_from(["float16", "bfloat16", "float32"])),
    )
    there, back = (data.draw(st.sampled_from((*WRITTEN, "onnx", "onnx-int8", "onnx-qdq"))) for _ in range(2))
    shape, scheme = (64, 128), Scheme(spec)
    if FORMATS.get(there).rejects(scheme, shape, "float32") or FORMATS.get(back).rejects(scheme, shape, "float32"):
        return
    qtensor = random_qtensor(spec, shape, data.draw(st.integers(0, 99)))
    for name in (there, back, there):
        codec = FORMATS.get(name).codec(scheme)
        assert_same(codec.decode(codec.encode(qtensor), spec, shape), qtensor)


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_what_is_put_on_another_grid_has_the_same_numbers(data: st.DataObject) -> None:
    spec = QuantSpec("int4", (1, data.draw(st.sampled_from([32, 64, 128, -1]))), data.draw(st.booleans()))
    qtensor = random_qtensor(spec, (8, 256))
    for scheme in neighbours(Scheme(spec), "bfloat16"):
        found = regridded(qtensor, scheme.weight)
        if found is not None:
            assert found.spec == scheme.weight
            assert torch.equal(found.dequantize(), qtensor.dequantize())


@pytest.mark.parametrize("to", WRITTEN)
def test_a_checkpoint_goes_to_every_format_and_back(tmp_path: Path, to: str) -> None:
    source = made(tmp_path / "source", "w4a16-g32")
    result = reformat(source, to, tmp_path / "there")
    assert (result["from"], result["format"], result["rounded"]) == ("native", to, [])
    assert torch.equal(logits(tmp_path / "there"), logits(source))
    reformat(tmp_path / "there", "native", tmp_path / "back")
    assert torch.equal(logits(tmp_path / "back"), logits(source))
    assert (tmp_path / "there" / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    assert json.loads((tmp_path / "there" / "config.json").read_text())["quantkit"]["converted_from"] == "native"
    quantkit.load(tmp_path / "there", verify=True)


def test_zero_points_stay_zero_points(tmp_path: Path) -> None:
    source = made(tmp_path / "source", "w4a16-asym-g32", "awq")
    for to in ("gptq-v2", "mlx", "compressed-tensors", "native"):
        reformat(source, to, tmp_path / to)
        with open_checkpoint(source) as a, open_checkpoint(tmp_path / to) as b:
            for name in a.schemes:
                assert_same(b.qtensor(b.contents.sites[name]), a.qtensor(a.contents.sites[name]))


def even(path: Path) -> Path:
    """Write a checkpoint with zero points that are all the middle code, so that it looks like one without."""
    source = made(path.with_name("symmetric"), "w4a16-g32")
    reformat(source, "awq", path)
    return path


@pytest.mark.parametrize("to", ["mlx", "gptq-v2", "compressed-tensors", "native", "onnx-qdq"])
def test_zero_points_that_are_all_the_middle_go_there_and_back(tmp_path: Path, to: str) -> None:
    source = even(tmp_path / "source")
    reformat(source, to, tmp_path / "there")
    quantkit.load(tmp_path / "there", verify=True)
    assert torch.equal(logits(tmp_path / "there"), logits(source))
    reformat(tmp_path / "there", "awq", tmp_path / "back")
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()


def test_a_model_whose_zero_points_are_all_the_middle_is_quantized_into_mlx(tmp_path: Path) -> None:
    model = FAMILIES["llama"](num_hidden_layers=1)
    with torch.no_grad():
        for parameter in model.model.layers.parameters():
            if parameter.ndim == 2:
                parameter.copy_((torch.arange(parameter.numel()).reshape(parameter.shape) % 16 - 8) * 2.0**-8)
    outputs = [Output(tmp_path / name, format=name) for name in ("native", "mlx")]
    quantkit.quantize(model, "w4a16-asym-g32", method="rtn", output=outputs, tokenizer=tiny_tokenizer())
    with open_checkpoint(tmp_path / "native") as opened:
        found = opened.qtensor(opened.contents.sites["model.layers.0.mlp.up_proj"])
        assert bool((found.parts()["zero_point"] == 8).all())
    quantkit.load(tmp_path / "mlx", verify=True)
    assert torch.equal(logits(tmp_path / "mlx"), logits(tmp_path / "native"))


@pytest.mark.parametrize("family", ["mixtral", "llama_tied", "qwen3_moe"])
def test_float_is_what_the_codes_stand_for(tmp_path: Path, family: str) -> None:
    source = made(tmp_path / "source", "w4a16-asym-g32", family=family)
    reformat(source, "float", tmp_path / "float")
    config = json.loads((tmp_path / "float" / "config.json").read_text())
    assert "quantization_config" not in config
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "float", dtype=torch.float32)
    with torch.no_grad():
        assert torch.allclose(model(input_ids=IDS).logits, logits(source), atol=2e-5)
    opened, _ = quantkit.open_model(tmp_path / "float")
    assert next(opened.parameters()).dtype == torch.float32
    reformat(source, "float", tmp_path / "half", dtype="float16")
    assert (
        AutoModelForCausalLM.from_pretrained(tmp_path / "half").model.layers[0].self_attn.q_proj.weight.dtype == torch.float16
    )


def test_experts_are_converted_one_by_one(tmp_path: Path) -> None:
    source = made(tmp_path / "source", "w4a16-g32", "compressed-tensors", family="qwen3_moe")
    reformat(source, "gptq", tmp_path / "gptq")
    assert torch.equal(logits(tmp_path / "gptq"), logits(source))
    with pytest.raises(FormatError, match="mlx-lm looks for experts as stacks"):
        reformat(source, "mlx", tmp_path / "mlx")
    assert not (tmp_path / "mlx" / "config.json").exists()


def test_mixtral_goes_to_mlx_with_stacks_named_as_mlx_has_them(tmp_path: Path) -> None:
    rule = quantkit.Rule("*layers.0.mlp.experts.down_proj", scheme="w8a16-g32")
    output = Output(tmp_path / "source", format="native")
    model = FAMILIES["mixtral"]()
    quantkit.quantize(model, "w4a16-g32", method="rtn", rules=[rule], output=output, tokenizer=tiny_tokenizer())
    reformat(tmp_path / "source", "mlx", tmp_path / "mlx")
    assert torch.equal(logits(tmp_path / "mlx"), logits(tmp_path / "source"))
    said = json.loads((tmp_path / "mlx" / "config.json").read_text())["quantization"]
    assert said["bits"] == 4
    assert said["model.layers.0.block_sparse_moe.switch_mlp.down_proj"]["bits"] == 8
    grids = {f"m.0.block_sparse_moe.experts.{i}.w1": Scheme(QuantSpec(f"int{bits}", (1, 32))) for i, bits in enumerate((4, 8))}
    assert "stacks the experts of a layer" in str(FORMATS.get("mlx").rejects_plan(grids, ()))


def test_what_a_format_does_not_hold_is_refused_by_name_with_those_that_do(tmp_path: Path) -> None:
    source = made(tmp_path / "source", "w3a16-asym-g32")
    with pytest.raises(FormatError, match=r"format awq: model\.layers\.0.*formats that hold it: .*gptq-v2.*native.*--lossy"):
        reformat(source, "awq", tmp_path / "awq")
    assert not (tmp_path / "awq").exists() or not any((tmp_path / "awq").iterdir())


def test_lossy_says_which_layers_and_how_far(tmp_path: Path) -> None:
    source = made(tmp_path / "source", Scheme(QuantSpec("nf4", (1, 32))))
    with pytest.raises(FormatError, match="nf4"):
        reformat(source, "gptq", tmp_path / "out")
    result = reformat(source, "gptq", tmp_path / "out", lossy=True)
    assert len(result["rounded"]) == result["layers"] == 14
    assert 0 < result["quality"]["kl_mean"] < 1
    record = json.loads((tmp_path / "out" / "config.json").read_text())["quantkit"]
    assert record["rounded_again"] == result["rounded"]
    assert record["quality"]["kl_mean"] == result["quality"]["kl_mean"]
    exact = reformat(made(tmp_path / "plain", "w4a16-g32"), "gptq", tmp_path / "exact", lossy=True)
    assert not exact["rounded"]
    assert "quality" not in exact


def test_a_source_is_never_written_to(tmp_path: Path) -> None:
    source = made(tmp_path / "source", "w4a16-g32")
    (tmp_path / "link").symlink_to(source)
    for target in (source, tmp_path / "link", source / ".." / "source"):
        with pytest.raises(FormatError, match="is the checkpoint that is to be converted"):
            reformat(source, "gptq", target, overwrite=True)
    reformat(source, "gptq", tmp_path / "out")
    assert reformat(source, "gptq", tmp_path / "out")["already_done"]
    with pytest.raises(FormatError, match="already holds a model"):
        reformat(source, "native", tmp_path / "out")
    with pytest.raises(FormatError, match="goes with format float"):
        reformat(source, "gptq", tmp_path / "new", dtype="float16")
    with pytest.raises(FormatError, match="unknown format"):
        reformat(source, "gptq3", tmp_path / "new")
    with pytest.raises(FormatError, match="only read"):
        reformat(source, "bitsandbytes", tmp_path / "new", lossy=True)


def test_a_truncated_source_leaves_nothing_that_loads(tmp_path: Path) -> None:
    source = made(tmp_path / "source", "w4a16-g32", "gptq")
    file = source / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(FormatError, match="not a valid safetensors file"):
        reformat(source, "native", tmp_path / "out")
    shutil.rmtree(tmp_path / "out", ignore_errors=True)


@pytest.mark.parametrize("scheme", ["Q4_0", "Q8_0", "Q4_1", "Q4_K_M"])
def test_blocks_of_a_gguf_file_go_to_grids_and_back(tmp_path: Path, scheme: str) -> None:
    sizes = {"hidden_size": 256, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
    model = FAMILIES["llama"](num_hidden_layers=1, **sizes)
    rules = [quantkit.Rule(match="embedding", skip=True), quantkit.Rule(match="head", skip=True)]
    output = Output(tmp_path / "gguf", format="gguf")
    quantkit.quantize(model, scheme, method="rtn", rules=rules, output=output, tokenizer=tiny_tokenizer())
    if scheme == "Q4_K_M":  # some of its blocks have groups of 16, and scales of float32
        with pytest.raises(FormatError, match=r"Q6_K.*formats that hold it: .*gguf, native"):
            reformat(tmp_path / "gguf", "mlx", tmp_path / "mlx")
    to = {"Q4_1": "mlx", "Q4_K_M": "native"}.get(scheme, "gptq")
    result = reformat(tmp_path / "gguf", to, tmp_path / "there")
    assert (result["from"], result["rounded"], result["layers"]) == ("gguf", [], 7)
    assert torch.allclose(logits(tmp_path / "there"), logits(tmp_path / "gguf"), atol=1e-5)
    if scheme != "Q4_K_M":
        reformat(tmp_path / "there", "gguf", tmp_path / "back")
        assert (tmp_path / "back" / "model.gguf").read_bytes() == (tmp_path / "gguf" / "model.gguf").read_bytes()


def test_lossy_into_gguf_takes_blocks_of_the_same_width(tmp_path: Path) -> None:
    source = made(tmp_path / "source", "w4a16-asym-g32")
    with pytest.raises(FormatError, match="a GGUF file holds blocks"):
        reformat(source, "gguf", tmp_path / "out")
    result = reformat(source, "gguf", tmp_path / "out", lossy=True)
    assert result["rounded"]
    assert {row["describe"] for row in quantkit.inspect(tmp_path / "out")["schemes"]} <= {"Q4_0", "Q4_1"}
