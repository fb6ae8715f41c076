"""The CUDA decoder's steps on the CPU, in plain torch and through the emulated kernels, against the program's definition."""

import pytest
import torch

import quantkit
from quantkit.engine.sampling import Sampling
from quantkit.errors import KernelError
from quantkit.hf.experts import enable_experts
from quantkit.hf.lowering.lower import lower
from quantkit.hf.structure import describe
from quantkit.kernels.cuda import nvcc, ops
from quantkit.kernels.cuda.decoder import CudaDecoder, rejects
from quantkit.kernels.cuda.graph import GraphDecoder
from quantkit.kernels.program import reference
from quantkit.numerics.noise import gumbel
from quantkit.spec import QuantSpec
from tests import tiny
from tests.cuda import emulated
from tests.kernels.test_decoder import quantize, round_site, some_ids
from tests.shaped import shape_logits

W4 = QuantSpec("int4", (1, 32), False)


def quantized(family: str, spec: QuantSpec):
    model = tiny.FAMILIES[family](head_dim=64)
    enable_experts(model)
    return quantize(model, spec)


def decoder_of(model, dtype: torch.dtype = torch.float16) -> CudaDecoder:
    return CudaDecoder(lower(model), device="cpu", dtype=dtype, context_tokens=128)


def read_in_pieces(decoder: CudaDecoder, ids: list[int], kv: str = "float") -> torch.Tensor:
    """Logits of every token: a prompt of seven at once, the rest one by one, each step's only."""
    state = GraphDecoder(decoder, 1, len(ids) + 1, kv=kv)
    where = state._where
    rows = []
    for start, stop in ((0, 7), *((at, at + 1) for at in range(7, len(ids)))):
        positions = torch.arange(start, stop, dtype=torch.int32)
        here = where._replace(positions=positions, slots=torch.zeros_like(positions))
        rows.append(decoder.step(torch.tensor(ids[start:stop]), here, state._pages)[0])
    return torch.cat(rows)


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.float() - want).norm() / want.norm())


@pytest.mark.parametrize("family", ["llama", "llama_tied", "qwen3", "gemma2", "smollm3", "cohere"])
def test_float_families(family):
    options = {"head_dim": 64, "num_hidden_layers": 2, "layer_types": None}
    if family == "cohere":
        model = tiny.build("cohere", logit_scale=0.25, **options)
    else:
        known = family in ("gemma2",)
        model = tiny.FAMILIES[family](head_dim=64, **({"sliding_window": 8} if known else {}))
    decoder, ids = decoder_of(model), some_ids(12)
    want = reference.logits(decoder.program, torch.tensor(ids))
    assert error(read_in_pieces(decoder, ids), want) < 5e-3
    assert error(read_in_pieces(decoder, ids, "int8"), want) < 3e-2


@pytest.mark.parametrize("spec", [W4, QuantSpec("int8")], ids=["int4", "int8"])
@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_quantized_families(family, spec):
    model = quantized(family, spec)
    ids = some_ids(12)
    decoder = decoder_of(model)
    want = reference.logits(decoder.program, torch.tensor(ids))
    assert error(read_in_pieces(decoder, ids), want) < 5e-3


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_through_the_emulated_kernels(family, monkeypatch):
    model = quantized(family, W4)
    decoder, ids = decoder_of(model), some_ids(9)
    want = reference.logits(decoder.program, torch.tensor(ids))
    functions = {name: made[1] for name, made in ops._IMPLEMENTATIONS.items()}
    with emulated.machine(monkeypatch):
        monkeypatch.setattr(ops, "ops", lambda: type("ops", (), {k: staticmethod(f) for k, f in functions.items()}))
        assert error(read_in_pieces(decoder, ids), want) < 5e-3


class Listening:
    """A library that notes what it is asked for."""

    def __init__(self, library, heard: list[str]) -> None:
        self._library, self._heard = library, heard

    def __getattr__(self, name: str):
        self._heard.append(name)
        return getattr(self._library, name)


@pytest.mark.parametrize("family", ["llama", "phi3"])  # gate and up apart in the model, and in one
def test_a_layer_is_eight_kernels(family, monkeypatch):
    decoder, heard = decoder_of(quantized(family, W4)), list[str]()
    functions = {name: staticmethod(made[1]) for name, made in ops._IMPLEMENTATIONS.items()}
    with emulated.machine(monkeypatch):
        monkeypatch.setattr(ops, "ops", lambda: type("ops", (), functions))
        monkeypatch.setattr(nvcc, "library", lambda: Listening(emulated.library(), heard))
        state = GraphDecoder(decoder, 1, 4)
        decoder.step(torch.tensor([5]), state._where, state._pages, batch_invariant=True)
    product = "qk_matmul_codes4"
    layer = [product, "qk_append", "qk_attend", product, "qk_norm", product, product, "qk_norm"]
    assert heard[: 1 + 2 * len(layer)] == ["qk_norm", *layer, *layer]


