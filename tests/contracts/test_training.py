"""What training promises for every scheme: the model that is trained, the converted and the reloaded one compute the same."""

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import quantkit
from quantkit.nn.fake import FakeModule
from quantkit.pipeline.rules import Rule
from quantkit.presets import NAMED, PRESETS
from tests.tiny import FAMILIES

IDS = torch.randint(3, 190, (2, 24), generator=torch.Generator().manual_seed(0))
WIDE = {"hidden_size": 128, "intermediate_size": 128, "head_dim": 32, "num_key_value_heads": 4}
SCHEMES = [*(name for name in PRESETS if not re.match(r"w[56]", name)), *NAMED]
"""Every preset, but for widths between others, which are the same code."""
STATIC = [name for name in (*PRESETS, *NAMED) if name.endswith("-static")]


@pytest.fixture(autouse=True)
def _sums_as_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Multiply by the kernel that sums as torch does, so that what is left is the weights: equal bit for bit."""
    monkeypatch.setenv("QUANTKIT_KERNEL", "reference")


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model.eval()(input_ids=IDS, use_cache=False).logits


def disturb(model: nn.Module) -> None:
    """Take a step that moves codes and scales."""
    model.train()
    model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    with torch.no_grad():
        for part in model.modules():
            if isinstance(part, FakeModule):
                for parameter in part.parameters(recurse=False):
                    if parameter.grad is not None:
                        parameter -= 0.02 * parameter.abs().mean() * parameter.grad.sign()
    model.zero_grad()


def prepared(family: str, scheme: str) -> nn.Module:
    model = FAMILIES[family](**WIDE)
    if scheme not in STATIC:
        return quantkit.prepare(model, scheme)
    text = quantkit.Calibration(data=[IDS])
    start = quantkit.quantize(FAMILIES[family](**WIDE), scheme, method="rtn", calibration=text)
    return quantkit.prepare(model, start=start)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_trained_converted_and_reloaded_models_agree(scheme: str, tmp_path: Path) -> None:
    model = prepared("llama", scheme)
    before = logits(model)
    disturb(model)
    trained = logits(model)
    assert not torch.equal(before, trained)
    quantkit.convert(model)
    assert torch.equal(logits(model), trained)
    quantkit.save(model, tmp_path / "out", format="native")
    assert torch.equal(logits(quantkit.load(tmp_path / "out")), trained)


@pytest.mark.parametrize("family", ["mixtral", "gpt2", "opt", "qwen3_moe"])
@pytest.mark.parametrize("scheme", ["w4a16-asym-g32", "w8a8"])
def test_experts_and_layers_stored_the_other_way_round(family: str, scheme: str, tmp_path: Path) -> None:
    model = quantkit.prepare(FAMILIES[family](), scheme)
    disturb(model)
    trained = logits(model)
    quantkit.convert(model)
    quantkit.save(model, tmp_path / "out", format="native")
    assert torch.equal(logits(quantkit.load(tmp_path / "out")), trained)


def test_the_fast_kernels_agree_up_to_the_rounding_of_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("QUANTKIT_KERNEL")
    model = quantkit.prepare(FAMILIES["llama"](), "w4a16-asym-g32")
    disturb(model)
    trained = logits(model)
    torch.testing.assert_close(logits(quantkit.convert(model)), trained, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama_tied", "llama"])
def test_embedding_and_head(family: str, tmp_path: Path) -> None:
    rules = [Rule("embedding", scheme="w8a16-g32"), Rule("head", scheme="w8a16-g32")]
    model = quantkit.prepare(FAMILIES[family](), "w4a16-asym-g32", rules=rules)
    tables = (model.get_input_embeddings(), model.get_output_embeddings())
    assert (tables[0].weight is tables[1].weight) == (family == "llama_tied")
    disturb(model)
    trained = logits(model)
    quantkit.convert(model)
    quantkit.save(model, tmp_path / "out", format="native")
    assert torch.equal(logits(quantkit.load(tmp_path / "out")), trained)
