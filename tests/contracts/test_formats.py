"""What every format in the registry promises."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantkit.errors import FormatError
from quantkit.formats.base import FORMATS, Format, Held
from quantkit.spec import ActivationSpec, QuantSpec, Scheme
from tests.qtensors import assert_same, random_qtensor

NAMES = [name for name in FORMATS.names() if name != "gguf"]  # which has other numbers: tests/formats/test_gguf.py
BLOCKS = [(1, 32), (1, 8), (1, -1), (-1, -1), (4, 16)]
SPECS = [QuantSpec(f"int{bits}", block, symmetric) for bits in range(2, 9) for block in BLOCKS for symmetric in (True, False)]
W8A8 = [
    Scheme(QuantSpec("int8", (1, -1), scale_dtype="float32"), ActivationSpec(QuantSpec("int8", (1, -1), symmetric, "float32")))
    for symmetric in (True, False)
]


def holds(name: str, spec: QuantSpec) -> bool:
    """Say whether a format stores a grid of groups."""
    return spec.strategy == "group" and FORMATS.get(name).rejects(Scheme(spec), (32, 64)) is None


WRITTEN = [name for name in NAMES if any(holds(name, spec) for spec in SPECS)]
"""Formats that store integers in groups; the others are only read, or store other numbers: tests/formats/test_foreign.py."""


@pytest.mark.parametrize("spec", SPECS, ids=QuantSpec.describe)
@pytest.mark.parametrize("name", NAMES)
def test_decode_after_encode_is_the_identity(name: str, spec: QuantSpec) -> None:
    rule, scheme = FORMATS.get(name), Scheme(spec)
    if rule.rejects(scheme, (12, 64)):
        with pytest.raises(FormatError):  # refused at plan time and not written by accident either
            rule.codec(scheme).encode(random_qtensor(spec, (12, 64))) if spec.strategy != "block" else refuse()
        return
    original = random_qtensor(spec, (12, 64))
    codec = rule.codec(scheme)
    tensors = codec.encode(original)
    assert {suffix: (t.dtype, tuple(t.shape)) for suffix, t in tensors.items()} == codec.layout(spec, original.shape)
    assert all(t.is_contiguous() for t in tensors.values())
    assert_same(codec.decode(tensors, spec, original.shape), original)


def refuse() -> None:
    raise FormatError("blocks are refused by rejects, the codec never sees them")


@pytest.mark.parametrize("name", NAMES)
@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_any_shape_survives(name: str, data: st.DataObject) -> None:
    group = data.draw(st.sampled_from([1, 3, 8, -1]))
    spec = QuantSpec(f"int{data.draw(st.integers(2, 8))}", (1, group), data.draw(st.booleans()), "float32")
    shape = (data.draw(st.integers(1, 40)), data.draw(st.integers(1, 12)) * max(group, 1))
    original = random_qtensor(spec, shape, data.draw(st.integers(0, 99)))
    codec = FORMATS.get(name).codec(Scheme(spec))
    if FORMATS.get(name).rejects(Scheme(spec), shape):
        with pytest.raises(FormatError):
            codec.encode(original)
        return
    assert_same(codec.decode(codec.encode(original), spec, shape), original)


@pytest.mark.parametrize("name", WRITTEN)
def test_slices_of_experts_survive(name: str) -> None:
    spec = held_by(name)
    stack = random_qtensor(spec, (3, 96, 64))
    part = stack[1].rows(slice(32, 64))
    codec = FORMATS.get(name).codec(Scheme(spec))
    assert_same(codec.decode(codec.encode(part), spec, (32, 64)), part)


def held_by(name: str) -> QuantSpec:
    """Return a grid that a format stores."""
    return next(spec for spec in SPECS if holds(name, spec))


@pytest.mark.parametrize("name", WRITTEN)
@pytest.mark.parametrize("damage", ["missing", "extra", "dtype", "shape"])
def test_wrong_tensors_are_refused(name: str, damage: str) -> None:
    spec = held_by(name)
    codec = FORMATS.get(name).codec(Scheme(spec))
    tensors = codec.encode(random_qtensor(spec, (32, 64)))
    victim = next(iter(tensors))
    if damage == "missing":
        del tensors[victim]
    elif damage == "extra":
        tensors["odd"] = torch.zeros(64)
    else:
        tensors[victim] = tensors[victim].to(torch.int64) if damage == "dtype" else tensors[victim][:-1]
    with pytest.raises(FormatError, match="odd" if damage == "extra" else victim):
        codec.decode(tensors, spec, (32, 64))


@pytest.mark.parametrize("name", NAMES)
def test_config_round_trip(name: str) -> None:
    rule = FORMATS.get(name)
    every = [Scheme(s) for s in SPECS]
    plans = [
        {f"m.layers.{i}.proj": scheme for i, scheme in enumerate(every)},
        *({f"m.layers.{i}.proj": scheme for i in range(3)} for scheme in every),
        {"m.layers.0.q": Scheme(QuantSpec("int4", (1, 32), scale_dtype="float32")), "m.layers.1.q": W8A8[0]},
        {"m.layers.0.q": W8A8[1], "m.layers.1.q": W8A8[1]},
    ]
    for asked in plans:
        plan = {module: scheme for module, scheme in asked.items() if not rule.rejects(scheme, (32, 64), "float32")}
        if not plan or rule.rejects_plan(plan, ["lm_head", "m.layers.0.gate"]):
            continue
        config = rule.dialect.dump_config(plan, ["lm_head", "m.layers.0.gate"], "float32")
        match = rule.dialect.load_config(config, "float32", files_of(rule, plan))
        assert match("lm_head") is None
        assert match("m.layers.0.gate") is None
        for module, scheme in plan.items():
            found = match(module)
            assert found is not None
            assert found.scheme == scheme
            assert found.codec.layout(scheme.weight, (32, 64)) == rule.codec(scheme).layout(scheme.weight, (32, 64))


def files_of(rule: Format, plan: dict[str, Scheme]) -> dict[str, Held]:
    """Return what a checkpoint of a plan holds."""
    found = {}
    for module, scheme in plan.items():
        for suffix, tensor in rule.codec(scheme).encode(random_qtensor(scheme.weight, (32, 64))).items():
            found[f"{module}.{suffix}"] = Held(tensor.dtype, tuple(tensor.shape), tensor.clone)
    return found


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("config", [{}, {"version": 1, "groups": 3, "config_groups": 3}, {"config_groups": {"g": {}}}])
def test_malformed_config_is_one_error(name: str, config: dict) -> None:
    with pytest.raises(FormatError, match="quantization_config"):
        FORMATS.get(name).dialect.load_config(config, "float16", {})("m.layers.0.q")
