"""A whole model on a device: the recorded step against the program's definition, and against itself; skipped without one."""

import pytest
import torch

from quantkit.engine.sampling import Sampling
from quantkit.hf.experts import enable_experts
from quantkit.hf.lowering.lower import lower
from quantkit.kernels.cuda.decoder import CudaDecoder
from quantkit.kernels.cuda.graph import GraphDecoder
from quantkit.kernels.program import reference
from quantkit.spec import QuantSpec
from tests import tiny
from tests.kernels.test_decoder import quantize, some_ids

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("kv", ["float", "int8"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "qwen3_moe"])
def test_recorded_decoding(family, kv):
    model = tiny.FAMILIES[family](head_dim=64)
    enable_experts(model)
    model = quantize(model, QuantSpec("int4", (1, 32), False))
    program = lower(model)
    decoder = CudaDecoder(program, dtype=torch.float16, context_tokens=128)
    prompts = [some_ids(9, 1), some_ids(40, 2), some_ids(33, 3)]
    recorded, eager = (GraphDecoder(decoder, 3, 100, kv=kv, batch_invariant=True) for _ in range(2))
    eager._record = lambda: None
    chosen = [torch.cat([state.read(prompts)[None], state.decode(30)]) for state in (recorded, eager)]
    assert torch.equal(chosen[0], chosen[1])
    for slot, prompt in enumerate(prompts):
        tokens = chosen[0][:, slot].cpu()
        logits = reference.logits(program, torch.tensor([*prompt, *tokens.tolist()[:-1]]))[len(prompt) - 1 :]
        lost = logits.max(-1).values - logits.gather(1, tokens[:, None])[:, 0]
        assert (lost < 0.03 * logits.abs().max()).all()


def test_a_recorded_step_uses_the_latest_sampling():
    model = quantize(tiny.FAMILIES["llama"](head_dim=64), QuantSpec("int4", (1, 32)))
    decoder, prompts = CudaDecoder(lower(model), context_tokens=256), [some_ids(20, seed) for seed in range(3)]
    recorded, eager = (GraphDecoder(decoder, 3, 200, batch_invariant=True) for _ in range(2))
    eager._record = lambda: None
    greedy = [Sampling()] * 3
    drawn = [Sampling(1.5, top_k=50, seed=4), Sampling(), Sampling(0.9, top_p=0.9, min_p=0.01, seed=5)]
    found = []
    for samplings in (greedy, drawn, greedy):
        tokens = []
        for state in (recorded, eager):
            state.set_sampling(samplings)
            tokens.append(torch.cat([state.read(prompts)[None], state.decode(40)]))
        assert torch.equal(tokens[0], tokens[1])
        found.append(tokens[0])
    assert torch.equal(found[0], found[2])
    assert [torch.equal(found[0][:, slot], found[1][:, slot]) for slot in range(3)] == [False, True, False]


def test_a_sequence_gets_the_same_tokens_in_every_batch():
    model = quantize(tiny.FAMILIES["llama"](head_dim=64), QuantSpec("int4", (1, 32)))
    decoder, prompts = CudaDecoder(lower(model), context_tokens=256), [some_ids(20, seed) for seed in range(4)]
    together = GraphDecoder(decoder, 4, 200, batch_invariant=True)
    first, rest = together.read(prompts), together.decode(100)
    for slot, prompt in enumerate(prompts):
        alone = GraphDecoder(decoder, 1, 200, batch_invariant=True)
        assert torch.cat([alone.read([prompt]), alone.decode(100)[:, 0]]).tolist() == [
            int(first[slot]),
            *rest[:, slot].tolist(),
        ]
