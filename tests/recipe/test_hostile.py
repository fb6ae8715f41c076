"""Recipes and settings that nobody would write on purpose: one short error each, in no time."""

import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

import quantkit
from quantkit.cli.console import parse_settings
from quantkit.errors import MOST_CHARACTERS, CalibrationError, QuantkitError, RecipeError, SpecError, shorten
from quantkit.recipe.schema import load_recipe
from quantkit.spec import ActivationSpec, KVScheme, QuantSpec, Scheme, kv_preset

MINIMAL = "model: some/model\noutput: {path: out}\n"
BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}, *a{i - 1}]\n" for i in range(1, 60))


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("a: " + "[" * 5000, "nested deeper than 40 levels"),
        ("a: " + "{b: " * 5000, "nested deeper than 40 levels"),
        ("\n".join(" " * i + "a:" for i in range(200)), "nested deeper than 40 levels"),
        (BOMB, "anchors that stand for more than"),
        ("a: &a [*a]", "an anchor that stands for itself"),
        ("? [a, b]\n: c", "a list or mapping as a key"),
        ("? {a: b}\n: c", "a list or mapping as a key"),
        ("samples: !!int foo", "a value cannot be read"),
        ("samples: !!int ''", "a value cannot be read"),
        ("samples: !!float foo", "a value cannot be read"),
        ("samples: !!bool foo", "a value cannot be read"),
        ("samples: !!timestamp foo", "a value cannot be read"),
        ("samples: !!binary é", "not valid YAML"),
        ("samples: !!python/object/apply:os.system [ls]", "not valid YAML"),
        ("samples: " + "9" * 5000, "a number of 5000 digits"),
        ("samples: 0x" + "f" * 5000, "a number of 5002 digits"),
        ("samples: " + "9" * 30, "less than or equal to"),
        ("# " + "x" * (1 << 20), "a recipe has at most"),
        ("model: a\0b", "not valid YAML"),
    ],
)
def test_a_hostile_recipe_is_refused_at_once(tmp_path, text, wanted):
    path = tmp_path / "recipe.yaml"
    inner = text if not text.startswith("samples") else f"{MINIMAL}calibration:\n  {text}"
    path.write_text(inner)
    start = time.monotonic()
    with pytest.raises(RecipeError, match=wanted) as caught:
        load_recipe(path)
    assert time.monotonic() - start < 5
    assert len(str(caught.value)) <= MOST_CHARACTERS


