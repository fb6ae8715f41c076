"""The native engine: transformers' own greedy tokens, when it is chosen, and that it notices a model that changed."""

import ctypes
import itertools
import logging
import re

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from quantkit.checkpoint import load
from quantkit.engine.backend import Memory, OneSequence
from quantkit.engine.native import NativeBackend
from quantkit.errors import QuantkitError
from quantkit.evaluation import compare_latency
from quantkit.generation.generate import generate
from quantkit.hf import backend as chooser
from quantkit.hf.backend import describe_engine, make_backend
from quantkit.hf.lowering.lower import lower
from quantkit.hf.native import native_decoder
from quantkit.hf.paged import PagedBackend
from quantkit.kernels.cpu.decoder import rejects
from quantkit.kernels.cpu.layout import LinearStruct
from quantkit.kernels.cpu.structs import LayerStruct
from quantkit.nn.linear import QuantLinear
from quantkit.pipeline.quantize import quantize
from quantkit.spec import ActivationSpec, QuantSpec
from tests.tiny import FAMILIES, VOCAB, tiny_llama

CLAIMED = list(FAMILIES)


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
    model.generation_config.eos_token_id = None
    model.config.eos_token_id = None
    assert generate(model, prompt, engine="native", max_new_tokens=12).ids == theirs(model, prompt, 12)
    varied = generate(model, prompt, engine="native", max_new_tokens=16, repetition_penalty=4.0).ids
    assert varied == theirs(model, prompt, 16, repetition_penalty=4.0)
    assert len(set(varied)) > 4  # without the penalty some of these random models only repeat themselves


def logits_of(model: PreTrainedModel, prompt: torch.Tensor, cuts: list[int], **options) -> torch.Tensor:
    """Logits after every cut of the prompt, the last at its end."""
    step = OneSequence(make_backend(model, **options), len(prompt))
    return torch.cat([step(prompt[a:b].tolist(), a) for a, b in itertools.pairwise([0, *cuts])])


def test_a_prompt_in_chunks_and_in_one_piece_to_the_last_bit():
    model, prompt = tiny_llama(max_position_embeddings=2048), prompt_of(1100)
    with torch.inference_mode():
        want = model(prompt[None]).logits[:, -1]
    whole = logits_of(model, prompt, [1100], engine="native")
    torch.testing.assert_close(whole, want, atol=2e-5, rtol=1e-4)
    assert torch.equal(logits_of(model, prompt, list(range(100, 1101, 100)), engine="native")[-1:], whole)


def test_misuse_is_named():
    for options in ({"engine": "fast"}, {"compute": "int4"}):
        with pytest.raises(QuantkitError, match="want one of"):
            make_backend(tiny_llama(), **options)
    with pytest.raises(QuantkitError, match="needs the native CPU engine"):
        make_backend(tiny_llama(), engine="modules", compute="int8")
    with pytest.raises(QuantkitError, match="page_tokens=4: the native engine supports 32 only"):
        make_backend(tiny_llama(), engine="native").reserve(Memory(4, 4, 1))
    with pytest.raises(QuantkitError, match="keys and values can be float or int8"):
        make_backend(tiny_llama(), "int4", engine="native")


