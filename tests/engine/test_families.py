"""The engine against transformers' own generate: every tiny family, alone and in batches, dense and paged, with drafts."""

import functools
import logging

import pytest
import torch

from quantkit.engine.drafters.length import DraftCosts, DraftLength
from quantkit.engine.drafters.ngram import NgramDrafter
from quantkit.engine.native import NativeBackend
from quantkit.engine.request import Limits
from quantkit.engine.sampling import Sampling
from quantkit.errors import QuantkitError
from quantkit.generation.engine import Engine
from quantkit.generation.generate import generate
from quantkit.hf import backend as backends
from quantkit.hf.backend import SequentialBackend, make_backend
from quantkit.hf.paged import PagedBackend
from tests.tiny import FAMILIES, VOCAB, build, tiny_llama

LENGTHS = (5, 24, 1, 9, 16, 33, 2, 12)
"""Shorter and longer than the sliding windows (8) and the pages (4, 16) of these tests."""
SEQUENTIAL = {"falcon"}
"""Families whose attention does not go through transformers' registered functions."""


@pytest.fixture(autouse=True)
def free_drafts(monkeypatch):
    """Drafts cost nothing and are always wanted, so what happens hangs neither on the clock nor on how many were right."""
    monkeypatch.setattr(DraftCosts, "curve", lambda self, sequences, longest: [1.0] * (longest + 1))
    monkeypatch.setattr(DraftLength, "choose", lambda self, costs: len(costs) - 1)


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return torch.randint(3, VOCAB, (length,), generator=torch.Generator().manual_seed(100 * length + seed)).tolist()


@functools.cache
def theirs(family: str, length: int, count: int, **options) -> list[int]:
    prompt = torch.tensor([prompt_of(length)])
    options = {"eos_token_id": None, "do_sample": False, **options}
    found = FAMILIES[family]().generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=count, **options)
    return found[0, length:].tolist()


def engine_of(family: str, drafter=None, engine="modules", **limits) -> Engine:
    limits = Limits(**{"kv_tokens": 512, "draft_tokens": 4, **limits})
    return Engine(FAMILIES[family](), limits=limits, drafter=drafter, engine=engine)


LAYOUTS = {"paged": {"page_tokens": 4, "step_tokens": 16}, "dense": {"page_tokens": 128, "kv_tokens": 1024, "step_tokens": 512}}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_equals_transformers_alone_and_in_a_ragged_batch(family, layout):
    engine = engine_of(family, **LAYOUTS[layout])
    assert isinstance(engine.backend, SequentialBackend if family in SEQUENTIAL else PagedBackend)
    for lengths in ((24,), LENGTHS):
        requests = [engine.submit(prompt_of(n), max_new_tokens=12) for n in lengths]
        list(engine.run())
        assert [r.ids for r in requests] == [theirs(family, n, 12) for n in lengths]
    assert engine.scheduler.pages.used == 0
    if layout == "paged" and family not in SEQUENTIAL:
        assert engine.scheduler.pages.hit_tokens >= 20  # the prompt of 24 came twice


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in SEQUENTIAL])
def test_drafts_change_nothing(family):
    model = FAMILIES[family]()
    for drafter in ("ngram", FAMILIES[family](seed=1), model):
        engine = engine_of(family, drafter, page_tokens=4, step_tokens=24)
        requests = [engine.submit(prompt_of(n), max_new_tokens=12) for n in LENGTHS]
        list(engine.run())
        assert [r.ids for r in requests] == [theirs(family, n, 12) for n in LENGTHS]
    assert engine.stats["accepted"] == engine.stats["drafted"] > 20  # the last drafter was the model itself


