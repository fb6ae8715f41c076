"""The model's own upper half as a drafter: nothing changes but the speed, and nothing of the target's memory is harmed."""

import itertools

import pytest
import torch

from quantkit.engine.backend import Memory, Span
from quantkit.engine.drafters import DraftRequest
from quantkit.engine.drafters.length import DraftCosts
from quantkit.engine.drafters.self_draft import SelfDrafter
from quantkit.engine.request import Limits
from quantkit.engine.sampling import Sampling
from quantkit.errors import QuantkitError
from quantkit.generation.engine import Engine
from quantkit.generation.generate import generate
from quantkit.hf.backend import make_backend
from quantkit.hf.experts import enable_experts
from quantkit.hf.native import native_decoder
from quantkit.kernels.cpu import layout
from quantkit.nn.install import quantize_head
from quantkit.nn.linear import QuantLinear
from quantkit.spec import QuantSpec
from tests.kernels.test_decoder import quantize
from tests.tiny import FAMILIES, VOCAB, build, tiny_llama

LENGTHS = (1, 7, 13, 30, 45)


@pytest.fixture(autouse=True)
def free(monkeypatch):
    """Drafts cost nothing, so what happens does not hang on the clock; the first steps draft already."""
    monkeypatch.setattr(DraftCosts, "curve", lambda self, sequences, longest: [1.0] * (longest + 1))


def prompt_of(length: int) -> list[int]:
    return torch.randint(3, VOCAB, (length,), generator=torch.Generator().manual_seed(length)).tolist()


def int8(family: str = "llama", **options):
    model = quantize(FAMILIES[family](**options), QuantSpec("int8", (1, 32)))
    quantize_head(model, QuantSpec("int8", (1, 32)))
    enable_experts(model)
    return model


@pytest.mark.parametrize(("family", "compute"), [("llama", "exact"), ("gemma3", "int8"), ("mixtral", "exact")])
def test_answers_stay_the_same_alone_in_a_batch_and_under_pressure(family, compute):
    model, prompts = int8(family), [prompt_of(n) for n in LENGTHS]
    samplings = [
        Sampling(),
        Sampling(0.8, seed=1, top_p=0.9),
        Sampling(repetition_penalty=1.2),
        Sampling(),
        Sampling(1.5, seed=2),
    ]
    told = {"max_new_tokens": 14}

    def answers(drafter, kv="float", **limits):
        limits = Limits(**{"kv_tokens": 1024, "step_tokens": 24, **limits})
        engine = Engine(model, limits=limits, drafter=drafter, compute=compute, kv=kv)
        found = [engine.submit(p, sampling=s, **told) for p, s in zip(prompts, samplings, strict=True)]
        list(engine.run())
        assert engine.scheduler.pages.used == 0
        return [request.ids for request in found], engine

    want, _ = answers(None)
    for limits in ({"running": 1}, {"running": 4, "kv_tokens": 128}, {"running": 8, "draft_tokens": 31}):
        got, engine = answers("self", **limits)
        assert got == want
        assert engine.stats["accepted"] > 20
    assert answers("self", "int8")[0] == answers(None, "int8")[0]


def test_no_second_model_is_stored_and_the_modules_still_compute_the_same():
    model, x = int8(), torch.randn(3, 64)
    layers = [module for module in model.modules() if isinstance(module, QuantLinear)]
    before, codes = [layer(x[:, :1].expand(-1, layer.in_features)) for layer in layers], [layer.qtensor for layer in layers]
    sizes = [layer.prepacked().weight.nbytes for layer in layers]
    Engine(model, drafter="self")
    decoder = native_decoder(model)
    for layer, y, qtensor, size in zip(layers, before, codes, sizes, strict=True):
        state = layer.prepacked().weight
        assert (state.kind, state.nbytes) == (layout.PLANES, size)
        assert torch.equal(layer(x[:, :1].expand(-1, layer.in_features)), y)
        assert torch.equal(layer.qtensor.packed, qtensor.packed)
    held = {layer.prepacked().weight.codes.data_ptr() for layer in layers}
    assert held <= {weight.codes.data_ptr() for weight in decoder.weights}
    assert Engine(model, drafter="self").backend.decoder is decoder