class Choosing(nn.Module):
    """Does what its input says."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        y = self.inner(x)
        return y + torch.sin(y) if bool(torch.isfinite(y[..., 0]).all()) else y


def test_a_model_without_a_program_says_so_once_and_is_counted(caplog, monkeypatch):
    monkeypatch.setattr(chooser, "FALLBACKS", type(chooser.FALLBACKS)())
    model = tiny_llama()
    model.model.layers[1].mlp = Choosing(model.model.layers[1].mlp)
    with caplog.at_level(logging.WARNING, logger="quantkit"):
        for _ in range(3):
            assert isinstance(make_backend(model), PagedBackend)
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 1
    assert "mixes tokens" in said[0]
    assert list(chooser.FALLBACKS.values()) == [3]
    with pytest.raises(QuantkitError, match=r"cannot run natively.*mixes tokens.*engine='modules'"):
        make_backend(model, engine="native")
    assert describe_engine(model).startswith("modules: ")
    assert describe_engine(tiny_llama()) == "native: 2 layers in one call per step"
    assert re.fullmatch(r"native: \d+ recorded steps in one call per step", describe_engine(FAMILIES["gpt2"]()))


def test_hooks_are_not_bypassed():
    model, seen = tiny_llama(), []
    handle = model.model.layers[0].mlp.register_forward_hook(lambda module, args, output: seen.append(1))
    assert isinstance(make_backend(model), PagedBackend)
    handle.remove()
    assert isinstance(make_backend(model), NativeBackend)
    model.model.layers[1].register_forward_pre_hook(lambda module, args: seen.append(1))
    assert isinstance(make_backend(model), PagedBackend)  # though there is a decoder by now


def test_a_decoder_is_kept_until_the_model_changes():
    model, prompt = tiny_llama(), prompt_of(8)
    decoder = native_decoder(model)
    assert native_decoder(model) is decoder
    before = logits_of(model, prompt, [8])
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(2.0)  # written to
    changed = logits_of(model, prompt, [8])
    assert not torch.equal(changed, before)
    torch.testing.assert_close(changed, logits_of(model, prompt, [8], engine="modules"), atol=2e-5, rtol=1e-4)
    model.model.norm.weight = torch.nn.Parameter(model.model.norm.weight * 3.0)  # replaced
    again = logits_of(model, prompt, [8], engine="modules")
    torch.testing.assert_close(logits_of(model, prompt, [8]), again, atol=2e-5, rtol=1e-4)


def test_generate_and_bench_use_it_and_say_so():
    model, prompt = tiny_llama(), prompt_of(6)
    want = theirs(model, prompt, 8)
    for engine in ("auto", "native", "modules"):
        assert generate(model, prompt, max_new_tokens=8, stop=(), engine=engine).ids[:8] == cut(want, model)
    found = compare_latency({"a": model}, context=8, new_tokens=2, rounds=1)
    assert found["a"].engine == "native"
    assert compare_latency({"a": model}, context=8, new_tokens=2, rounds=1, engine="modules")["a"].engine == "modules"
    rounded = compare_latency({"a": model}, context=8, new_tokens=2, rounds=1, compute="int8")
    assert rounded["a"].engine == "native, int8 activations"


def cut(ids: list[int], model: PreTrainedModel) -> list[int]:
    """What is left where the end-of-sequence token ends a generation."""
    end = model.config.eos_token_id
    return ids[: ids.index(end) + 1] if end in ids else ids


def test_activations_are_narrow_only_in_a_narrow_model():
    asked = {
        (dtype, compute): make_backend(tiny_llama().to(dtype), compute=compute)
        for dtype in (torch.float32, torch.bfloat16)
        for compute in ("exact", "float32", "int8")
    }
    rounds = {key for key, backend in asked.items() if isinstance(backend, NativeBackend) and backend.bfloat16}
    assert rounds == {(torch.bfloat16, "exact"), (torch.bfloat16, "int8")}
    assert {key[1] for key, backend in asked.items() if isinstance(backend, NativeBackend) and not backend.exact} == {"int8"}


def test_a_model_loaded_to_round_activations_is_run_so_and_shares_its_weights(tiny_quantized):
    exact, rounding = load(tiny_quantized, compute="exact"), load(tiny_quantized, compute="int8")
    prompt = prompt_of(30)
    assert make_backend(exact).engine == "native"
    assert make_backend(rounding).engine == "native, int8 activations"
    layers = [module for module in rounding.modules() if isinstance(module, QuantLinear)]
    assert all(layer.compute == "int8" for layer in layers)  # lowering put them back
    want, got = (logits_of(model, prompt, [30]) for model in (exact, rounding))
    assert 1e-5 * want.abs().max() < (got - want).abs().max() < 0.05 * want.abs().max()
    held = {layer.prepacked().weight.codes.data_ptr() for layer in layers}
    program = native_decoder(rounding)._laid_out.struct
    first = ctypes.cast(program.layers, ctypes.POINTER(LayerStruct)).contents.attention
    assert ctypes.cast(first.qkv, ctypes.POINTER(LinearStruct)).contents.codes in held


@pytest.mark.parametrize("family", ["llama", "mixtral"])
@pytest.mark.parametrize("scheme", ["w8a8", "fp8-dynamic", "fp8", "nvfp4", "mxfp4", "nf4"])
def test_every_kind_of_codes_and_of_rounded_inputs_runs_natively(scheme, family):
    model = FAMILIES[family](intermediate_size=128)
    quantize(model, scheme, method="rtn")
    assert rejects(lower(model)) is None
    assert describe_engine(model).startswith("native")
    ids = prompt_of(6)
    found = generate(model, ids.tolist(), max_new_tokens=1, logprobs=VOCAB).logprobs[0].top
    with torch.inference_mode():
        want = model(ids[None]).logits[0, -1].log_softmax(-1)
    loose = 2e-2 if scheme in ("w8a8", "fp8-dynamic") else 1e-4  # which way an input is rounded may hang on the order of a sum
    torch.testing.assert_close(torch.tensor([value for _, value in sorted(found)]), want, atol=loose, rtol=loose)


def test_inputs_on_a_grid_that_the_kernels_do_not_know_are_left_to_modules():
    """The proof, which runs the modules, would not notice what is missing."""
    model = FAMILIES["llama"]()
    quantize(model, "w8a8", method="rtn")
    for layer in (module for module in model.modules() if isinstance(module, QuantLinear)):
        layer.activation = ActivationSpec(QuantSpec("int8", (1, -1), False, "float32"))
    reason = rejects(lower(model))
    assert reason is not None
    assert reason.startswith(
        "inputs are rounded to int8 channel asym, want symmetric integers or fp8_e4m3 (load with ignore_acti"
    )
    assert describe_engine(model) == f"modules: {reason}"
