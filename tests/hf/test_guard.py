"""Configs that transformers chokes on: one short error of ours that names the source."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from quantkit import checkpoint
from quantkit.checkpoint.open import open_model
from quantkit.errors import MOST_CHARACTERS, QuantkitError
from quantkit.hf.load import load_float
from quantkit.pipeline.quantize import plan, quantize
from tests.tiny import tiny_llama


def nested(levels: int) -> str:
    return '{"a":' * levels + "1" + "}" * levels


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("source")
    tiny_llama().save_pretrained(path)
    return path


def changed(source: Path, path: Path, **values: Any) -> Path:
    """Return a copy of a model directory with other values in its config."""
    path.mkdir()
    for file in source.iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    config = json.loads((source / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | values))
    return path


@pytest.mark.parametrize(
    "values",
    [
        {"architectures": 3},
        {"architectures": [3]},
        {"hidden_act": "sillu"},
        {"hidden_act": 3},
        {"rope_parameters": {"rope_type": "twist", "rope_theta": 1e4}},
        {"rope_parameters": 3},
        {"hidden_size": 0},
        {"hidden_size": "64"},
        {"num_attention_heads": 0},
        {"vocab_size": -3},
        {"vocab_size": "x" * 5000},
        {"pad_token_id": 5000},
        {"num_hidden_layers": None},
        {"model_type": ["llama"]},
        {"model_type": "x" * 5000},
        {"dtype": "float17"},
        {"text_config": 3},
    ],
)
def test_a_config_with_a_wrong_value_is_an_error_of_ours(source: Path, tmp_path: Path, values: dict[str, Any]) -> None:
    path, said = changed(source, tmp_path / "model", **values), list[str]()
    for read in (plan, load_float, quantize):
        try:
            read(path)
        except QuantkitError as error:
            said.append(str(error))
    assert all(len(text) <= MOST_CHARACTERS for text in said)


@pytest.mark.parametrize("text", [nested(3000), "[" * 5000, "3", "", "[]", '{"model_type": ' + "9" * 5000 + "}", "\xff"])
def test_a_config_that_is_none_is_an_error_of_ours(source: Path, tmp_path: Path, text: str) -> None:
    path = changed(source, tmp_path / "model")
    (path / "config.json").write_text(text, encoding="latin-1")
    for read in (plan, load_float, quantize, open_model, checkpoint.load, checkpoint.inspect):
        with pytest.raises(QuantkitError):
            read(path)


def test_a_generation_config_that_is_nested_too_deeply_is_named(source: Path, tmp_path: Path) -> None:
    quantize(source, "w8a16", method="rtn", out=tmp_path / "q")
    (tmp_path / "q" / "generation_config.json").write_text(nested(3000))
    with pytest.raises(QuantkitError, match="cannot read the generation config of"):
        checkpoint.load(tmp_path / "q", cache=False)


@pytest.mark.parametrize("name", ["a\0b", "x" * 5000, "", "\ud83d", "a" * 300 + "/b"])
def test_names_that_are_no_paths_are_errors_of_ours(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for read in (plan, quantize, open_model):
        with pytest.raises(QuantkitError):
            read(name)


def test_random_configs_give_errors_of_ours(source: Path, tmp_path: Path) -> None:
    draw = random.Random(15)
    values: list[Any] = [
        None,
        True,
        -1,
        0,
        1,
        3,
        2.5,
        float("inf"),
        "",
        "x" * 3000,
        "a\0b",
        [],
        [[]],
        {},
        {"a": 1},
        "silu",
        [3],
    ]
    path = changed(source, tmp_path / "model")
    config, refused = json.loads((source / "config.json").read_text()), 0
    for _ in range(60):
        (path / "config.json").write_text(json.dumps(config | {draw.choice(list(config)): draw.choice(values)}))
        try:
            plan(path)
        except QuantkitError:
            refused += 1
    assert refused > 20
