"""The cached step against transformers' own generate and against uncached forward passes, on every tiny family."""

import functools
import logging

import pytest
import torch
from transformers import PreTrainedModel, T5Config, T5ForConditionalGeneration

from quantkit.errors import QuantkitError
from quantkit.generation.generate import generate
from quantkit.hf.cache import TransformersStep, warn_uncached
from tests.tiny import FAMILIES, VOCAB, build, tiny_llama


def prompt_of(length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, VOCAB, (length,), generator=torch.Generator().manual_seed(seed))


def ours(step: TransformersStep, prompt: torch.Tensor, count: int, chunk: int | None = None) -> list[int]:
    """Greedy tokens after ``prompt``, read ``chunk`` tokens at a time."""
    step.reset()
    for start in range(0, len(prompt), chunk or len(prompt)):
        logits = step(prompt[None, start : start + (chunk or len(prompt))], start)
    found = [int(logits.argmax())]
    while len(found) < count:
        found.append(int(step(torch.tensor([found[-1:]]), len(prompt) + len(found) - 1).argmax()))
    return found


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
    assert ours(step, prompt_of(length), 12) == theirs(model, prompt_of(length), 12)


@pytest.mark.parametrize("family", FAMILIES)
def test_cached_logits_equal_a_full_forward(family):
    model, prompt = FAMILIES[family](), prompt_of(16)
    step = TransformersStep(model)
    pieces = [(0, 10), (10, 11), (11, 12), (12, 15), (15, 16)]
    got = torch.cat([step(prompt[None, a:b], a) for a, b in pieces])
    with torch.inference_mode():
        want = model(prompt[None], use_cache=False).logits[0, [b - 1 for _, b in pieces]]
    torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-4)


def test_two_sequences_do_not_mix():
    model = tiny_llama()
    step, other = TransformersStep(model), TransformersStep(model)
    other(prompt_of(9, seed=1)[None], 0)
    want = theirs(model, prompt_of(6), 8)
    assert ours(step, prompt_of(6), 8) == want
    assert ours(other, prompt_of(6), 8) == want  # reset forgets
    assert ours(step, prompt_of(6), 8, 4) == want


def test_prefill_computes_one_row_of_logits():
    model, shapes = tiny_llama(), []
    step = TransformersStep(model)
    model.lm_head.register_forward_hook(lambda module, args, output: shapes.append(output.shape[1]))
    logits = step(prompt_of(16)[None], 0)
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
    warn_uncached.cache_clear()  # another test may have heard it
    with caplog.at_level(logging.WARNING, logger="quantkit"):
        TransformersStep(model)
        step = TransformersStep(model)
        found = ours(step, prompt_of(9), 8)
    assert step.cached == (model_type != "rwkv")
    said = [record.getMessage() for record in caplog.records if record.name == "quantkit.hf.cache"]
    assert len(said) == (0 if step.cached else 1)
    sequence = prompt_of(9)
    with torch.inference_mode():
        for _ in range(8):
            token = model(sequence[None], use_cache=False).logits[0, -1].argmax()
            sequence = torch.cat([sequence, token[None]])
    assert found == sequence[9:].tolist()


def test_a_hybrid_model_is_told_its_positions():
    """Bamba counts from 0 again at every step unless it is given positions."""
    layers = {"attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_chunk_size": 8}
    model, prompt = build("bamba", **layers), prompt_of(16)
    step = TransformersStep(model)
    assert step.cached
    got = torch.cat([step(prompt[None, a:b], a) for a, b in [(0, 10), (10, 11), (11, 12), (12, 15), (15, 16)]])
    with torch.inference_mode():
        want = model(prompt[None], use_cache=False).logits[0, [9, 10, 11, 14, 15]]
    torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-4)


def altered(change):
    """Return a tiny llama whose logits are ``change(logits, ids, past, position_ids)``; past is the number of cached tokens."""
    model = tiny_llama()
    plain = model.forward

    @functools.wraps(plain)
    def forward(input_ids, position_ids=None, **options):
        cache = next((options[name] for name in ("cache", "past_key_values") if options.get(name) is not None), None)
        past = 0 if cache is None else cache.get_seq_length()
        output = plain(input_ids=input_ids, position_ids=position_ids, **options)
        output.logits = change(output.logits, input_ids, past, position_ids)
        return output

    model.forward = forward
    return model