def test_dates_are_text_and_anchors_may_be_used(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("model: 2024-13-45\noutput: {path: &out out}\nevaluate: {data: *out}\n")
    found = load_recipe(path)
    assert (found.model, found.evaluate.data) == ("2024-13-45", "out")


@pytest.mark.parametrize("setting", ["a=[" + "[" * 3000, "a=!!int foo", "a=" + "9" * 5000, "a=&a [*a]", "a=? [b]\n: c", "a=%"])
def test_settings_on_the_command_line_are_read_with_the_same_care(setting):
    with pytest.raises(RecipeError, match="--set a"):
        parse_settings([setting])


def test_a_setting_has_few_levels(tmp_path):
    (tmp_path / "recipe.yaml").write_text(MINIMAL)
    with pytest.raises(RecipeError, match="a recipe has at most"):
        load_recipe(tmp_path / "recipe.yaml", {".".join("a" * 3000): 1})


def test_recipes_without_a_place_are_errors():
    for path in ("a\0b", "x" * 5000, "\ud83d.yaml", "/", ""):
        with pytest.raises(RecipeError, match="cannot read the recipe"):
            load_recipe(path)


@pytest.mark.parametrize(
    "make",
    [
        lambda: quantkit.preset("w4a16", 64),
        lambda: quantkit.preset("w4a16", "64"),
        lambda: quantkit.preset("w4a16", ["64"]),
        lambda: quantkit.preset("w4a16", [0]),
        lambda: quantkit.preset(None, [64]),
        lambda: quantkit.preset(["w4a16"], [64]),
        lambda: quantkit.preset("w4a16", [64], group_size="64"),
        lambda: quantkit.preset("w4a16", [64], scale_dtype=["float16"]),
        lambda: quantkit.preset("w4a16-g" + "9" * 5000, [64]),
        lambda: quantkit.preset("w4a16" * 1000, [64]),
        lambda: QuantSpec(["int4"]),
        lambda: QuantSpec("int4", 64),
        lambda: QuantSpec("int4", (1, 2.5)),
        lambda: QuantSpec("int4", symmetric="no"),
        lambda: QuantSpec.from_dict(3),
        lambda: QuantSpec.from_dict({"dtype": "int4", "block": 3}),
        lambda: QuantSpec.from_dict({3: "int4"}),
        lambda: Scheme("w4a16"),
        lambda: Scheme(QuantSpec("int4"), "int8"),
        lambda: Scheme.from_dict([]),
        lambda: Scheme.from_dict({"weight": 3}),
        lambda: ActivationSpec("int8"),
        lambda: ActivationSpec.from_dict([]),
        lambda: KVScheme("int8"),
        lambda: KVScheme(recent="3"),
        lambda: kv_preset(["int8"]),
    ],
)
def test_numbers_are_described_by_the_right_kinds_of_values(make: Callable[[], object]) -> None:
    with pytest.raises(SpecError) as caught:
        make()
    assert len(str(caught.value)) <= MOST_CHARACTERS


def test_messages_keep_their_start_and_their_way_out():
    error = QuantkitError(f"{'x' * 5000}: {'word ' * 2000}; use another")
    assert len(str(error)) <= MOST_CHARACTERS
    assert str(error).startswith("xxx")
    assert str(error).endswith("; use another")
    assert "characters)..." in str(error)
    assert shorten("short") == "short"
    with pytest.raises(CalibrationError) as caught:
        quantkit.Calibration(samples="x" * 100_000)
    assert len(str(caught.value)) <= MOST_CHARACTERS


VALUES: list[object] = [None, True, -1, 0, 3, 2.5, float("inf"), float("nan"), 10**400, "", "x", "x" * 3000, "\ud83d", "a\0b"]
VALUES += [[], [[]], {}, {"a": 1}, {"name": "w4a16"}, ["w4a16"], [{"match": "*"}], {"path": 3}, {"options": {"x": []}}]
VALUES += ["re:(", "w4a16-g0", "w4a16-g999", "[[", "🐈"]
KEYS = (
    "model dtype scheme method steps rules calibration output run evaluate name options match skip samples length data column"
)
KEYS += " template bos mode path format overwrite strict bits group_size full"


def test_random_recipes_and_settings_give_errors_of_ours(tmp_path: Path) -> None:
    draw = random.Random(15)
    path, refused = tmp_path / "recipe.yaml", list[str]()

    def value(depth: int) -> object:
        if depth and draw.random() < 0.5:
            inner = {draw.choice(KEYS.split()): value(depth - 1) for _ in range(draw.randrange(4))}
            return inner if draw.random() < 0.7 else [inner]
        return draw.choice(VALUES)

    makers: list[Callable[..., object]] = [quantkit.Calibration, quantkit.Rule, quantkit.Output, quantkit.SchemeChoice]
    for _ in range(250):
        settings = {draw.choice(KEYS.split()): value(2) for _ in range(draw.randrange(1, 5))}
        text = yaml.dump({"model": "a", "output": {"path": "b"}, **settings})
        path.write_text(text, encoding="utf-8", errors="replace")
        for make in (lambda: load_recipe(path), lambda: draw.choice(makers)(**settings)):  # noqa: B023 - called at once
            try:
                make()
            except QuantkitError as error:
                refused.append(str(error))
    assert len(refused) > 250
    assert max(map(len, refused)) <= MOST_CHARACTERS
