"""A head rounded in memory: what it changes, what it leaves, and who sees it."""

import pytest
import torch

from quantkit.checkpoint.open import open_model
from quantkit.errors import SpecError
from quantkit.evaluation import footprint
from quantkit.generation.generate import generate
from quantkit.nn.install import quantize_head
from quantkit.nn.linear import QuantLinear
from tests.tiny import FAMILIES, tiny_llama


def test_a_tied_head_is_parted_from_the_embedding_and_every_engine_runs_it():
    model, ids = FAMILIES["llama_tied"](), torch.arange(3, 40)
    embedding = model.get_input_embeddings().weight.clone()
    with torch.inference_mode():
        want = model(ids[None]).logits
    quantize_head(model)
    assert isinstance(model.lm_head, QuantLinear)
    assert torch.equal(model.get_input_embeddings().weight, embedding)
    assert model.config.tie_word_embeddings is False
    with torch.inference_mode():
        got = model(ids[None]).logits
    assert 0 < (got - want).abs().max() < 0.02 * want.abs().max()
    tokens = [generate(model, ids, max_new_tokens=8, engine=engine).ids for engine in ("native", "modules")]
    assert tokens[0] == tokens[1]
    head = model.lm_head
    quantize_head(model)
    assert model.lm_head is head
    assert footprint(model).quantized_share > 0  # reports show it


def test_a_bias_and_a_model_without_a_fitting_head():
    model = FAMILIES["starcoder2"]()
    model.lm_head.bias = torch.nn.Parameter(torch.randn(model.lm_head.out_features))
    quantize_head(model)
    assert model.lm_head.bias is not None
    with pytest.raises(SpecError, match="the output head is none"):
        quantize_head(tiny_llama().model)
    with pytest.raises(SpecError, match="96"):
        quantize_head(tiny_llama(hidden_size=96))


def test_a_model_can_be_opened_with_one(tiny_quantized, tiny_float):
    for path in (tiny_quantized, tiny_float):
        assert isinstance(open_model(path, head="int8")[0].lm_head, QuantLinear)
        assert type(open_model(path)[0].lm_head) is torch.nn.Linear
    with pytest.raises(SpecError, match="want one of float, int8"):
        open_model(tiny_float, head="int3")
