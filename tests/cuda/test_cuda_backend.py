"""The engine on CUDA's backend: in plain torch against the CPU's, and whole requests through the emulated kernels."""

import contextlib
import logging

import pytest
import torch

import quantkit
from quantkit.engine.backend import LAST_SAMPLED, Copy, Memory, Span
from quantkit.engine.cuda import CudaBackend
from quantkit.engine.engine import TokenEngine
from quantkit.engine.native import NativeBackend
from quantkit.engine.request import Limits, Request
from quantkit.engine.sampling import Sampling
from quantkit.errors import KernelError, QuantkitError
from quantkit.hf import backend as chooser
from quantkit.hf import native
from quantkit.hf.backend import describe_engine, make_backend
from quantkit.hf.experts import enable_experts
from quantkit.hf.lowering.lower import lower
from quantkit.kernels.cpu.decoder import NativeDecoder
from quantkit.kernels.cuda import ops
from quantkit.kernels.cuda.decoder import CudaDecoder
from quantkit.kernels.program import reference
from quantkit.spec import KVScheme, QuantSpec
from tests import tiny
from tests.cuda import emulated
from tests.kernels.test_decoder import quantize, some_ids

W4 = QuantSpec("int4", (1, 32), False)
PROMPTS = [some_ids(length, seed) for seed, length in enumerate((5, 45, 1, 17, 33))]


def programs(family: str):
    model = tiny.FAMILIES[family](head_dim=64)
    enable_experts(model)
    return lower(quantize(model, W4) if "moe" in family else model)


def backend_of(program, kv: str = "float", dtype: torch.dtype = torch.float32) -> CudaBackend:
    return CudaBackend(CudaDecoder(program, device="cpu", dtype=dtype, context_tokens=16), kv=kv, context_tokens=128)


def answers(backend, prompts=PROMPTS, tokens: int = 12, **limits) -> tuple[list[list[int]], TokenEngine]:
    engine = TokenEngine(backend, tiny.VOCAB, limits=Limits(**limits))
    requests = [engine.submit(prompt, max_new_tokens=tokens) for prompt in prompts]
    list(engine.run())
    assert [len(request.ids) for request in requests] == [tokens] * len(prompts)
    return [request.ids for request in requests], engine


@pytest.mark.parametrize("family", ["llama", "llama_tied", "qwen3", "gemma2", "smollm3", "qwen3_moe"])
def test_greedy_equals_the_cpu_engine(family):
    program = programs(family)
    want, _ = answers(NativeBackend(NativeDecoder(program), context_tokens=128))
    got, engine = answers(backend_of(program))
    assert got == want
    assert engine.stats["steps"] < 20  # together, not one after another
    assert engine.backend.captured_rows


def test_preemption_chunks_and_shared_pages_change_nothing():
    program = programs("llama")
    prompts = [*PROMPTS, [*PROMPTS[1][:40], 7, 8, 9]]
    want, _ = answers(backend_of(program), prompts, 60)
    got, engine = answers(backend_of(program), prompts, 60, kv_tokens=160, running=4, step_tokens=20)
    assert engine.scheduler.preemptions > 0
    assert got == want
    again, engine = answers(backend_of(program), [PROMPTS[1], prompts[-1]], 20, running=1)
    assert engine.scheduler.pages.hit_tokens == 40  # a whole page shared, another one copied
    assert again == [want[1][:20], want[5][:20]]


def test_drafts_do_not_change_answers():
    program = programs("llama")
    want, _ = answers(backend_of(program), tokens=30)
    engine = TokenEngine(backend_of(program), tiny.VOCAB)
    engine.use_drafter(quantkit.engine.drafters.DRAFTERS.get("ngram")())
    requests = [engine.submit(prompt, max_new_tokens=30) for prompt in PROMPTS]
    list(engine.run())
    assert [request.ids for request in requests] == want
    backend = backend_of(program)
    backend.RECORDED_ROWS = (1, 2)  # more rows than any recording has
    assert answers(backend, tokens=30)[0] == want


SAMPLINGS = [
    Sampling(0.9, seed=1),
    Sampling(1.2, top_k=20, seed=2),
    Sampling(),
    Sampling(0.8, top_p=0.9, min_p=0.02, seed=3),
    Sampling(1.0, repetition_penalty=1.3, seed=4),
]