@pytest.mark.parametrize("vocabulary", [100, 256])
@pytest.mark.parametrize("engine", ["native", "modules"])
def test_a_drafter_may_know_fewer_ids_or_more(vocabulary, engine):
    """Models of one family pad their vocabularies differently; a draft is never an id that the model does not know."""
    model, drafter = FAMILIES["llama"](), tiny_llama(vocab_size=vocabulary)
    with torch.no_grad():
        drafter.lm_head.weight[-1] = 50 * drafter.model.norm.weight  # it would like to say its last word
    prompts = [[3, 50, 7, 9], [4, 190, 5], [60, 61, 62, 63, 64]]
    for sampling in ({}, {"temperature": 1.0, "seed": 6}):
        want = [generate(model, prompt, max_new_tokens=12, engine=engine, **sampling).ids for prompt in prompts]
        found = generate(model, prompts, max_new_tokens=12, engine=engine, drafter=drafter, **sampling)
        assert [one.ids for one in found] == want
        assert sum(one.drafted for one in found) > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_native_equals_transformers_in_a_ragged_batch_with_drafts_and_under_pressure(family):
    for drafter, kv_tokens in ((None, 512), ("ngram", 512), (FAMILIES[family](), 512), (None, 128)):
        engine = engine_of(family, drafter, "native", kv_tokens=kv_tokens, step_tokens=16, running=4)
        assert isinstance(engine.backend, NativeBackend)
        requests = [engine.submit(prompt_of(n), max_new_tokens=12) for n in LENGTHS]
        list(engine.run())
        assert [r.ids for r in requests] == [theirs(family, n, 12) for n in LENGTHS]
        assert engine.scheduler.pages.used == 0


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt_oss", "falcon"])
def test_under_memory_pressure_nothing_changes(family):
    engine = engine_of(family, kv_tokens=64, page_tokens=4, step_tokens=8, running=4)
    requests = [engine.submit(prompt_of(n), max_new_tokens=20) for n in LENGTHS]
    list(engine.run())
    assert [r.ids for r in requests] == [theirs(family, n, 20) for n in LENGTHS]
    assert engine.scheduler.preemptions > 0


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_repetition_penalty_and_end_tokens_equal_transformers(family):
    free = theirs(family, 12, 24, repetition_penalty=1.3)
    ends = (free[9], free[4])
    want = theirs(family, 12, 24, repetition_penalty=1.3, eos_token_id=ends)
    for drafter in (None, "ngram"):
        engine = engine_of(family, drafter)
        sampling = Sampling(repetition_penalty=1.3)
        requests = [
            engine.submit(prompt_of(12), max_new_tokens=24, sampling=sampling, stop_tokens=stops) for stops in ((), ends)
        ]
        list(engine.run())
        assert requests[0].ids == free
        assert (requests[1].ids, requests[1].finish_reason) == (want, "stop")


def test_sampling_is_the_same_alone_in_a_batch_and_with_drafts():
    model, prompts = tiny_llama(), [prompt_of(n) for n in LENGTHS]
    options = {"temperature": 0.8, "top_k": 30, "top_p": 0.95, "seed": 7, "max_new_tokens": 20, "repetition_penalty": 1.1}
    alone = [generate(model, prompt, **options).ids for prompt in prompts]
    assert [one.ids for one in generate(model, prompts, **options)] == alone
    drafted = generate(model, prompts, **options, drafter=tiny_llama())
    assert [one.ids for one in drafted] == alone
    whole = [one for one in drafted if one.finish_reason == "length"]  # what lies behind an end of the answer is not looked at
    assert sum(one.accepted for one in whole) == sum(one.drafted for one in whole) > 20  # the same noise, the same choice


def test_a_drafter_that_is_nearly_right_is_nearly_always_right():
    model, near = tiny_llama(), tiny_llama()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in near.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.001)
    done = generate(model, [prompt_of(n) for n in LENGTHS], drafter=near, temperature=1.0, seed=3, max_new_tokens=40)
    drafted, accepted = sum(one.drafted for one in done), sum(one.accepted for one in done)
    assert drafted > 100
    assert accepted / drafted > 0.8


@pytest.mark.parametrize("drafter", ["ngram", "model"])
def test_the_distribution_is_the_models_whatever_the_drafter_says(drafter):
    """Chi-square over the second and third token of many answers, against probabilities worked out by forward passes."""
    model = build("llama", vocab_size=6, num_hidden_layers=1, eos_token_id=5)
    other = build("llama", vocab_size=6, num_hidden_layers=1, eos_token_id=5, seed=4)
    prompt, draws = [1, 2, 1, 2, 1, 2, 1], 3000
    engine = Engine(
        model, limits=Limits(running=64, kv_tokens=64 * 16), drafter=other if drafter == "model" else NgramDrafter(3, 1)
    )
    requests = [engine.submit(prompt, max_new_tokens=3, sampling=Sampling(1.0, seed=i)) for i in range(draws)]
    list(engine.run())
    assert engine.stats["drafted"] > draws / 6
    assert 0 < engine.stats["accepted"] < engine.stats["drafted"]
    with torch.no_grad():
        first = model(torch.tensor([prompt])).logits[0, -1].softmax(-1)
        pairs = torch.tensor([[*prompt, a, b] for a in range(6) for b in range(6)])
        later = model(pairs).logits.softmax(-1)
    expected = torch.zeros(6, 6, 6)
    for i, (a, b) in enumerate((a, b) for a in range(6) for b in range(6)):
        expected[a, b] = first[a] * later[i, -2, b] * later[i, -1]
    observed = torch.zeros(6, 6, 6)
    for request in requests:
        observed[tuple(request.ids)] += 1
    expected, observed = expected.flatten() * draws, observed.flatten()
    common = expected >= 5
    cells = (
        torch.cat([expected[common], expected[~common].sum()[None]]),
        torch.cat([observed[common], observed[~common].sum()[None]]),
    )
    chi_square, free = float(((cells[1] - cells[0]) ** 2 / cells[0]).sum()), int(common.sum())
    assert chi_square < free + 4 * (2 * free) ** 0.5  # mean + 4 standard deviations of chi-square with so many degrees


