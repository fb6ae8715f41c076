"""The cached step against transformers' own generate and against uncached forward passes, on every tiny family."""

import logging

import pytest
import torch
from transformers import PreTrainedModel, T5Config, T5ForConditionalGeneration

from quantkit.engine.engine import generate_ids
from quantkit.engine.sampling import Sampling
from quantkit.errors import QuantkitError
from quantkit.hf.cache import TransformersStep
from tests.tiny import FAMILIES, VOCAB, build, tiny_llama


def prompt_of(length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, VOCAB, (length,), generator=torch.Generator().manual_seed(seed))


def theirs(model: PreTrainedModel, prompt: torch.Tensor, count: int, **options) -> list[int]:
    options = {"eos_token_id": None, "do_sample": False, **options}
    sequence = model.generate(prompt[None], attention_mask=torch.ones_like(prompt[None]), max_new_tokens=count, **options)
    return sequence[0, len(prompt) :].tolist()


@pytest.mark.parametrize("length", [5, 24])  # shorter and longer than the sliding windows (8) of those that have one
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_equals_transformers(family, length):
    model = FAMILIES[family]()
    step = TransformersStep(model)
    assert step.cached
    assert generate_ids(step, prompt_of(length), max_new_tokens=12).ids == theirs(model, prompt_of(length), 12)
    varied = generate_ids(step, prompt_of(length), max_new_tokens=16, sampling=Sampling(repetition_penalty=4.0)).ids
    assert varied == theirs(model, prompt_of(length), 16, repetition_penalty=4.0)
    assert len(set(varied)) > 4  # without the penalty some of these random models only repeat themselves


@pytest.mark.parametrize("family", FAMILIES)
def test_cached_logits_equal_a_full_forward(family):
    model, prompt = FAMILIES[family](), prompt_of(16)
    step = TransformersStep(model)
    pieces = [(0, 10), (10, 11), (11, 12), (12, 15), (15, 16)]
    got = torch.cat([step(prompt[None, a:b], a) for a, b in pieces])
    with torch.inference_mode():
        want = model(prompt[None], use_cache=False).logits[0, [b - 1 for _, b in pieces]]
    torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_repetition_penalty_and_eos_lists_equal_transformers(family):
    model, prompt = FAMILIES[family](), prompt_of(12)
    free = theirs(model, prompt, 24, repetition_penalty=1.3)
    step = TransformersStep(model)
    sampling = Sampling(repetition_penalty=1.3)
    assert generate_ids(step, prompt, max_new_tokens=24, sampling=sampling).ids == free
    ends = [free[9], free[4]]
    done = generate_ids(step, prompt, max_new_tokens=24, sampling=sampling, stop_tokens=ends)
    assert done.ids == theirs(model, prompt, 24, repetition_penalty=1.3, eos_token_id=ends)
    assert done.finish_reason == "stop"


def test_two_sequences_do_not_mix():
    model = tiny_llama()
    step, other = TransformersStep(model), TransformersStep(model)
    other(prompt_of(9, seed=1)[None], 0)
    want = theirs(model, prompt_of(6), 8)
    assert generate_ids(step, prompt_of(6), max_new_tokens=8).ids == want
    assert generate_ids(other, prompt_of(6), max_new_tokens=8).ids == want  # reset forgets
    assert generate_ids(step, prompt_of(6), max_new_tokens=8, chunk=4).ids == want


def test_prefill_computes_one_row_of_logits():
    model, shapes = tiny_llama(), []
    model.lm_head.register_forward_hook(lambda module, args, output: shapes.append(output.shape[1]))
    logits = TransformersStep(model)(prompt_of(16)[None], 0)
    assert shapes == [1]
    assert logits.untyped_storage().nbytes() == VOCAB * 4


def test_longrope_switch_equals_a_full_forward():
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 8,
        "long_factor": [6.0] * 8,
        "original_max_position_embeddings": 12,
        "factor": 4.0,
    }
    model = build("phi3", head_dim=None, rope_parameters=rope, original_max_position_embeddings=12)
    prompt, step = prompt_of(16), TransformersStep(model)
    got = torch.cat([step(prompt[None, a:b], a) for a, b in [(0, 10), (10, 11), (11, 12), (12, 13), (13, 14), (14, 16)]])
    with torch.inference_mode():
        want = torch.cat([model(prompt[None, :b], use_cache=False).logits[:, -1] for b in (10, 11, 12, 13, 14, 16)])
        stale = model(prompt[None], use_cache=False).logits[0, 11]
    torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-4)
    assert (stale - want[2]).abs().max() > 1e-3  # the two sets of frequencies do differ


@pytest.mark.parametrize(
    ("model_type", "config"),
    [("mamba", {"state_size": 8}), ("bloom", {"n_layer": 2, "n_head": 4}), ("rwkv", {"attention_hidden_size": 64})],
)
def test_other_kinds_of_memory(model_type, config, caplog):
    kept = {"num_key_value_heads": None, "head_dim": None, "max_position_embeddings": None}
    model = build(model_type, **kept, **config)
    with caplog.at_level(logging.WARNING, logger="quantkit"):
        TransformersStep(model)
        step = TransformersStep(model)
        ours = generate_ids(step, prompt_of(9), max_new_tokens=8).ids
    assert step.cached == (model_type != "rwkv")
    said = [record.getMessage() for record in caplog.records if record.name == "quantkit.hf.cache"]
    assert len(said) == (0 if step.cached else 1)
    sequence = prompt_of(9)
    with torch.inference_mode():
        for _ in range(8):
            token = model(sequence[None], use_cache=False).logits[0, -1].argmax()
            sequence = torch.cat([sequence, token[None]])
    assert ours == sequence[9:].tolist()


def test_misuse_is_named():
    step = TransformersStep(tiny_llama())
    step(prompt_of(4)[None], 0)
    with pytest.raises(QuantkitError, match="position 0, but 4 tokens have been read"):
        step(prompt_of(4)[None], 0)
    with pytest.raises(QuantkitError, match=r"want \(1, T\)"):
        step(prompt_of(4).view(2, 2), 4)
    tiny_t5 = T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    with pytest.raises(QuantkitError, match="encoder-decoder"):
        TransformersStep(T5ForConditionalGeneration(tiny_t5))
    with pytest.raises(QuantkitError, match="no logits"):
        TransformersStep(tiny_llama().model)(prompt_of(4)[None], 0)


def test_interrupt_inside_the_model_leaves_it_usable():
    model, prompt = tiny_llama(), prompt_of(6)
    step, calls = TransformersStep(model), []

    def interrupt(module, args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt

    hook = model.model.layers[1].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        generate_ids(step, prompt, max_new_tokens=8)
    hook.remove()
    assert generate_ids(step, prompt, max_new_tokens=8).ids == theirs(model, prompt, 8)


def test_the_model_can_still_be_trained_afterwards():
    model, prompt = tiny_llama(), prompt_of(6)
    generate_ids(TransformersStep(model), prompt, max_new_tokens=3)
    model(prompt[None], labels=prompt[None]).loss.backward()
    assert model.lm_head.weight.grad.abs().sum() > 0
