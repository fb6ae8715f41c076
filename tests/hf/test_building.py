"""Models are built in several threads at once, and nobody's code is run by a prompt."""

import io
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import quantkit
from quantkit.cli import app
from quantkit.errors import QuantkitError
from quantkit.hf.building import parameters_on_meta
from quantkit.hf.load import empty_model, load_float
from quantkit.pipeline.quantize import quantize
from tests.tiny import FAMILIES, tiny_llama

IDS = torch.arange(3, 30)[None]


def in_threads(count: int, what: Callable[[int], Any]) -> list[Any]:
    """Return what all calls return, made at the same moment; the first exception is raised."""
    start, found, failed = threading.Barrier(count), [None] * count, []

    def one(index: int) -> None:
        start.wait()
        try:
            found[index] = what(index)
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=one, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]
    return found


def test_loads_in_eight_threads_are_right_and_leave_torch_as_it_was(tmp_path: Path) -> None:
    families = ("llama", "qwen3", "gpt2")
    for name in families:
        quantize(FAMILIES[name](), out=tmp_path / name, method="rtn", output=quantkit.Output(format="native"))
    tiny_llama().save_pretrained(tmp_path / "float")
    want = {name: quantkit.load(tmp_path / name)(IDS).logits for name in families}

    def one(index: int) -> Any:
        if index == 0:
            return load_float(tmp_path / "float")[0]
        if index == 1:
            return empty_model(tiny_llama().config)
        return quantkit.load(tmp_path / families[index % 3])

    for _ in range(2):
        models = in_threads(8, one)
        assert torch.equal(models[0](IDS).logits, tiny_llama()(IDS).logits)
        for index in range(2, 8):
            assert torch.equal(models[index](IDS).logits, want[families[index % 3]])
        assert len({id(tensor) for model in models[2:] for tensor in model.parameters()}) == sum(
            len(list(model.parameters())) for model in models[2:]
        )
        layer = nn.Linear(2, 2)
        assert layer.weight.device.type == "cpu"
        assert layer.weight.dtype == torch.float32


def test_only_the_thread_that_builds_gets_parameters_on_meta() -> None:
    with parameters_on_meta():
        own, others = nn.Linear(2, 2), in_threads(2, lambda _: nn.Linear(2, 2))
    assert own.weight.is_meta
    assert own.weight.requires_grad
    assert not any(other.weight.is_meta for other in [*others, nn.Linear(2, 2)])
    with pytest.raises(ZeroDivisionError), parameters_on_meta():
        raise ZeroDivisionError
    assert not nn.Linear(2, 2).weight.is_meta


@pytest.fixture
def trap(tmp_path: Path) -> tuple[Path, Path]:
    """A directory with code of its own, which leaves a trace when it runs."""
    path, trace = tmp_path / "trap", tmp_path / "trace"
    tiny_llama().save_pretrained(path)
    config = json.loads((path / "config.json").read_text())
    maps = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model", "AutoTokenizer": ["evil.Tokenizer", None]}
    (path / "config.json").write_text(json.dumps({**config, "model_type": "evil", "architectures": ["Evil"], "auto_map": maps}))
    (path / "tokenizer_config.json").write_text(json.dumps({"auto_map": maps, "tokenizer_class": "Evil"}))
    (path / "evil.py").write_text(
        f"open({str(trace)!r}, 'w').close()\nfrom transformers import PretrainedConfig, PreTrainedModel\n"
        "class Config(PretrainedConfig):\n    model_type = 'evil'\n\nclass Model(PreTrainedModel):\n    pass\n"
    )
    return path, trace


@pytest.mark.parametrize("quantized", [False, True])
def test_code_of_a_checkpoint_is_not_run_even_if_somebody_says_yes(
    trap: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, quantized: bool
) -> None:
    path, trace = trap
    if quantized:
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "compressed-tensors"}}))
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 20))
    asked: list[str] = []
    monkeypatch.setattr("builtins.input", lambda prompt="": asked.append(prompt) or "y")
    for attempt in (quantkit.load, quantkit.inspect, quantkit.open_model, quantkit.quantize, quantkit.plan, quantkit.collect):
        with pytest.raises(QuantkitError):
            attempt(path)
    if not quantized:
        with pytest.raises(QuantkitError, match=r"code of its own, which is not run unasked.*trust_remote_code=True"):
            quantkit.plan(path)
    for command in (["inspect", str(path)], ["generate", str(path), "hello"], ["eval", str(path)]):
        assert CliRunner().invoke(app, command, input="y\ny\ny\n").exit_code == 2
    assert not asked
    assert not trace.exists()
