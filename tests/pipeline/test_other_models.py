"""Models in memory that are not what their config describes, or not in memory at all: refused before any work."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import quantkit
from quantkit.errors import FormatError, QuantkitError
from tests.tiny import tiny_llama, tiny_tokenizer


def layer(model: Any, index: int = 0) -> Any:
    return model.model.layers[index]


def bias(model: Any) -> None:
    layer(model).mlp.down_proj.bias = nn.Parameter(torch.full((64,), 1e-3))


def head_bias(model: Any) -> None:
    model.lm_head.bias = nn.Parameter(torch.full((192,), 1e-3))


def one_layer_less(model: Any) -> None:
    model.model.layers = model.model.layers[:1]


def one_layer_more(model: Any) -> None:
    model.model.layers.append(copy.deepcopy(layer(model)))


def longer_embedding(model: Any) -> None:
    model.resize_token_embeddings(200)
    model.config.vocab_size = 192


def narrower_mlp(model: Any) -> None:
    mlp = layer(model, 1).mlp
    mlp.gate_proj, mlp.up_proj, mlp.down_proj = (nn.Linear(64, 64, bias=False) for _ in range(3))


def no_norm(model: Any) -> None:
    layer(model).input_layernorm = nn.Identity()


def shared_bias(model: Any) -> None:
    layer(model).mlp.down_proj.bias = layer(model, 1).mlp.down_proj.bias = nn.Parameter(torch.full((64,), 1e-3))


CHANGES: dict[Callable[[Any], None], str] = {
    bias: r"layers\.0\.mlp\.down_proj\.bias \(64,\) is in this model only; correct the config",
    head_bias: r"lm_head\.bias \(192,\) is in this model only;",
    one_layer_less: r"layers\.1\.\S+ \(64,\) is missing \(and 8 more\);",
    one_layer_more: r"layers\.2\.\S+ \(64,\) is in this model only \(and 8 more\);",
    longer_embedding: r"lm_head\.weight is \(200, 64\) in this model, want \(192, 64\) \(and 1 more\);",
    narrower_mlp: r"layers\.1\.mlp\.down_proj\.weight is \(64, 64\) in this model, want \(64, 96\) \(and 2 more\);",
    no_norm: r"layers\.0\.input_layernorm\.weight \(64,\) is missing;",
    shared_bias: r"down_proj\.bias \(64,\) is in this model only \(and 1 more\);",
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("format", ["native", "compressed-tensors"])
def test_what_a_checkpoint_has_no_place_for_is_refused_before_work(
    tmp_path: Path, change: Callable[[Any], None], format: str
) -> None:
    model, events = tiny_llama(), list[Any]()
    change(model)
    with pytest.raises(FormatError, match=f"not the LlamaForCausalLM that its config describes: .*{CHANGES[change]}"):
        quantkit.quantize(
            model,
            "w8a16-g32",
            method="rtn",
            tokenizer=tiny_tokenizer(),
            output=quantkit.Output(path=tmp_path / "out", format=format),
            run=quantkit.Run(progress=events.append),
        )
    assert not events
    assert not list(tmp_path.rglob("*.safetensors"))


def test_what_is_added_after_quantizing_is_not_lost_either(tmp_path: Path) -> None:
    model = tiny_llama()
    quantkit.quantize(model, "w8a16-g32", method="rtn", tokenizer=tiny_tokenizer())
    head_bias(model)
    with pytest.raises(FormatError, match=CHANGES[head_bias]):
        quantkit.save(model, tmp_path / "out")
    assert not list(tmp_path.rglob("*.safetensors"))


def test_an_embedding_that_the_config_knows_of_is_written(tmp_path: Path) -> None:
    model, ids = tiny_llama(), torch.arange(4, 28).view(1, -1)
    model.resize_token_embeddings(200)
    want = model(ids).logits.detach()
    quantkit.quantize(model, "w8a16-g32", method="rtn", tokenizer=tiny_tokenizer(), out=tmp_path / "out")
    got = quantkit.load(tmp_path / "out")(ids).logits
    assert got.shape[-1] == 200
    assert float((got - want).abs().max()) < 0.05 * float(want.abs().max())


@pytest.mark.parametrize("all_of_them", [False, True])
@pytest.mark.parametrize("out", [None, "out"])
def test_weights_that_are_not_in_memory_are_refused(tmp_path: Path, all_of_them: bool, out: str | None) -> None:
    model = tiny_llama()
    if all_of_them:
        model.to("meta")
    else:
        layer(model, 1).mlp.up_proj.weight = nn.Parameter(layer(model, 1).mlp.up_proj.weight.to("meta"))
    with pytest.raises(
        QuantkitError, match=r"weight is on the meta device and holds no numbers: the model is empty or offloaded"
    ):
        quantkit.quantize(model, "w8a16", method="rtn", tokenizer=tiny_tokenizer(), out=out and tmp_path / out)