@pytest.mark.parametrize("way", ["plain", "emulated"])
@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_norms_round_for_the_products_that_read_them(family, way, monkeypatch):
    model = tiny.FAMILIES[family](head_dim=64)
    enable_experts(model)
    model = quantkit.quantize(model, "w8a8", method="rtn").model.half()
    decoder, ids, heard = decoder_of(model), some_ids(9), list[str]()
    with torch.no_grad():
        want = model.float()(torch.tensor([ids])).logits[0]
    if way == "plain":
        assert error(read_in_pieces(decoder, ids), want) < 1.5e-2
        return
    functions = {name: staticmethod(made[1]) for name, made in ops._IMPLEMENTATIONS.items()}
    with emulated.machine(monkeypatch):
        monkeypatch.setattr(ops, "ops", lambda: type("ops", (), functions))
        monkeypatch.setattr(nvcc, "library", lambda: Listening(emulated.library(), heard))
        assert error(read_in_pieces(decoder, ids), want) < 1.5e-2
    product, mix = "qk_matmul_int8", ["qk_matmul_int8", "qk_norm", "qk_matmul_int8"]  # one rounds what the gate has made
    if family == "llama":
        layer = [product, "qk_append", "qk_attend", "qk_norm", product, "qk_norm", *mix, "qk_norm"]
        assert heard[: 1 + 2 * len(layer)] == ["qk_norm", *layer, *layer]


def test_a_long_prompt_on_hopper(monkeypatch):
    """Products of more than 64 tokens are wgmma's; the head sees one row, and says where its largest logits are."""
    model = tiny.FAMILIES["llama"](head_dim=64)
    for site in describe(model).sites:
        round_site(model, site, QuantSpec("int8") if "down_proj" in site.name else W4)
    decoder, prompt, heard = decoder_of(model), some_ids(70, 4), list[str]()
    want = reference.logits(decoder.program, torch.tensor(prompt))[-1:]
    functions = {name: staticmethod(made[1]) for name, made in ops._IMPLEMENTATIONS.items()}
    with emulated.machine(monkeypatch, capability=(9, 0)):
        monkeypatch.setattr(ops, "ops", lambda: type("ops", (), functions))
        monkeypatch.setattr(nvcc, "library", lambda: Listening(emulated.library(), heard))
        state = GraphDecoder(decoder, 1, 80)
        chosen = state.read([prompt])
    assert heard.count("qk_prompt") >= 8
    lost = want.max() - want[0, int(chosen)]
    assert lost < 0.02 * want.abs().max()


def test_decoding_chooses_the_most_likely_and_batches_do_not_matter():
    model = quantized("llama", W4)
    decoder, prompts = decoder_of(model), [some_ids(9, 1), some_ids(4, 2), some_ids(33, 3)]
    together = GraphDecoder(decoder, 3, 64)
    first, rest = together.read(prompts), together.decode(6)
    program = decoder.program
    for slot, prompt in enumerate(prompts):
        alone = GraphDecoder(decoder, 1, 64)
        chosen = torch.cat([alone.read([prompt]), alone.decode(4)[:, 0], alone.decode(2)[:, 0]])
        assert chosen.tolist() == [int(first[slot]), *rest[:, slot].tolist()]
        logits = reference.logits(program, torch.tensor([*prompt, *chosen.tolist()[:-1]]))[len(prompt) - 1 :]
        near = logits.max(-1).values - logits.gather(1, chosen[:, None])[:, 0]
        assert (near < 0.02 * logits.abs().max()).all()


def test_every_sequence_has_its_own_sampling():
    decoder, prompts = decoder_of(quantized("llama", W4)), [some_ids(9, 1), some_ids(4, 2), some_ids(17, 3)]
    samplings = [Sampling(1.5, top_k=40, seed=8), Sampling(), Sampling(0.9, top_p=0.9, min_p=0.01, seed=2)]

    def tokens(prompts: list[list[int]], samplings: list[Sampling]) -> torch.Tensor:
        state = GraphDecoder(decoder, len(prompts), 40)
        state.set_sampling(samplings)
        return torch.cat([state.read(prompts)[None], state.decode(12)])

    together = tokens(prompts, samplings)
    for slot in range(3):
        assert torch.equal(tokens(prompts[slot : slot + 1], samplings[slot : slot + 1])[:, 0], together[:, slot])
    greedy = tokens(prompts, [Sampling()] * 3)
    assert torch.equal(greedy[:, 1], together[:, 1])
    assert not torch.equal(greedy[:, 0], together[:, 0])
    for slot in (0, 2):  # every token is the winner among those that the engine would keep
        ids = [*prompts[slot], *together[:, slot].tolist()]
        start = len(prompts[slot]) - 1
        logits = reference.logits(decoder.program, torch.tensor(ids[:-1]))[start:]
        positions = torch.arange(start, len(ids) - 1, dtype=torch.int32)
        scores = shape_logits(logits, [samplings[slot]] * 13) + gumbel(
            tiny.VOCAB, torch.full((13,), samplings[slot].seed), positions
        )
        assert (scores.argmax(-1) == together[:, slot]).sum() >= 12  # logits of half precision may change a close race
    state = GraphDecoder(decoder, 3, 40)
    state.read(prompts)
    state.set_sampling([Sampling(1.5, seed=seed) for seed in range(3)])  # after the prompts, as well as before
    assert not torch.equal(state.decode(12), greedy[1:])


def test_what_it_cannot_run_is_named():
    assert "heads have 16 channels" in str(rejects(lower(tiny.tiny_llama())))
    assert "head norm" in str(rejects(lower(tiny.FAMILIES["olmo2"](hidden_size=256, num_attention_heads=4))))
    assert "experts" in str(rejects(lower(tiny.FAMILIES["mixtral"](head_dim=64))))
    with pytest.raises(KernelError, match="heads have 16"):
        decoder_of(tiny.tiny_llama())
    state = GraphDecoder(decoder_of(tiny.FAMILIES["llama"](head_dim=64)), 1, 16)
    with pytest.raises(KernelError, match="want a prompt first"):
        state.decode(1)
    with pytest.raises(KernelError, match="want 1, 1 to 15"):
        state.read([[]])
