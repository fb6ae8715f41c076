"""Files beside the weights that say odd things: tokenizers that cannot be read, models that answer with tuples, old notes."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import quantkit
from quantkit.errors import FormatError, QuantkitError
from quantkit.hf.load import load_float
from tests import towers
from tests.tiny import TEXT, tiny_llama, tiny_tokenizer

IDS = torch.arange(4, 28).view(1, -1)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("source")
    tiny_llama().save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="module", params=["compressed-tensors", "native"])
def quantized(source: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    path = tmp_path_factory.mktemp("quantized") / "q"
    quantkit.quantize(source, "w8a16-g32", method="rtn", out=path, output=quantkit.Output(format=request.param))
    return path


def changed(source: Path, path: Path, **values: Any) -> Path:
    """Return a copy of a directory with other values in its config."""
    shutil.copytree(source, path)
    config = json.loads((source / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | values))
    return path


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("tokenizer.json", "{"),
        ("tokenizer.json", "[" * 100_000),
        ("tokenizer.json", '{"model": {"type": "BPE", "vocab": 3}}'),
        ("tokenizer_config.json", ""),
        ("tokenizer_config.json", '{"a":' * 100_000),
    ],
)
def test_a_tokenizer_that_cannot_be_read_is_named(
    source: Path, quantized: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, file: str, text: str
) -> None:
    for place in (source, quantized):
        path = changed(place, tmp_path / place.name)
        (path / file).write_text(text)
        caplog.clear()
        model, tokenizer = quantkit.open_model(path)[:2]
        assert tokenizer is None
        assert bool(torch.isfinite(model(IDS).logits).all())
        said = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
        assert [str(path) in message and "no usable tokenizer" in message for message in said] == [True]
        assert len(said[0]) < 1000


def test_a_directory_without_a_tokenizer_is_no_reason_to_warn(source: Path, caplog: pytest.LogCaptureFixture, tmp_path: Path):
    path = changed(source, tmp_path / "bare")
    for file in path.glob("tokenizer*"):
        file.unlink()
    assert load_float(path)[1] is None
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize("limit", ["many", None, [3]])
def test_a_length_that_is_no_number_is_no_limit(source: Path, tmp_path: Path, limit: Any) -> None:
    path = changed(source, tmp_path / "model")
    values = json.loads((path / "tokenizer_config.json").read_text())
    (path / "tokenizer_config.json").write_text(json.dumps(values | {"model_max_length": limit}))
    model, tokenizer = load_float(path)
    assert tokenizer is not None
    assert tokenizer("the cat " * 200)["input_ids"] == tiny_tokenizer()("the cat " * 200)["input_ids"]
    assert quantkit.generate(model, "the cat", tokenizer=tokenizer, max_new_tokens=2).ids
    assert quantkit.evaluate(path, data=[TEXT], windows=1, length=16, latency=False).quality.tokens > 0


@pytest.mark.parametrize("value", [False, None, 0])
def test_a_model_that_answers_with_tuples_is_quantized_and_read(source: Path, tmp_path: Path, value: Any) -> None:
    want = load_float(source)[0](IDS).logits.detach()
    path = changed(source, tmp_path / "model", return_dict=value)
    quantkit.quantize(path, "w8a16-g32", method="rtn", out=tmp_path / "q")
    for place in (path, tmp_path / "q", changed(tmp_path / "q", tmp_path / "again", return_dict=value)):
        got = quantkit.open_model(place)[0](IDS).logits.detach()
        assert float((got - want).abs().max()) < 0.05 * float(want.abs().max())


def test_a_number_that_the_models_own_forward_chokes_on_is_an_error_of_ours(tmp_path: Path) -> None:
    towers.write("gemma3", tmp_path / "a")
    path = changed(tmp_path / "a", tmp_path / "b", image_token_index=10**400)
    with pytest.raises(QuantkitError, match="OverflowError"):
        quantkit.quantize(path, "w8a16-g32", method="rtn")


@pytest.mark.parametrize("value", ["x", 3, None, [], True])
def test_notes_that_are_no_notes_are_refused(quantized: Path, tmp_path: Path, value: Any) -> None:
    path = changed(quantized, tmp_path / "q", quantkit=value)
    for look in (quantkit.inspect, quantkit.load, lambda path: quantkit.load(path, cache=False)):
        with pytest.raises(FormatError, match=r"quantkit is a .*, want what quantkit has noted; copy the whole checkpoint"):
            look(path)
