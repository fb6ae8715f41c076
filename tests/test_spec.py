"""Specs, schemes and presets: what exists, what fits, and what the messages say."""

import pytest

from quantkit.errors import SpecError
from quantkit.presets import PRESETS, largest_group_size, preset
from quantkit.spec import ActivationSpec, QuantSpec, Scheme


@pytest.mark.parametrize("name", PRESETS)
def test_presets_say_what_they_are_called(name: str) -> None:
    spec = preset(name, [256, 384]).weight
    assert spec.dtype == f"int{name[1]}"
    assert spec.symmetric != name.endswith("-asym")
    assert spec.block == ((1, -1) if name.startswith("w8a8") else (1, 128))


@pytest.mark.parametrize(("sizes", "group"), [([576, 1536], 64), ([256], 128), ([96, 64], 32), ([100], -1)])
def test_automatic_group_is_the_largest_that_divides_everything(sizes: list[int], group: int) -> None:
    assert largest_group_size(sizes) == group
    assert preset("w4a16", sizes).weight.group_size == group


def test_names_and_arguments_fix_the_group() -> None:
    assert preset("w4a16-asym-g32", [128]).weight == QuantSpec("int4", (1, 32), symmetric=False)
    assert preset("w8a16-channel", [128]).weight.strategy == "channel"
    assert preset("w4a16", [128], group_size=64, symmetric=False).weight.describe() == "int4 g64 asym"
    assert preset("w4a16-g64", [128], group_size=64).weight.group_size == 64


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: preset("w4a17", [64]), r"unknown scheme 'w4a17'; did you mean 'w4a16'\?"),
        (lambda: preset("w4a16-g32", [64], group_size=64), "'w4a16-g32' and group_size=64 disagree"),
        (lambda: preset("w4a16", [64], group_size=0), "group_size=0"),
        (lambda: preset("w4a16-g0", [64]), "group_size=0"),
        (lambda: QuantSpec("int9"), r"unknown dtype 'int9'; did you mean 'int"),
        (lambda: QuantSpec("int4", scale_dtype="fp16"), r"unknown scale_dtype 'fp16'"),
        (lambda: QuantSpec("int4", (0, 4)), r"block=\(0, 4\)"),
        (lambda: QuantSpec.from_dict({"dtype": "int4", "blok": [1, 2]}), "unknown QuantSpec key 'blok'; did you mean 'block'"),
        (lambda: QuantSpec.from_dict({}), "'dtype' is missing"),
    ],
)
def test_mistakes_are_named_with_a_way_out(call: object, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        call()  # type: ignore[operator]


def test_a_group_that_does_not_divide_suggests_one_that_does() -> None:
    assert QuantSpec("int4", (1, 128)).rejects((8, 11000)) == "in=11000 is not a multiple of group_size 128; use 8 or channel"
    assert QuantSpec("int4", (1, 64)).rejects((8, 7)) == "in=7 is not a multiple of group_size 64; use channel"
    assert QuantSpec("int4", (3, 8)).rejects((8, 16)) == "out=8 is not a multiple of block rows 3; use channel"
    assert QuantSpec("int4", (-1, -1)).rejects((8, 7)) is None


def test_json_round_trip() -> None:
    for scheme in (
        Scheme(QuantSpec("int4", (1, 64), symmetric=False)),
        Scheme(QuantSpec("int8"), ActivationSpec(QuantSpec("int8"))),
        Scheme(QuantSpec("int4", (1, 64)), ActivationSpec(QuantSpec("int8", (1, 32)), rotated=True)),
        Scheme(QuantSpec("int8"), ActivationSpec(QuantSpec("int8", (-1, -1)), dynamic=False)),
        Scheme(QuantSpec("int8", (-1, -1), scale_dtype="bfloat16")),
    ):
        assert Scheme.from_dict(scheme.to_dict()) == scheme


def test_files_keep_their_keys_and_old_ones_are_read() -> None:
    """What checkpoints have held from the first version on."""
    common = {"symmetric": True, "rotated": False}
    old = {
        "weight": {"dtype": "int8", "block": [1, -1], "scale_dtype": "float16", "dynamic": False, **common},
        "activation": {"dtype": "int8", "block": [1, -1], "scale_dtype": "float32", "dynamic": True, **common},
    }
    assert preset("w8a8", [64]).to_dict() == old
    assert Scheme.from_dict(old) == preset("w8a8", [64])
    assert Scheme.from_dict({"weight": old["weight"]}) == preset("w8a16-channel", [64])
    with pytest.raises(SpecError, match="a weight cannot be rotated, only activations can"):
        Scheme.from_dict({"weight": {**old["weight"], "rotated": True}})
    with pytest.raises(SpecError, match="unknown QuantSpec key 'rotaded'"):
        Scheme.from_dict({**old, "activation": {**old["activation"], "rotaded": True}})


def test_strategies() -> None:
    names = {(1, -1): "channel", (1, 32): "group", (-1, -1): "tensor", (128, 128): "block", (-1, 32): "block"}
    assert {block: QuantSpec("int8", block).strategy for block in names} == names


def test_8_bit_activations_go_with_channels_unless_a_group_is_named() -> None:
    found = preset("w8a8", [576, 1536])
    assert found == Scheme(QuantSpec("int8", (1, -1)), ActivationSpec(QuantSpec("int8", (1, -1), True, "float32")))
    assert preset("w4a8-g64", [576]).weight.block == (1, 64)