def test_drafting_touches_only_what_is_verified_afterwards():
    model = int8()
    backend = make_backend(model)
    drafter = SelfDrafter(backend)
    backend.reserve(Memory(4, 32, 1))
    ids, table = prompt_of(40), [2, 0, 3]
    pages = backend.pages
    for tensor in (*pages.keys, *pages.values):
        tensor.zero_()  # what was never written may be anything, NaN included
    backend.step([Span(0, 0, ids[:-1], table, 0, fresh=True)])
    before = [tensor.clone() for tensor in (*pages.keys, *pages.values)]
    [guess] = drafter.propose([DraftRequest(0, 0, ids, 5, Sampling(), 0, table)])
    assert len(guess) == 5
    written = range(39 - 32, 39 - 32 + 5)  # of page 0: the last known token and four guesses
    for old, new in zip(before, (*pages.keys, *pages.values), strict=True):
        changed = (old != new).nonzero()
        axis = 3 if old.shape[3] == 32 and old.shape[2] != 32 else 2
        assert set(changed[:, 0].tolist()) == {0}
        assert set(changed[:, axis].tolist()) == set(written)
    fresh = make_backend(model)
    fresh.reserve(Memory(4, 32, 1))
    want = fresh.step([Span(0, 0, [*ids, *guess], table, 6, fresh=True)])
    assert torch.equal(backend.step([Span(0, 39, [ids[-1], *guess], table, 6)]), want)


def test_the_distribution_is_the_models():
    """Chi-square over the second and third token of many answers, against probabilities worked out by forward passes."""
    model = quantize(build("llama", vocab_size=6, num_hidden_layers=1, eos_token_id=5), QuantSpec("int8", (1, 32)))
    prompt, draws = [1, 2, 1, 2], 700
    engine = Engine(model, limits=Limits(running=64, kv_tokens=64 * 32), drafter="self")
    samplings = [Sampling(1.0, seed=10_000 + seed) for seed in range(draws)]
    requests = [engine.submit(prompt, max_new_tokens=3, sampling=sampling) for sampling in samplings]
    list(engine.run())
    assert engine.stats["drafted"] > 500
    assert 0.5 < engine.stats["accepted"] / engine.stats["drafted"] < 1
    pairs = list(itertools.product(range(6), repeat=2))
    with torch.no_grad():
        first = model(torch.tensor([prompt])).logits[0, -1].softmax(-1)
        expected = torch.zeros(36)
        for token in range(6):
            second = model(torch.tensor([[*prompt, token]])).logits[0, -1].softmax(-1)
            for i, (b, c) in enumerate(pairs):
                third = model(torch.tensor([[*prompt, token, b]])).logits[0, -1].softmax(-1)
                expected[i] += first[token] * second[b] * third[c] * draws
    seen = torch.tensor([float(sum((r.ids[1], r.ids[2]) == pair for r in requests)) for pair in pairs])
    statistic = ((seen - expected) ** 2 / expected).sum().item()
    assert statistic < 66.6  # 99.9% of 35 degrees of freedom


def test_a_model_that_cannot_draft_for_itself_is_refused():
    with pytest.raises(QuantkitError, match="needs 8-bit integer weights"):
        generate(tiny_llama(), [1, 2], drafter="self")
    with pytest.raises(QuantkitError, match=r"runs on modules.*use drafter='ngram'"):
        generate(int8(), [1, 2], drafter="self", engine="modules")


def test_moving_a_model_drops_its_planes_and_a_new_engine_makes_them_again():
    model, prompt = int8(), prompt_of(9)
    want = generate(model, prompt, max_new_tokens=12).ids
    assert generate(model, prompt, max_new_tokens=12, drafter="self").ids == want
    model.to("cpu", torch.float32)
    layer = model.model.layers[0].self_attn.q_proj
    assert layer.prepacked().weight.kind == layout.U8
    done = generate(model, prompt, max_new_tokens=12, drafter="self")
    assert done.ids == want
    assert done.drafted > 0
    assert layer.prepacked().weight.kind == layout.PLANES
