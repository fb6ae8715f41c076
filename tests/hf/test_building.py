"""Models are built in several threads at once, and nobody's code is run by a prompt."""

import io
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
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
        with pytest.raises(QuantkitError, match=r"code of its own, which is not run unasked.*--trust-remote-code"):
            quantkit.plan(path)
    for command in (["inspect", str(path)], ["generate", str(path), "hello"], ["eval", str(path)]):
        assert CliRunner().invoke(app, command, input="y\ny\ny\n").exit_code == 2
    assert not asked
    assert not trace.exists()


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Path, Path]]:
    """A float directory whose model only its own code can run, and the file that the code leaves when it runs."""
    path, trace = tmp_path / "m", tmp_path / "trace"
    tiny_llama().save_pretrained(path)
    config = json.loads((path / "config.json").read_text())
    maps = {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.MineForCausalLM"}
    (path / "config.json").write_text(
        json.dumps({**config, "model_type": "mine", "architectures": ["MineForCausalLM"], "auto_map": maps})
    )
    (path / "mine.py").write_text(
        f"open({str(trace)!r}, 'w').close()\nfrom transformers import LlamaConfig, LlamaForCausalLM\n"
        "class Config(LlamaConfig):\n    model_type = 'mine'\n\n"
        "class MineForCausalLM(LlamaForCausalLM):\n    config_class = Config\n"
    )
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    yield path, trace
    forget()


def forget() -> None:
    """Make transformers as it is in a process that has run no code of a model."""
    kind = CONFIG_MAPPING._extra_content.pop("mine", None)
    AutoModelForCausalLM._model_mapping._extra_content.pop(kind, None)


def test_code_runs_where_somebody_says_so_and_goes_with_the_checkpoint(own: tuple[Path, Path], tmp_path: Path) -> None:
    path, trace = own
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: {path}\nmethod: rtn\nscheme: w8a16\noutput: {{path: {tmp_path / 'q'}}}\n")

    def call(*arguments: str, code: int = 0) -> str:
        done = CliRunner().invoke(app, arguments)
        assert done.exit_code == code, (done.output, done.exception)
        return done.output

    for command in ("plan", "run"):
        call(command, str(recipe), code=2)
    assert not trace.exists()
    call("run", str(recipe), "--trust-remote-code")
    assert trace.exists()
    assert (tmp_path / "q" / "mine.py").read_bytes() == (path / "mine.py").read_bytes()
    forget()
    trace.unlink()
    with pytest.raises(QuantkitError, match="--trust-remote-code"):
        quantkit.open_model(tmp_path / "q")
    assert not trace.exists()
    loaded, _ = quantkit.open_model(tmp_path / "q", trust_remote_code=True)
    assert type(loaded).__name__ == "MineForCausalLM"


def test_a_model_that_was_loaded_with_its_code_is_quantized(own: tuple[Path, Path], tmp_path: Path) -> None:
    path, _ = own
    model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)
    quantkit.quantize(model, method="rtn", out=tmp_path / "q")
    assert (tmp_path / "q" / "mine.py").exists()
