"""The engine on a device: models of transformers through recorded steps, against the model itself; skipped without one."""

import pytest
import torch

import quantkit
from quantkit.engine.backend import LAST_SAMPLED, Memory, RowSampling, Span
from quantkit.engine.cuda import CudaBackend
from quantkit.engine.engine import TokenEngine
from quantkit.engine.request import Limits
from quantkit.engine.sampling import Sampling
from quantkit.hf.backend import make_backend
from quantkit.hf.experts import enable_experts
from quantkit.hf.lowering.lower import lower
from quantkit.spec import KVScheme, QuantSpec
from tests import tiny
from tests.kernels.test_decoder import quantize, some_ids

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

W4 = QuantSpec("int4", (1, 32), False)
PROMPTS = [some_ids(length, seed) for seed, length in enumerate((5, 45, 1, 17, 33, 70))]


def model_of(family: str, quantized: bool, dtype: torch.dtype = torch.float16):
    model = tiny.FAMILIES[family](head_dim=64)
    enable_experts(model)
    return (quantize(model, W4) if quantized else model).to(dtype).cuda()


def backend_of(model, kv: str | KVScheme = "float") -> CudaBackend:
    backend = make_backend(model, kv, engine="native")
    assert isinstance(backend, CudaBackend)
    return backend


def near(model, prompt: list[int], tokens: list[int]) -> None:
    """Check that every token is one the model itself finds most likely, up to rounding."""
    with torch.inference_mode():
        logits = model(torch.tensor([[*prompt, *tokens[:-1]]], device="cuda")).logits[0, len(prompt) - 1 :].float()
    lost = logits.max(-1).values - logits.gather(1, torch.tensor(tokens, device="cuda")[:, None])[:, 0]
    assert (lost < 0.03 * logits.abs().max()).all()


@pytest.mark.parametrize("family", ["llama", "llama_tied", "qwen3", "gemma2", "gemma3", "smollm3", "mistral"])
def test_float_families(family):
    model = model_of(family, quantized=False)
    lower(model)
    engine = quantkit.Engine(model)
    assert isinstance(engine.backend, CudaBackend)
    requests = [engine.submit(prompt, max_new_tokens=20) for prompt in PROMPTS]
    list(engine.run())
    for prompt, request in zip(PROMPTS, requests, strict=True):
        near(model, prompt, request.ids)


@pytest.mark.parametrize("kv", ["float", "int8", KVScheme(W4, W4)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_quantized_families(family, dtype, kv):
    model = model_of(family, True, dtype)
    engine = quantkit.Engine(model, kv=kv, limits=Limits(running=4, step_tokens=32, kv_tokens=256))
    requests = [engine.submit(prompt, max_new_tokens=40) for prompt in PROMPTS]
    list(engine.run())
    if kv == "float" and dtype == torch.float16:
        for prompt, request in zip(PROMPTS, requests, strict=True):
            near(model, prompt, request.ids)
    assert all(len(request.ids) == 40 for request in requests)


def test_recorded_steps_say_what_unrecorded_ones_say():
    backend = backend_of(model_of("llama", True))
    backend.reserve(Memory(16, 32, 8))
    starts = [(slot, some_ids(20 + slot, slot)) for slot in range(5)]
    backend.step([Span(slot, 0, ids, [2 * slot, 2 * slot + 1], 1) for slot, ids in starts])
    decode = [Span(slot, len(ids), [7 + slot], [2 * slot, 2 * slot + 1], 1) for slot, ids in starts]
    recorded = backend.step(decode)
    assert backend.captured_rows == [8]
    before = [part.clone() for pages in backend.pages for part in pages[:4] if part is not None]
    assert torch.equal(backend.step(decode), recorded)
    after = [part for pages in backend.pages for part in pages[:4] if part is not None]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    unrecorded = CudaBackend.run(backend, backend._recorded[8].inputs)[0]
    assert torch.equal(unrecorded[:5], recorded)


SAMPLINGS = [Sampling(0.9, seed=1), Sampling(1.2, top_k=20, seed=2), Sampling(), Sampling(0.8, top_p=0.9, min_p=0.02, seed=3)]


def answers(model, drafter=None, samplings=SAMPLINGS, **limits) -> list[list[int]]:
    engine = quantkit.Engine(model, drafter=drafter, limits=Limits(**limits), batch_invariant=True)
    requests = [
        engine.submit(prompt, max_new_tokens=40, sampling=sampling)
        for prompt, sampling in zip(PROMPTS[:4], samplings, strict=True)
    ]
    list(engine.run())
    return [request.ids for request in requests]


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
@pytest.mark.parametrize("quantized", [False, True], ids=["float", "int4"])
def test_batch_invariant_answers_are_the_same_alone_together_under_pressure_and_with_drafts(family, quantized):
    model = model_of(family, quantized)
    want = answers(model)
    assert answers(model, running=1) == want
    assert answers(model, running=3, step_tokens=16, kv_tokens=128) == want
    assert answers(model, drafter="ngram") == want
    assert answers(model, drafter=model_of(family, quantized)) == want


def test_steps_run_ahead_of_the_tokens_they_read():
    backend = backend_of(model_of("llama", True))
    launch, unknown = backend.launch, []

    def noted(spans, copies, samplings):
        unknown.append(sum(list(span.ids) == [LAST_SAMPLED] for span in spans))
        return launch(spans, copies, samplings)

    found = []
    for ahead in (True, False):
        backend.launch = noted if ahead else launch
        engine = TokenEngine(backend, tiny.VOCAB)
        engine.launches_ahead = ahead
        requests = [
            engine.submit(prompt, max_new_tokens=40, sampling=sampling)
            for prompt, sampling in zip(PROMPTS[:4], SAMPLINGS, strict=True)
        ]
        list(engine.run())
        found.append([request.ids for request in requests])
    assert found[0] == found[1]
    assert sum(unknown) > 100


def test_a_recorded_step_waits_for_nobody():
    backend = backend_of(model_of("llama", True))
    backend.reserve(Memory(16, 32, 8))
    spans = [[Span(slot, at, [5 + slot], [slot], 1) for slot in range(3)] for at in range(5)]
    backend.step(spans[0])
    backend.launch(spans[0][:1], [], [RowSampling(SAMPLINGS[1], 7)]).tokens()  # pinned memory, once
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = [backend.step(one) for one in spans[1:]]
        launched = [
            backend.launch([Span(0, 5 + at, [LAST_SAMPLED], [0], 1)], [], [RowSampling(SAMPLINGS[1], 7)]) for at in range(4)
        ]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.isfinite(logits).all() for logits in found)
    assert all(0 <= step.tokens()[0] < tiny.VOCAB for step in launched)


def test_what_it_cannot_run_goes_through_modules():
    assert make_backend(tiny.FAMILIES["llama"](head_dim=64).cuda()).engine == "modules"  # float32
    assert make_backend(tiny.FAMILIES["llama"]().half().cuda()).engine == "modules"  # heads of 16
