"""Several threads that run one model get what they would get alone."""

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from quantkit.generation.generate import generate
from quantkit.nn.linear import QuantLinear, QuantWeight
from quantkit.nn.packed import Packed
from quantkit.pipeline.quantize import quantize
from tests.tiny import FAMILIES, VOCAB

THREADS = 8


def prompts() -> list[Tensor]:
    return [torch.randint(3, VOCAB, (9,), generator=torch.Generator().manual_seed(i)) for i in range(THREADS)]


def at_once(work: Callable[[Tensor], Any]) -> list[Any]:
    """Return what ``work`` makes of every prompt, each in a thread of its own, all of them starting together."""
    found: list[Any] = [None] * THREADS
    start = threading.Barrier(THREADS)

    def run(index: int, prompt: Tensor) -> None:
        start.wait()
        found[index] = work(prompt)

    threads = [threading.Thread(target=run, args=item) for item in enumerate(prompts())]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_the_first_forward_packs_every_layer_once(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = quantize(FAMILIES[family](), "w4a16", method="rtn").model
    layers = [module for module in model.modules() if isinstance(module, QuantLinear | QuantWeight)]
    for layer in layers:
        layer.unpack()
    packed: list[object] = []
    pack = Packed.of

    def counted(qtensor: Any, *rest: Any) -> Packed:
        packed.append(qtensor)
        return pack(qtensor, *rest)

    monkeypatch.setattr(Packed, "of", counted)

    @torch.no_grad()
    def logits(prompt: Tensor) -> Tensor:
        return model(input_ids=prompt[None], use_cache=False).logits

    found = at_once(logits)
    assert len(packed) == len(layers)
    assert all(torch.equal(got, logits(prompt)) for got, prompt in zip(found, prompts(), strict=True))


@pytest.mark.parametrize("family", ["llama", "gpt2"])  # natively, and through its modules
def test_threads_generate_with_one_model(family: str) -> None:
    model = FAMILIES[family]()
    before = model.config._attn_implementation

    def answer(prompt: Tensor) -> list[int]:
        return generate(model, prompt, max_new_tokens=6, stop=()).ids

    found = at_once(answer)
    assert model.config._attn_implementation == before
    assert found == [answer(prompt) for prompt in prompts()]
