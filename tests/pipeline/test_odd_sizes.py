"""One layer whose input size no group divides: only it differs, on every way to a plan, and it is said."""

from pathlib import Path

import pytest
from safetensors import safe_open

import quantkit
from quantkit import checkpoint
from quantkit.errors import SpecError
from quantkit.pipeline.quantize import plan, quantize
from quantkit.pipeline.rules import Rule, SchemeChoice
from quantkit.recipe.run import plan_recipe
from quantkit.recipe.schema import load_recipe
from tests.tiny import tiny_llama

DOWN = ("model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj")


def odd_model():
    return tiny_llama(intermediate_size=100)


def groups(schemes: dict[str, quantkit.Scheme]) -> tuple[set[int], set[int]]:
    """Return the group sizes of the odd layers, and of the others."""
    odd = {scheme.weight.group_size for name, scheme in schemes.items() if name in DOWN}
    return odd, {scheme.weight.group_size for name, scheme in schemes.items() if name not in DOWN}


@pytest.mark.parametrize(
    ("scheme", "rules"),
    [
        ("w4a16", ()),
        ("w8a16-asym", ()),
        ("w4a8", ()),
        (SchemeChoice(bits=3), ()),
        (SchemeChoice(dtype="int5", symmetric=False), ()),
        ("w8a16", (Rule("*", "w4a16"),)),
        ("w8a16-channel", (Rule("re:.*", "w4a16-asym"),)),
    ],
)
def test_only_the_odd_layer_loses_its_groups(scheme: object, rules: tuple[Rule, ...]) -> None:
    found = plan(odd_model(), scheme, rules=rules)
    assert groups(found.plan) == ({-1}, {64})
    assert found.remarks == dict.fromkeys(DOWN, "one scale per channel, because 64 does not divide its input size 100")
    assert any(DOWN[0] in note for note in found.notes)


@pytest.mark.parametrize("format", ["native", "compressed-tensors"])
def test_the_odd_layer_is_written_and_named(format: str, tmp_path: Path) -> None:
    result = quantize(odd_model(), "w4a16", method="rtn", out=tmp_path / "q", output=quantkit.Output(format=format))
    reasons = {row.name: row.reason for row in result.coverage}
    assert {name for name, reason in reasons.items() if "does not divide its input size 100" in str(reason)} == set(DOWN)
    loaded = checkpoint.load(tmp_path / "q", cache=False)
    assert groups({name: quantkit.Scheme(loaded.get_submodule(name).qtensor.spec) for name in result.plan}) == ({-1}, {64})


def test_a_recipe_predicts_the_bytes_and_says_it(tmp_path: Path) -> None:
    odd_model().save_pretrained(tmp_path / "model")
    text = f"model: {tmp_path}/model\nscheme: w4a16\nmethod: rtn\noutput: {{path: {tmp_path}/q}}\n"
    (tmp_path / "r.yaml").write_text(text)
    preview = plan_recipe(load_recipe(tmp_path / "r.yaml"))
    assert groups(preview.resolution.plan) == ({-1}, {64})
    assert any("one scale per channel, because 64 does not divide" in note for note in preview.resolution.notes)
    result = quantize(odd_model(), preview.resolution, method="rtn", out=tmp_path / "q")
    with safe_open(tmp_path / "q" / "model.safetensors", "pt") as file:
        assert sum(file.get_tensor(name).nbytes for name in file.keys()) == preview.estimate.total_bytes  # noqa: SIM118
    assert any("because 64 does not divide" in str(row.reason) for row in result.coverage)


@pytest.mark.parametrize("scheme", ["w4a16-g64", "nf4", "mxfp4", "nvfp4", "w8a8-g32", quantkit.preset("w4a16", [64, 100])])
def test_a_block_that_is_asked_for_is_not_changed_in_silence(scheme: object) -> None:
    with pytest.raises(
        SpecError, match=rf"{DOWN[0]}: in=100 is not a multiple of .*give these layers another scheme by a rule"
    ):
        plan(odd_model(), scheme)
    rules = [Rule("*.down_proj", "w8a16")]
    assert groups(plan(odd_model(), scheme, rules=rules).plan)[0] == {-1}


def test_a_preset_keeps_the_group_that_divides_the_most() -> None:
    assert quantkit.preset("w4a16", [1024, 1024, 1000]).weight.group_size == 128
    assert quantkit.preset("w4a16", [576, 1024]).weight.group_size == 64
    assert quantkit.preset("w4a16", [1000]).weight.group_size == -1