def submitted(backend, samplings=SAMPLINGS, **limits) -> tuple[TokenEngine, list[Request]]:
    engine = TokenEngine(backend, tiny.VOCAB, limits=Limits(**limits))
    return engine, [
        engine.submit(p, max_new_tokens=14, sampling=sampling) for p, sampling in zip(PROMPTS, samplings, strict=True)
    ]


def watched(backend: CudaBackend) -> list[int]:
    """Note for every launch how many of its tokens nobody knew."""
    launches, launch = list[int](), backend.launch

    def note(spans, copies, picks):
        launches.append(sum(list(span.ids) == [LAST_SAMPLED] for span in spans))
        return launch(spans, copies, picks)

    backend.launch = note
    return launches


@pytest.mark.parametrize("limits", [{}, {"running": 3}, {"kv_tokens": 128, "step_tokens": 20}], ids=str)
def test_draws_equal_the_cpu_engines(limits):
    program = programs("llama")
    engine, wanted = submitted(NativeBackend(NativeDecoder(program), context_tokens=128))
    list(engine.run())
    engine, got = submitted(backend_of(program), **limits)
    launches = watched(engine.backend)
    list(engine.run())
    assert [request.ids for request in got] == [request.ids for request in wanted]
    assert limits or sum(launches) == 0  # a penalty wants to know every token before the next step
    engine, got = submitted(backend_of(program), [*SAMPLINGS[:4], SAMPLINGS[0]], **limits)
    launches = watched(engine.backend)
    list(engine.run())
    assert [request.ids for request in got[:4]] == [request.ids for request in wanted[:4]]
    assert sum(launches) > (10 if limits else 40)
    assert max(launches) <= engine.limits.running


def test_answers_that_end_while_the_next_step_runs():
    """By a stop token, by their watcher, by being taken back, and by a watcher that raises."""
    program = programs("llama")
    samplings = [SAMPLINGS[0]] * 4 + [Sampling()]
    engine, wanted = submitted(backend_of(program), samplings)
    list(engine.run())
    backend = backend_of(program)
    engine, launches = TokenEngine(backend, tiny.VOCAB), watched(backend)
    stop, until = wanted[0].ids[5], wanted[1].ids[3]

    def refuse(token):
        if len(raising.ids) == 7:
            raise RuntimeError("seen enough")

    options = [{"stop_tokens": [stop]}, {"watch": lambda token: token == until}, {}, {"watch": refuse}, {"logprobs": None}]
    requests = [
        engine.submit(prompt, max_new_tokens=14, sampling=sampling, **option)
        for prompt, sampling, option in zip(PROMPTS, samplings, options, strict=True)
    ]
    raising, late = requests[3], None
    while engine.busy:
        with contextlib.suppress(RuntimeError):  # the watcher's
            engine.step()
        if len(requests[2].ids) == 4:
            engine.cancel(requests[2])
        if len(requests[4].ids) == 9 and late is None:  # joins while a step is under way
            late = engine.submit(PROMPTS[2], max_new_tokens=14, sampling=samplings[2])
    assert [request.finish_reason for request in requests] == ["stop", "stop", "cancelled", "error", "length"]
    for request, want in zip(requests, wanted, strict=True):
        assert request.ids == want.ids[: len(request.ids)]
    assert [len(request.ids) for request in requests] == [
        wanted[0].ids.index(stop) + 1, wanted[1].ids.index(until) + 1, 4, 7, 14,
    ]  # fmt: skip
    assert late is not None
    assert late.ids == wanted[2].ids
    assert sum(launches) > 20
    assert engine.scheduler.pages.available == engine.scheduler.pages.count  # nobody holds a page any more


def test_probabilities_and_held_back_stops_are_those_of_the_cpu_engine():
    program, found = programs("llama"), []
    for backend in (NativeBackend(NativeDecoder(program), context_tokens=128), backend_of(program)):
        engine = TokenEngine(backend, tiny.VOCAB)
        first = engine.submit(PROMPTS[0], max_new_tokens=9, sampling=SAMPLINGS[0], logprobs=2)
        rest = engine.submit(PROMPTS[1], max_new_tokens=9, sampling=SAMPLINGS[1])
        stops = range(0, tiny.VOCAB, 2)
        held = engine.submit(PROMPTS[3], max_new_tokens=9, min_new_tokens=5, stop_tokens=stops)
        list(engine.run())
        assert not set(held.ids[:5]) & set(stops)
        found.append((first, rest.ids, held.ids))
    assert found[0][1:] == found[1][1:]
    for mine, theirs in zip(found[1][0].logprob, found[0][0].logprob, strict=True):
        assert mine.logprob == pytest.approx(theirs.logprob, abs=1e-4)
        assert [token for token, _ in mine.top] == [token for token, _ in theirs.top]


