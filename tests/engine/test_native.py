"""The native step: transformers' own greedy tokens, when it is chosen, and that it notices a model that changed."""

import logging

import pytest
import torch
from transformers import PreTrainedModel

from quantkit.engine.engine import generate_ids
from quantkit.engine.native import NativeStep, quantize_head
from quantkit.engine.sampling import Sampling
from quantkit.errors import QuantkitError
from quantkit.evaluation import compare_latency
from quantkit.generation import generate
from quantkit.hf import step as chooser
from quantkit.hf.cache import TransformersStep
from quantkit.hf.step import describe_engine, native_decoder, open_step
from tests.tiny import FAMILIES, VOCAB, build, tiny_llama

CLAIMED = [name for name in FAMILIES if name not in ("gpt2", "gpt_neox", "opt", "falcon", "gpt_oss")]


def prompt_of(length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, VOCAB, (length,), generator=torch.Generator().manual_seed(seed))


def theirs(model: PreTrainedModel, prompt: torch.Tensor, count: int, **options) -> list[int]:
    options = {"eos_token_id": None, "do_sample": False, **options}
    sequence = model.generate(prompt[None], attention_mask=torch.ones_like(prompt[None]), max_new_tokens=count, **options)
    return sequence[0, len(prompt) :].tolist()


@pytest.mark.parametrize("length", [5, 40])  # shorter and longer than the sliding windows (8) of those that have one
@pytest.mark.parametrize("family", CLAIMED)
def test_greedy_equals_transformers(family, length):
    model, prompt = FAMILIES[family](), prompt_of(length)
    step = open_step(model, "native")
    assert isinstance(step, NativeStep)
    assert generate_ids(step, prompt, max_new_tokens=12).ids == theirs(model, prompt, 12)
    varied = generate_ids(step, prompt, max_new_tokens=16, sampling=Sampling(repetition_penalty=4.0)).ids
    assert varied == theirs(model, prompt, 16, repetition_penalty=4.0)
    assert len(set(varied)) > 4  # without the penalty some of these random models only repeat themselves


def test_a_prompt_longer_than_one_call_and_the_fast_way_to_the_greedy_token():
    model = tiny_llama(max_position_embeddings=2048)
    prompt, step = prompt_of(1100), open_step(model, "native")
    with torch.inference_mode():
        want = model(prompt[None]).logits[:, -1]
    whole = step(prompt[None], 0)
    torch.testing.assert_close(whole, want, atol=2e-5, rtol=1e-4)
    step.reset()
    pieces = [step(prompt[None, start : start + 100], start) for start in range(0, 1100, 100)]
    assert torch.equal(pieces[-1], whole)
    step.reset()
    assert step.most_likely(prompt[None], 0) == int(whole.argmax())
    assert step.kv_bytes >= 1100 * 2 * 2 * 2 * 16 * 4  # tokens, layers, keys and values, heads, channels, bytes


def test_longrope_switches_as_transformers_does():
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 8,
        "long_factor": [6.0] * 8,
        "original_max_position_embeddings": 12,
        "factor": 4.0,
    }
    model = build("phi3", head_dim=None, rope_parameters=rope, original_max_position_embeddings=12)
    prompt, step, other = prompt_of(16), open_step(model, "native"), open_step(model, "native")
    lengths = (10, 11, 12, 13, 14, 16)
    with torch.inference_mode():
        want = torch.cat([model(prompt[None, :b], use_cache=False).logits[:, -1] for b in lengths])
    for _ in range(2):  # after the long tables the short ones come back
        got, start = [], 0
        for end in lengths:
            got.append(step(prompt[None, start:end], start))
            start = end
            torch.testing.assert_close(other(prompt[None, :3], 0), model(prompt[None, :3]).logits[:, -1])  # of one decoder
            other.reset()
        torch.testing.assert_close(torch.cat(got), want, atol=2e-5, rtol=1e-4)
        step.reset()


def test_misuse_is_named():
    step = open_step(tiny_llama(), "native")
    step(prompt_of(4)[None], 0)
    with pytest.raises(QuantkitError, match="position 0, but 4 tokens have been read"):
        step(prompt_of(4)[None], 0)
    with pytest.raises(QuantkitError, match=r"want \(1, T\)"):
        step(prompt_of(4).view(2, 2), 4)
    for options in ({"engine": "fast"}, {"activations": "int4"}, {"head": "int4"}):
        with pytest.raises(QuantkitError, match="want one of"):
            open_step(tiny_llama(), **options)
    with pytest.raises(QuantkitError, match="only the native engine"):
        open_step(tiny_llama(), "modules", activations="int8")