@pytest.mark.parametrize(
    ("change", "cached"),
    [
        (lambda logits, ids, past, positions: logits * (1 + past), False),  # nothing that is cached is right
        (lambda logits, ids, past, positions: logits * (1 + (past > 0 and ids.shape[1] > 1)), True),  # one at a time is
        (lambda logits, ids, past, positions: logits * (1 + (positions is not None)), True),  # positions do harm
        (lambda logits, ids, past, positions: logits * (1 + (past > 0 and positions is None)), True),  # or their absence
        (lambda logits, ids, past, positions: logits * (1 if past == 0 else float("nan")), False),
    ],
)
def test_steps_equal_full_forwards_or_are_not_taken(change, cached):
    model, prompt = altered(change), prompt_of(14)
    step = TransformersStep(model)
    assert step.cached == cached
    got = torch.cat([step(prompt[None, a:b], a) for a, b in [(0, 9), (9, 10), (10, 13), (13, 14)]])
    with torch.inference_mode():
        want = tiny_llama()(prompt[None], use_cache=False).logits[0, [8, 9, 12, 13]]
    torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-4)


def test_a_model_is_tried_once():
    model, calls = tiny_llama(), []
    TransformersStep(model)
    model.register_forward_hook(lambda *_: calls.append(1))
    TransformersStep(model)
    assert not calls


def test_a_model_that_sees_later_tokens_is_refused():
    model = altered(lambda logits, ids, past, positions: logits + ids.float().mean())
    with pytest.raises(QuantkitError, match=r"LlamaForCausalLM: its logits after a token change by .* cannot continue a text"):
        TransformersStep(model)
    encoder = build("bert", num_key_value_heads=None, head_dim=None)
    with pytest.raises(QuantkitError, match="some encoders want is_decoder=True"):
        generate(encoder, [3, 4, 5], max_new_tokens=2)


def test_misuse_is_named():
    step = TransformersStep(tiny_llama())
    step(prompt_of(4)[None], 0)
    with pytest.raises(QuantkitError, match="position 0: want 4, the number of tokens run so far"):
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
        ours(step, prompt, 8)
    hook.remove()
    assert ours(step, prompt, 8) == theirs(model, prompt, 8)


def test_the_model_can_still_be_trained_afterwards():
    model, prompt = tiny_llama(), prompt_of(6)
    ours(TransformersStep(model), prompt, 3)
    model(prompt[None], labels=prompt[None]).loss.backward()
    assert model.lm_head.weight.grad.abs().sum() > 0


_HYBRID = {"lru_width": 64, "attention_window_size": 8, "num_hidden_layers": 3}
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 1, "mamba_chunk_size": 16}


@pytest.mark.parametrize(
    ("model_type", "config"),
    [
        ("recurrent_gemma", _HYBRID),
        ("bamba", {**_MAMBA, "attn_layer_indices": [1], "head_dim": None}),
        ("falcon_h1", {**_MAMBA, "mamba_d_ssm": 128}),
        ("lfm2", {"layer_types": ["conv", "full_attention"], "conv_L_cache": 3, "head_dim": None}),
        ("llama", {}),
    ],
)
def test_sequences_that_take_turns_do_not_meet(model_type, config):
    model = build(model_type, **config)
    steps, sequences = [TransformersStep(model) for _ in range(3)], [prompt_of(9), prompt_of(4), prompt_of(1)]
    with torch.inference_mode():
        for turn in range(12):
            for index, step in enumerate(steps):
                sequence = sequences[index]
                start = 0 if turn == 0 else len(sequence) - 1
                got = step(sequence[None, start:], start)
                want = model(sequence[None], use_cache=False).logits[:, -1]
                torch.testing.assert_close(got, want, atol=2e-3, rtol=1e-3)
                sequences[index] = torch.cat([sequence, want.argmax(-1)])
