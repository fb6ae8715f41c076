"""Layers that choose the tokens they attend to by an index: on pages, in ragged batches, as transformers computes them."""

import pytest
import torch
from transformers import CONFIG_MAPPING

from quantkit.engine.backend import Copy, Memory, Span
from quantkit.engine.request import Limits
from quantkit.generation.engine import Engine
from quantkit.hf.backend import make_backend
from quantkit.hf.paged import PagedBackend
from tests.sweep import models

TYPES = ("deepseek_v32", "glm_moe_dsa", "axk2", "dots3_note_text", "hy_v4")
LENGTHS = (5, 24, 1, 13, 33)
"""Fewer and more than the 8 tokens that these models choose."""


@pytest.fixture(scope="module", params=TYPES)
def model(request):
    if request.param not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {request.param}")
    config = models.config_of(request.param)
    config.get_text_config().index_n_heads = 32  # few heads score many tokens exactly 0, and which of those are chosen is open
    assert config.get_text_config().index_topk == 8
    return models.build(config).eval()


def prompt_of(model, length: int) -> list[int]:
    generator = torch.Generator().manual_seed(length)
    return torch.randint(3, model.config.get_text_config().vocab_size, (length,), generator=generator).tolist()


def test_greedy_tokens_of_a_ragged_batch_equal_transformers(model):
    limits = Limits(kv_tokens=512, page_tokens=4, step_tokens=16)
    engine = Engine(model, limits=limits, engine="modules")
    assert isinstance(engine.backend, PagedBackend)
    for _ in range(2):  # the second time prompts are found on pages
        requests = [engine.submit(prompt_of(model, n), max_new_tokens=6) for n in LENGTHS]
        list(engine.run())
        for length, request in zip(LENGTHS, requests, strict=True):
            ids = torch.tensor([prompt_of(model, length)])
            want = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, eos_token_id=None, do_sample=False
            )
            assert request.ids == want[0, length:].tolist()
    assert engine.scheduler.pages.hit_tokens >= 20
    assert engine.scheduler.pages.used == 0


def test_logits_on_copied_and_shared_pages_equal_a_plain_forward(model):
    first, second = prompt_of(model, 21), prompt_of(model, 13)
    second[:6] = first[:6]
    backend = make_backend(model, engine="modules")
    backend.reserve(Memory(16, 4, 2))
    backend.step([Span(0, 0, first[:9], [0, 1, 2], 0)])
    # the second sequence reads page 0 of the first and a copy of half its page 1
    spans = [Span(1, 6, second[6:], [0, 9, 7, 5], 7), Span(0, 9, first[9:], [0, 1, 2, 3, 11, 4], 12)]
    got = backend.step(spans, [Copy(1, 9, 2)])
    with torch.inference_mode():
        want = [model(input_ids=torch.tensor([ids]), use_cache=False).logits[0] for ids in (second, first)]
    want = torch.cat([want[0][6:], want[1][9:]])
    assert (got - want).abs().max() <= 1e-4 * want.abs().max()