def test_a_model_without_a_program_says_so_once_and_is_counted(caplog, monkeypatch):
    monkeypatch.setattr(chooser, "FALLBACKS", type(chooser.FALLBACKS)())
    model = FAMILIES["gpt2"]()
    with caplog.at_level(logging.WARNING, logger="quantkit"):
        for _ in range(3):
            assert isinstance(open_step(model), TransformersStep)
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 1
    assert "learned positions" in said[0]
    assert list(chooser.FALLBACKS.values()) == [3]
    with pytest.raises(QuantkitError, match=r"cannot run natively.*learned positions.*engine='modules'"):
        open_step(model, "native")
    assert describe_engine(model).startswith("modules: ")
    assert describe_engine(tiny_llama()) == "native: 2 layers in one call per step"


def test_hooks_are_not_bypassed():
    model, seen = tiny_llama(), []
    handle = model.model.layers[0].mlp.register_forward_hook(lambda module, args, output: seen.append(1))
    assert isinstance(open_step(model), TransformersStep)
    handle.remove()


def test_a_decoder_is_kept_until_the_model_changes():
    model, prompt = tiny_llama(), prompt_of(8)
    decoder = native_decoder(model)
    assert native_decoder(model) is decoder
    before = open_step(model)(prompt[None], 0)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(2.0)  # written to
    changed = open_step(model)(prompt[None], 0)
    assert not torch.equal(changed, before)
    torch.testing.assert_close(changed, TransformersStep(model)(prompt[None], 0), atol=2e-5, rtol=1e-4)
    model.model.norm.weight = torch.nn.Parameter(model.model.norm.weight * 3.0)  # replaced
    torch.testing.assert_close(
        open_step(model)(prompt[None], 0), TransformersStep(model)(prompt[None], 0), atol=2e-5, rtol=1e-4
    )


def test_generate_and_bench_use_it_and_say_so():
    model, prompt = tiny_llama(), prompt_of(6)
    want = theirs(model, prompt, 8)
    for engine in ("auto", "native", "modules"):
        assert generate(model, prompt, max_new_tokens=8, stop=(), engine=engine).ids[:8] == cut(want, model)
    found = compare_latency({"a": model}, context=8, new_tokens=2, rounds=1)
    assert found["a"].engine == "native"
    assert compare_latency({"a": model}, context=8, new_tokens=2, rounds=1, engine="modules")["a"].engine == "modules"
    rounded = compare_latency({"a": model}, context=8, new_tokens=2, rounds=1, activations="int8")
    assert rounded["a"].engine == "native, int8 activations"


def test_a_head_can_be_rounded_on_the_way():
    model, prompt = FAMILIES["llama_tied"](), prompt_of(30)
    exact, rounded = open_step(model), open_step(model, head="int8")
    assert rounded.engine == "native, int8 g64 head"
    want, got = exact(prompt[None], 0), rounded(prompt[None], 0)
    assert 0 < (got - want).abs().max() < 0.02 * want.abs().max()
    assert type(model.lm_head) is torch.nn.Linear  # in the native copy alone
    kept = quantize_head(rounded.decoder.program)
    assert kept is rounded.decoder.program
    with pytest.raises(QuantkitError, match="no multiple of 64"):
        open_step(tiny_llama(hidden_size=96), head="int8")


def test_keys_and_values_are_stored_as_the_models():
    assert open_step(tiny_llama())._kv.dtype == "float32"
    assert open_step(tiny_llama().to(torch.bfloat16))._kv.dtype == "bfloat16"
    assert open_step(tiny_llama().to(torch.float16))._kv.dtype == "float32"
    assert open_step(tiny_llama(), kv="int8")._kv.dtype == "int8"


def cut(ids: list[int], model: PreTrainedModel) -> list[int]:
    """What is left where the end-of-sequence token ends a generation."""
    end = model.config.eos_token_id
    return ids[: ids.index(end) + 1] if end in ids else ids
