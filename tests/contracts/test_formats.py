"""What every format in the registry promises."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantkit.errors import FormatError
from quantkit.formats.base import FORMATS
from quantkit.spec import ActivationSpec, QuantSpec, Scheme
from tests.qtensors import assert_same, random_qtensor

NAMES = [name for name in FORMATS.names() if name != "gguf"]  # which has other numbers: tests/formats/test_gguf.py
BLOCKS = [(1, 32), (1, 8), (1, -1), (-1, -1), (4, 16)]
SPECS = [QuantSpec(f"int{bits}", block, symmetric) for bits in range(2, 9) for block in BLOCKS for symmetric in (True, False)]
W8A8 = [
    Scheme(QuantSpec("int8", (1, -1), scale_dtype="float32"), ActivationSpec(QuantSpec("int8", (1, -1), symmetric, "float32")))
    for symmetric in (True, False)
]


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
    assert_same(codec.decode(codec.encode(original), spec, shape), original)


@pytest.mark.parametrize("name", NAMES)
def test_slices_of_experts_survive(name: str) -> None:
    spec = QuantSpec("int3", (1, 32), symmetric=False)
    stack = random_qtensor(spec, (3, 12, 64))
    part = stack[1].rows(slice(4, 8))
    codec = FORMATS.get(name).codec(Scheme(spec))
    assert_same(codec.decode(codec.encode(part), spec, (4, 64)), part)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("damage", ["missing", "extra", "dtype", "shape"])
def test_wrong_tensors_are_refused(name: str, damage: str) -> None:
    spec = QuantSpec("int4", (1, 32), symmetric=False)
    codec = FORMATS.get(name).codec(Scheme(spec))
    tensors = codec.encode(random_qtensor(spec, (12, 64)))
    victim = next(iter(tensors))
    if damage == "missing":
        del tensors[victim]
    elif damage == "extra":
        tensors["g_idx"] = torch.zeros(64)
    else:
        tensors[victim] = tensors[victim].to(torch.int64) if damage == "dtype" else tensors[victim][:-1]
    with pytest.raises(FormatError, match="g_idx" if damage == "extra" else victim):
        codec.decode(tensors, spec, (12, 64))


@pytest.mark.parametrize("name", NAMES)
def test_config_round_trip(name: str) -> None:
    rule = FORMATS.get(name)
    specs = [s for s in SPECS if not rule.rejects(Scheme(s), (12, 64), "float32")]
    plans = [
        {f"layers.{i}.proj": Scheme(spec) for i, spec in enumerate(specs)},
        {"layers.0.q": Scheme(QuantSpec("int4", (1, 32), scale_dtype="float32")), "layers.1.q": W8A8[0]},
        {"layers.0.q": W8A8[1], "layers.1.q": W8A8[1]},
    ]
    for plan in plans:
        match = rule.dialect.load_config(rule.dialect.dump_config(plan, ["lm_head", "layers.0.gate"], "float32"), "float32", {})
        assert match("lm_head") is None
        assert match("layers.0.gate") is None
        for module, scheme in plan.items():
            found = match(module)
            assert found is not None
            assert found.scheme == scheme
            assert found.codec.layout(scheme.weight, (12, 64)) == rule.codec(scheme).layout(scheme.weight, (12, 64))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("config", [{}, {"version": 1, "groups": 3, "config_groups": 3}, {"config_groups": {"g": {}}}])
def test_malformed_config_is_one_error(name: str, config: dict) -> None:
    with pytest.raises(FormatError, match="quantization_config"):
        FORMATS.get(name).dialect.load_config(config, "float16", {})
