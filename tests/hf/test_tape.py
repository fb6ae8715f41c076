"""Tapes: families that are not made of standard layers say what transformers says, and what cannot be said is refused."""

import pytest
import torch
from torch import nn
from transformers import CONFIG_MAPPING

from quantkit import Engine, Output, load, quantize
from quantkit.engine.native import NativeBackend
from quantkit.engine.request import Limits
from quantkit.hf import native
from quantkit.hf.lowering.decode_step import write_tape
from quantkit.hf.lowering.lower import CannotLower
from quantkit.hf.native import native_decoder
from quantkit.kernels.cpu.decoder import NativeDecoder
from quantkit.kernels.program import run_tape
from quantkit.kernels.program.tape import Attend, Mixture, Tape
from tests.sweep import models
from tests.tiny import FAMILIES, tiny_llama

NAMES = (
    "gpt2 gpt_bigcode gptj gpt_neo gpt_neox codegen opt xglm bloom mpt falcon phi "  # biases, learned positions, ALiBi
    "gpt_oss llama4_text deepseek_v2 deepseek_v3 glm4_moe minimax_m2 dots1 qwen2_moe ernie4_5_moe phimoe "  # routers, latents
    "gemma3n_text gemma4_text nanochat apertus hunyuan_v1_dense modernbert-decoder "  # norms, shared keys, inputs per layer
    "mamba mamba2 lfm2_moe qwen3_next recurrent_gemma zaya zamba jamba minimax"  # states
)
LENGTHS = (5, 24, 1, 9)


def made(name: str):
    if name not in CONFIG_MAPPING:
        pytest.skip(f"this release of transformers has no {name}")
    model = models.build(models.config_of(name))
    with torch.no_grad():
        for parts in (model.named_parameters(), model.named_buffers()):
            for path, x in parts:
                if path.endswith("correction_bias"):  # a lost one shows only if it changes choices
                    x.normal_(0, 0.3, generator=torch.Generator().manual_seed(0))
    return model


def prompt_of(length: int) -> list[int]:
    return torch.randint(3, 200, (length,), generator=torch.Generator().manual_seed(length)).tolist()


def forward(model, ids: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float()


def assert_says_the_same(model, tokens: int = 8) -> None:
    """Compare greedy answers of a ragged batch with the model's own forward of the whole text."""
    engine = Engine(model, limits=Limits(kv_tokens=512, step_tokens=16, running=3), engine="native")
    assert isinstance(engine.backend, NativeBackend)
    requests = [engine.submit(prompt_of(length), max_new_tokens=tokens) for length in LENGTHS]
    list(engine.run())
    for length, request in zip(LENGTHS, requests, strict=True):
        want = forward(model, [*prompt_of(length), *request.ids])[length - 1 : -1]
        ours = want.gather(1, torch.tensor(request.ids)[:, None])[:, 0]
        assert (want.max(1).values - ours).max() < 1e-3  # the same token, or one as probable


@pytest.mark.parametrize("name", NAMES.split())
def test_a_family_says_what_transformers_says(name):
    model = made(name)
    decoder = native_decoder(model)
    assert isinstance(decoder, NativeDecoder), decoder
    ids = prompt_of(40)
    got, want = native._in_pieces(decoder, torch.tensor(ids[:30])), forward(model, ids[:30])
    assert (got - want).norm() < 1e-4 * want.norm()
    assert_says_the_same(model)


@pytest.mark.parametrize("name", ["gpt2", "falcon", "gpt_oss", "deepseek_v3", "mamba2", "qwen3_next"])
def test_quantized_ones_too(name, tmp_path):
    quantize(made(name), "w4a16", out=tmp_path / "x", method="rtn", output=Output(format="native"))
    model = load(tmp_path / "x", compute="exact")
    decoder = native_decoder(model)
    assert isinstance(decoder, NativeDecoder), decoder
    assert isinstance(decoder.program, Tape)
    assert any(not isinstance(linear.weight, torch.Tensor) for linear in decoder.program.linears())
    got, want = native._in_pieces(decoder, torch.tensor(prompt_of(30))), forward(model, prompt_of(30))
    assert (got - want).norm() < 1e-4 * want.norm()


def test_a_standard_layer_is_the_same_as_a_tape():
    for family in ("llama", "gemma2", "mixtral"):
        model, ids = FAMILIES[family](attn_implementation="eager"), torch.tensor(prompt_of(20)) % 190
        got, want = run_tape.logits(write_tape(model), ids), forward(model, ids.tolist())
        assert (got - want).norm() < 1e-5 * want.norm()


def test_facts_of_tapes():
    oss = write_tape(FAMILIES["gpt_oss"]())
    attends = [step for step in oss.body.steps if isinstance(step, Attend)]
    assert [step.window for step in attends] == [8, None, 8]
    assert all(step.sinks is not None for step in attends)
    mixtures = [step for step in oss.body.steps if isinstance(step, Mixture)]
    assert [len(step.experts) for step in mixtures] == [4, 4, 4]
    assert mixtures[0].experts[0].up.bias is not None
    shared = write_tape(made("gemma3n_text"))
    assert any(isinstance(step, Attend) for step in shared.body.steps)
    assert write_tape(made("mamba2")).caches == ()


class Added(nn.Module):
    def __init__(self, inner, what):
        super().__init__()
        self.inner, self.what = inner, what

    def forward(self, x):
        return self.inner(x) + self.what(x)


def branch(x):
    return x if x.mean() > 0 else -x


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        (lambda x: x.cumsum(1), "logits from position 0"),
        (lambda x: x.cumsum(0) * 0, "mixes tokens"),
        (branch, "mixes tokens"),
        (lambda x: x * float(x[0, 0, 0]), "depends on values"),
        (lambda x: x.fft.fft(x).real if hasattr(x, "fft") else torch.fft.fft(x).real, "programs do not have"),
        (lambda x: x * x.shape[1], "logits from position 0"),
    ],
    ids=["sums over a sequence", "sums over the batch", "branches", "reads a number", "unknown", "hangs on the length"],
)
def test_what_a_tape_cannot_say_is_refused(what, reason):
    model = tiny_llama()
    model.model.layers[1].mlp = Added(model.model.layers[1].mlp, what)
    with pytest.raises(CannotLower, match=reason):
        write_tape(model)


def test_native_steps_that_are_wrong_are_not_taken(monkeypatch):
    real = native._in_pieces
    monkeypatch.setattr(native, "_in_pieces", lambda decoder, ids: real(decoder, ids) * 1.01)
    assert "other results than its modules" in str(native_decoder(FAMILIES["gpt2"]()))


def test_recording_leaves_the_model_as_it_was():
    model = made("recurrent_gemma")
    before = {path: dict(vars(module)) for path, module in model.named_modules()}
    want = forward(model, prompt_of(9))
    write_tape(model)
    assert {path: list(vars(module)) for path, module in model.named_modules()} == {p: list(v) for p, v in before.items()}
    assert torch.equal(forward(model, prompt_of(9)), want)


def test_half_precision_models_are_tapes_too():
    for name in ("gpt2", "gpt_oss"):
        model = FAMILIES[name]().to(torch.bfloat16)
        assert isinstance(native_decoder(model), NativeDecoder)