def test_what_cannot_run_on_pages_says_so_once_and_is_counted(caplog):
    model = build("mamba", num_key_value_heads=None, head_dim=None, max_position_embeddings=None, state_size=8)
    backends.FALLBACKS.clear()
    with caplog.at_level(logging.WARNING, logger="quantkit"):
        for _ in range(2):
            backend = make_backend(model, engine="modules")
    assert isinstance(backend, SequentialBackend)
    (paged,) = backends.FALLBACKS
    assert backends.FALLBACKS[paged] == 2
    assert paged.startswith("MambaForCausalLM: it ")
    assert len([r for r in caplog.records if r.name == "quantkit.hf.backend"]) == 1
    with pytest.raises(QuantkitError, match="needs paged keys and values, but MambaForCausalLM"):
        make_backend(model, "int8", engine="modules")
    for engine, why in (("modules", "one after another|it "), ("native", "state that cannot go back")):
        with pytest.raises(QuantkitError, match=f"drafts cannot be verified: .*({why})"):
            generate(model, [1, 2], drafter="ngram", engine=engine)


LATENT = {"head_dim": None, "num_key_value_heads": 4, "kv_lora_rank": 16, "q_lora_rank": 24, "qk_rope_head_dim": 8}
LATENT |= {"qk_nope_head_dim": 16, "v_head_dim": 16, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1}
LATENT |= {"moe_intermediate_size": 32, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
LINEAR = {"num_local_experts": 4, "num_experts_per_tok": 2, "layer_types": ["linear_attention", "full_attention"]}


@pytest.mark.parametrize(("family", "options"), [("deepseek_v3", LATENT), ("minimax", LINEAR)])
def test_latent_and_linear_attention_say_the_same_on_every_engine(family, options):
    model, prompt = build(family, **options), prompt_of(9)
    given = torch.tensor([prompt])
    told = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    want = model.generate(given, attention_mask=torch.ones_like(given), **told)[0, 9:].tolist()
    for engine in ("modules", "native"):
        running = Engine(model, limits=Limits(running=2, kv_tokens=256), engine=engine)
        assert running.backend.engine.startswith(engine)
        requests = [running.submit(ids, max_new_tokens=8) for ids in (prompt, prompt_of(3))]
        list(running.run())
        assert requests[0].ids == want


def test_frequencies_that_depend_on_the_length_stay_off_pages():
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 8, "long_factor": [6.0] * 8}
    rope |= {"original_max_position_embeddings": 12, "factor": 4.0}
    model = build("phi3", head_dim=None, rope_parameters=rope, original_max_position_embeddings=12)
    assert "longrope" in str(make_backend(model).notice)
    prompts = [prompt_of(6), prompt_of(14)]
    together = generate(model, prompts, max_new_tokens=10)
    assert [one.ids for one in together] == [generate(model, p, max_new_tokens=10).ids for p in prompts]


def test_a_model_whose_layers_remember_more_is_found_out():
    class Counting(torch.nn.Module):
        """Adds what it saw in this call: right for one plain forward, wrong for anything in pieces."""

        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, hidden):
            return self.inner(hidden) + hidden.cumsum(1) * 0.1

    model = tiny_llama()
    model.model.layers[1].mlp = Counting(model.model.layers[1].mlp)
    assert "differ from a plain forward" in str(make_backend(model, engine="modules").notice)


def test_the_model_is_left_as_it_was():
    model = tiny_llama()
    before = model.config._attn_implementation
    prompt = torch.tensor([prompt_of(9)])
    want = model(prompt).logits
    engine = Engine(model, limits=Limits(kv_tokens=64), engine="modules")
    engine.submit(prompt_of(9), max_new_tokens=3)
    calls = []

    def interrupt(module, args):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt

    hook = model.model.layers[1].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        list(engine.run())
    hook.remove()
    assert model.config._attn_implementation == before
    assert torch.equal(model(prompt).logits, want)
    list(engine.run())
    model(prompt, labels=prompt).loss.backward()
    assert model.lm_head.weight.grad.abs().sum() > 0