def test_batch_invariant_rows_are_computed_alike(monkeypatch):
    """Dense products have one shape, sequences one number of splits, and nothing attends in tiles."""
    model = tiny.FAMILIES["qwen3_moe"](head_dim=64)
    enable_experts(model)
    program = lower(quantize(model, W4))
    shapes, splits, linear = set[int](), set[int | None](), torch.nn.functional.linear
    functions = {name: made[0] for name, made in ops._IMPLEMENTATIONS.items()}
    attend = functions["attend_pages"]

    def noted(q, *rest):
        splits.add(rest[-1])
        return attend(q, *rest)

    def dense(x, weight, bias=None):
        if any(weight is one for one in floats):
            shapes.add(len(x))
        return linear(x, weight, bias)

    functions = {name: staticmethod(function) for name, function in functions.items()} | {"attend_pages": staticmethod(noted)}
    del functions["attend_prompt_pages"]
    decoder = CudaDecoder(program, device="cpu", dtype=torch.float32, context_tokens=16)
    floats = [decoder._head.floats, *(layer.experts[2].floats for layer in decoder._layers)]
    monkeypatch.setattr(ops, "ops", lambda: type("ops", (), functions))
    monkeypatch.setattr(torch.nn.functional, "linear", dense)
    prompts = [*PROMPTS, some_ids(110, 9)]  # in a step with others more rows than any recording has
    found = []
    for limits in ({}, {"running": 2, "step_tokens": 20}, {"running": 1, "step_tokens": 130}):
        backend = CudaBackend(decoder, context_tokens=128, batch_invariant=True)
        found.append(answers(backend, prompts, 6, **limits)[0])
    assert found[0] == found[1] == found[2]
    assert (shapes, splits) == ({32}, {8})
    assert found[0][:5] == answers(NativeBackend(NativeDecoder(program), context_tokens=128), tokens=6)[0]


def test_a_prompt_longer_than_a_step_has_steps_that_want_nothing(monkeypatch):
    program = programs("llama")
    monkeypatch.setattr(CudaBackend, "RECORDED_ROWS", (1, 2, 4, 8))
    prompt = some_ids(90, 3)
    want, _ = answers(backend_of(program), [prompt], 5)
    for invariant in (False, True):
        decoder = CudaDecoder(program, device="cpu", dtype=torch.float32, context_tokens=16)
        backend = CudaBackend(decoder, context_tokens=128, batch_invariant=invariant)
        assert answers(backend, [prompt], 5, step_tokens=40)[0] == want


def test_logits_that_are_not_finite_end_their_request(monkeypatch):
    backend = backend_of(programs("llama"))
    backend._bad = 0
    run = backend.run

    def spoil(inputs, wanted=None, prompts=None):
        logits, chosen = run(inputs, wanted, prompts)
        backend._bad += 1
        return logits, chosen if backend._bad < 4 else torch.full_like(chosen, -1)

    monkeypatch.setattr(backend, "run", spoil)
    engine = TokenEngine(backend, tiny.VOCAB)
    request = engine.submit(PROMPTS[0], max_new_tokens=14)
    list(engine.run())
    assert len(request.ids) == 3
    assert "largest logit is NaN or infinite" in str(request.error)


@pytest.fixture(params=["plain", "emulated"])
def way(request, monkeypatch):
    if request.param == "plain":
        yield
        return
    with emulated.machine(monkeypatch):
        direct(monkeypatch)
        yield


def direct(monkeypatch) -> None:
    """Let operators call kernels for CPU tensors too."""
    functions = {name: staticmethod(made[1]) for name, made in ops._IMPLEMENTATIONS.items()}
    monkeypatch.setattr(ops, "ops", lambda: type("ops", (), functions))


