"""Float models as GGUF files and back: the same numbers, or an error before anything is written."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import quantkit
from quantkit import reformat
from quantkit.errors import FormatError, QuantkitError
from quantkit.formats.gguf.container import FILE
from quantkit.formats.gguf.file import GgufHeader
from tests.tiny import FAMILIES, tiny_tokenizer

IDS = torch.arange(3, 23)[None]


def saved(path: Path, family: str = "llama", dtype: torch.dtype = torch.float32, **config: Any) -> Path:
    model = FAMILIES[family](**config)
    for parameter in model.parameters():  # and not the rotary frequencies
        parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype
    model.save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    found: torch.Tensor = model(input_ids=IDS).logits
    return found


@pytest.mark.parametrize("family", ["llama", "llama_tied", "mixtral", "qwen2", "qwen3", "qwen3_moe"])
def test_a_float_model_is_the_same_in_a_gguf_file(family: str, tmp_path: Path) -> None:
    source = saved(tmp_path / "source", family, torch.bfloat16)
    result = reformat(source, "gguf", tmp_path / "gguf")
    assert (result["from"], result["layers"], result["already_done"]) == ("float", 0, False)
    wanted = logits(quantkit.open_model(source)[0])
    assert torch.equal(logits(quantkit.load(tmp_path / "gguf", verify=True)), wanted)
    stored = GgufHeader(tmp_path / "gguf" / FILE).tensors
    assert {one.type for one in stored.values() if len(one.shape) > 1} <= {"BF16", "F32"}
    assert stored["blk.0.attn_q.weight"].type == "BF16"
    reformat(tmp_path / "gguf", "float", tmp_path / "back")
    assert torch.equal(logits(quantkit.open_model(tmp_path / "back")[0]), wanted)
    assert reformat(source, "gguf", tmp_path / "gguf")["already_done"]
    assert quantkit.inspect(tmp_path / "gguf")["quantized_parameters"] == 0


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("llama", {}),
        ("llama", {"head_dim": 32}),
        ("mistral", {"head_dim": 32, "sliding_window": None}),
        ("qwen2", {}),
        ("qwen3", {"head_dim": 128}),
        ("qwen3", {"head_dim": 32}),
        ("qwen3_moe", {"moe_intermediate_size": 96}),
        ("qwen3_moe", {"moe_intermediate_size": 32, "head_dim": 32}),
    ],
)
def test_a_gguf_file_alone_becomes_a_directory(family: str, config: dict[str, Any], tmp_path: Path) -> None:
    source = saved(tmp_path / "source", family, **config)
    reformat(source, "gguf", tmp_path / "gguf", dtype="float16")
    result = reformat(tmp_path / "gguf" / FILE, "float", tmp_path / "back", dtype="float16")
    assert (result["from"], result["format"]) == ("gguf", "float")
    model, tokenizer = quantkit.open_model(tmp_path / "back")
    assert torch.equal(logits(model), logits(quantkit.open_model(source, "float16")[0]))
    assert tokenizer("a word")["input_ids"] == tiny_tokenizer()("a word")["input_ids"]


def test_what_transformers_cannot_read_of_a_file_is_refused(tmp_path: Path) -> None:
    reformat(saved(tmp_path / "source", "llama_tied"), "gguf", tmp_path / "gguf")
    with pytest.raises(QuantkitError, match="8 of its tensors are unknown to transformers, which would leave them out"):
        reformat(tmp_path / "gguf" / FILE, "float", tmp_path / "back")
    assert not (tmp_path / "back" / "config.json").exists()


def test_blocks_of_a_gguf_file_become_floats(tmp_path: Path) -> None:
    out = quantkit.Output(tmp_path / "blocks", format="gguf")
    result = quantkit.quantize(FAMILIES["llama"](), "Q8_0", method="rtn", output=out, tokenizer=tiny_tokenizer())
    reformat(tmp_path / "blocks" / FILE, "float", tmp_path / "back")
    assert torch.allclose(logits(quantkit.open_model(tmp_path / "back")[0]), logits(result.model), atol=1e-4)


def test_what_has_no_place_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    source = saved(tmp_path / "source")
    with pytest.raises(FormatError, match="a float model, and format gptq holds codes; make some: quantkit quantize"):
        reformat(source, "gptq", tmp_path / "x")
    with pytest.raises(FormatError, match="a GGUF of a gemma2 model is not written"):
        reformat(saved(tmp_path / "gemma", "gemma2"), "gguf", tmp_path / "x")
    model = FAMILIES["llama"]()
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = 1e6
    model.save_pretrained(tmp_path / "large")
    with pytest.raises(FormatError, match=r"up_proj.weight holds NaN or infinity in torch.float16.*use bfloat16"):
        reformat(tmp_path / "large", "gguf", tmp_path / "x", dtype="float16")
    assert not any((tmp_path / "x").glob("*.gguf"))
    reformat(source, "gguf", tmp_path / "gguf")
    with pytest.raises(FormatError, match="holds floats alone, and format native holds codes"):
        reformat(tmp_path / "gguf", "native", tmp_path / "x")


def test_an_edited_source_is_another_conversion(tmp_path: Path) -> None:
    source = saved(tmp_path / "source")
    reformat(source, "gguf", tmp_path / "gguf")
    saved(source, initializer_range=0.5)
    with pytest.raises(FormatError, match="already holds a model"):
        reformat(source, "gguf", tmp_path / "gguf")
    reformat(source, "gguf", tmp_path / "gguf", overwrite=True)
    assert torch.equal(logits(quantkit.load(tmp_path / "gguf")), logits(quantkit.open_model(source)[0]))
