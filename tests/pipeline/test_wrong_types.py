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