@pytest.mark.parametrize("kv", ["float", "int4"])
def test_rows_that_fill_a_step_up_touch_no_page(way, kv):
    backend = backend_of(programs("llama"), kv, torch.float16)
    backend.reserve(Memory(6, 32, 4))
    spans = [Span(2, 0, some_ids(3), [4], 1), Span(0, 0, some_ids(2, 1), [1], 2)]
    want = backend.step(spans)  # 5 rows of 8
    assert backend.captured_rows == [8]
    assert want.shape == (3, tiny.VOCAB)
    for pages in backend.pages:
        for stored in (part for part in pages[:4] if part is not None):
            touched = stored.view(torch.uint8).flatten(3).any(-1).any(1)  # (pages, tokens)
            assert touched.nonzero().tolist() == [[1, 0], [1, 1], [4, 0], [4, 1], [4, 2]]
    torch.testing.assert_close(backend.step(spans), want, atol=0, rtol=0)
    backend.step([Span(3, 0, some_ids(1), [0], 0)], [Copy(4, 5, 3)])
    parts = [part for pages in backend.pages for part in pages[:4] if part is not None]
    assert all(torch.equal(part[4], part[5]) and part[4].any() for part in parts)


def test_whole_requests_through_the_emulated_kernels(monkeypatch):
    model = quantize(tiny.FAMILIES["llama"](head_dim=64), W4).half()
    program = lower(model)
    monkeypatch.setattr(native, "device_types", lambda model: {"cuda"})
    monkeypatch.setattr(chooser, "device_types", lambda model: {"cuda"})
    with emulated.machine(monkeypatch):
        direct(monkeypatch)
        backend = make_backend(model, engine="native")
        assert isinstance(backend, CudaBackend)
        assert describe_engine(model) == "cuda: 2 layers in one recorded step"
        prompts = [some_ids(2, 5), some_ids(11, 6), some_ids(18, 7)]
        got, engine = answers(backend, prompts, 3, running=3, step_tokens=14)
    assert engine.stats["steps"] == 5  # two with runs of neighbours, one of them beside decoded tokens; three recorded ones
    assert set(backend.captured_rows) == {8, 1}  # seven rows, the end of a prompt among them; then one
    assert got == answers(NativeBackend(NativeDecoder(program)), prompts, 3)[0]
    for prompt, tokens in zip(prompts, got, strict=True):
        logits = reference.logits(program, torch.tensor([*prompt, *tokens[:-1]]))[len(prompt) - 1 :]
        lost = logits.max(-1).values - logits.gather(1, torch.tensor(tokens)[:, None])[:, 0]
        assert (lost < 0.02 * logits.abs().max()).all()


def test_what_it_cannot_run_goes_through_modules_and_is_counted(monkeypatch, caplog):
    monkeypatch.setattr(chooser, "FALLBACKS", type(chooser.FALLBACKS)())
    monkeypatch.setattr(native, "device_types", lambda model: {"cuda"})
    monkeypatch.setattr(chooser, "device_types", lambda model: {"cuda"})
    with emulated.machine(monkeypatch), caplog.at_level(logging.WARNING, logger="quantkit"):
        for model, kv, reason in (
            (tiny.FAMILIES["llama"](head_dim=64), "float", "its dtype is torch.float32"),
            (tiny.FAMILIES["llama"]().half(), "float", "heads have 16 channels"),
            (tiny.FAMILIES["llama"](head_dim=64).half(), "int4", "int4 in groups of 32, not keys int4"),
        ):
            assert make_backend(model, kv).engine == "modules"
            assert reason in caplog.records[-1].getMessage()
        assert list(chooser.FALLBACKS.values()) == [1, 1, 1]
        model = tiny.FAMILIES["llama"](head_dim=64).half()
        with pytest.raises(QuantkitError, match="needs the native CPU engine, and this model runs through its modules"):
            make_backend(model, compute="int8")
        assert make_backend(model, KVScheme(W4, W4)).bytes_for(Memory(3, 32, 1)) > 0
        with pytest.raises(QuantkitError, match="the CUDA engine supports 32 only"):
            make_backend(model).reserve(Memory(4, 16, 1))


def test_rows_out_of_range_are_refused():
    backend = backend_of(programs("llama"))
    backend.reserve(Memory(4, 32, 2))
    for span, message in (
        (Span(0, 0, [tiny.VOCAB], [0], 1), "tokens from 192"),
        (Span(0, 0, [-2], [0], 1), "tokens from -2"),
        (Span(0, 126, [5, 5, 5], [0, 1, 2, 3, 0], 1), "positions from 126 to 128"),
        (Span(2, 0, [5], [0], 1), "slots from 2"),
        (Span(0, 0, [5], [4], 1), "pages from 4 to 4; want 0 to 3"),
    ):
        with pytest.raises(KernelError, match=message):
            backend.step([span])
