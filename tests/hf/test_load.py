"""Float models from directories and objects, and empty ones from configs."""

import json

import pytest
import torch

from quantkit.errors import QuantkitError
from quantkit.hf.load import empty_model, load_float
from tests.tiny import FAMILIES, tiny_llama, tiny_tokenizer


def test_directory_with_and_without_tokenizer(tmp_path) -> None:
    model = tiny_llama()
    model.save_pretrained(tmp_path)
    loaded, tokenizer = load_float(tmp_path)
    assert tokenizer is None
    assert not loaded.training
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), loaded.state_dict().values(), strict=True))
    tiny_tokenizer().save_pretrained(tmp_path)
    half, tokenizer = load_float(tmp_path, torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert tokenizer is not None
    assert tokenizer.decode(tokenizer("the cat sat")["input_ids"]) == "the cat sat"


def test_a_model_is_returned_as_it_is() -> None:
    model = tiny_llama().train()
    loaded, tokenizer = load_float(model)
    assert loaded is model
    assert not loaded.training
    assert tokenizer is None
    with pytest.raises(QuantkitError, match=r"float32.*bfloat16"):
        load_float(model, torch.bfloat16)


@pytest.mark.parametrize("name", ["nothing/here-at-all", "nothing.gguf"])
def test_missing_sources(name: str, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(QuantkitError, match=r"here-at-all|no such file"):
        load_float(tmp_path / name)


def test_quantized_and_foreign_configs_are_refused(tmp_path) -> None:
    tiny_llama().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(QuantkitError, match="already quantized"):
        load_float(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "no_such_type"}))
    with pytest.raises(QuantkitError, match="no_such_type"):
        load_float(tmp_path)


@pytest.mark.parametrize("family", ["llama_tied", "gemma3", "gpt2", "mixtral"])
def test_empty_model_has_meta_parameters_and_real_buffers(family: str) -> None:
    model = FAMILIES[family]()
    empty = empty_model(model.config)
    assert all(parameter.is_meta for parameter in empty.parameters())
    theirs = dict(model.named_buffers())
    for name, buffer in empty.named_buffers():
        assert torch.equal(buffer, theirs[name]), name
    tied = {name for name, _ in model.named_parameters(remove_duplicate=False)} - {name for name, _ in model.named_parameters()}
    assert tied == {n for n, _ in empty.named_parameters(remove_duplicate=False)} - {n for n, _ in empty.named_parameters()}


def test_architectures_cannot_name_anything_but_a_model() -> None:
    config = tiny_llama().config
    config.architectures = ["pipeline"]
    assert type(empty_model(config)).__name__ == "LlamaForCausalLM"
