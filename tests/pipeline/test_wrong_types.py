"""Arguments of another type than documented: an error of ours that says what is wanted, before any work."""

from pathlib import Path
from typing import Any

import pytest

import quantkit
from quantkit.errors import QuantkitError
from tests.tiny import tiny_llama, tiny_tokenizer

ODD: list[Any] = [None, True, -1, 1.5, b"x", object(), lambda: 1]


@pytest.mark.parametrize("value", ODD, ids=lambda value: type(value).__name__)
@pytest.mark.parametrize(
    "read",
    [
        quantkit.load,
        quantkit.inspect,
        quantkit.open_model,
        quantkit.load_plan,
        quantkit.load_recipe,
        quantkit.load_statistics,
        quantkit.evaluate,
    ],
)
def test_what_is_no_path_is_named(read: Any, value: Any) -> None:
    with pytest.raises(QuantkitError, match=rf"got a {type(value).__name__} where a path is wanted"):
        read(value)


@pytest.mark.parametrize(
    ("option", "values"),
    [
        ("scheme", [*ODD, [1], {"a": 1}]),
        ("method", [*ODD, [1], quantkit.GPTQ]),
        ("steps", [*ODD, "awq", [1], [None], [quantkit.AWQ]]),
        ("rules", [*ODD, "a", [1], {"a": 1}]),
    ],
)
def test_what_a_run_cannot_work_with_is_named(option: str, values: list[Any]) -> None:
    model = tiny_llama()
    for value in values:
        with pytest.raises(QuantkitError, match=f"{option}.*want "):
            quantkit.quantize(model, **{"scheme": "w8a16", "method": "rtn", "tokenizer": tiny_tokenizer(), option: value})


def test_half_a_character_in_a_path_is_named() -> None:
    with pytest.raises(QuantkitError, match="half a surrogate pair"):
        quantkit.quantize(tiny_llama(), "w8a16", method="rtn", out="\ud800")


@pytest.mark.parametrize("device", [1.5, True, object(), {"a": 1}])
def test_a_device_that_is_none_is_named(tmp_path: Path, device: Any) -> None:
    quantkit.quantize(tiny_llama(), "w8a16", method="rtn", tokenizer=tiny_tokenizer(), out=tmp_path / "q")
    with pytest.raises(QuantkitError, match="want cpu or cuda"):
        quantkit.load(tmp_path / "q", device=device)


@pytest.mark.parametrize("value", [3, "text.txt", ["a text"], {"samples": 8}, quantkit.Calibration], ids=str)
@pytest.mark.parametrize("setting", ["calibration", "output", "run"])
def test_settings_of_another_class_are_named(setting: str, value: Any) -> None:
    model, kind = tiny_llama(), setting.capitalize()
    calls = [quantkit.quantize, lambda model, **given: quantkit.search(model, "4.4 bpw", **given)]
    calls += [lambda model, **given: quantkit.sweep(model, ["w8a16"], ["rtn"], **given)]
    calls += [quantkit.collect] if setting != "output" else []
    for call in calls:
        with pytest.raises(QuantkitError, match=rf"{setting}=.*: want a quantkit\.{kind}"):
            call(model, **{setting: value})


@pytest.mark.parametrize("name", ["windows", "length", "stride", "kl_windows", "batch_size"])
@pytest.mark.parametrize("value", [True, 1.5, "8", [8]], ids=str)
def test_counts_of_an_evaluation_are_whole_numbers(name: str, value: Any) -> None:
    with pytest.raises(QuantkitError, match=f"evaluate: {name}=.*: want a whole number"):
        quantkit.evaluate(tiny_llama(), tokenizer=tiny_tokenizer(), **{name: value})
