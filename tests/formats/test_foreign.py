"""Other people's formats: their layouts, counted out by hand, and files that contradict themselves."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import quantkit
from quantkit.dtypes import table
from quantkit.errors import FormatError
from quantkit.formats.base import FORMATS, Held
from quantkit.formats.codecs.bitsandbytes import STATE
from quantkit.formats.codecs.modelopt import SCHEMES
from quantkit.formats.dialects.gptq import expressions, with_joined
from quantkit.formats.dialects.mlx import rotary
from quantkit.qtensor import GridTensor
from quantkit.spec import QuantSpec, Scheme
from tests.qtensors import assert_same, random_qtensor
from tests.tiny import tiny_llama

OUT, IN, GROUP = 32, 64, 32


def field(words: Tensor, index: int, bits: int) -> int:
    """Return the ``index``-th code of a stream of little-endian words, low bits first."""
    stream = int.from_bytes(b"".join(struct.pack("<i", int(word)) for word in words), "little")
    return (stream >> (index * bits)) & ((1 << bits) - 1)


def held(tensors: dict[str, Tensor], module: str = "m.layers.0.q") -> dict[str, Held]:
    return {f"{module}.{suffix}": Held(t.dtype, tuple(t.shape), t.clone) for suffix, t in tensors.items()}


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("name", "less"), [("gptq", 1), ("gptq-v2", 0)])
def test_gptq_packs_codes_down_the_columns_and_zero_points_along_rows(name: str, less: int, bits: int) -> None:
    spec = QuantSpec(f"int{bits}", (1, GROUP), symmetric=less == 1)
    qtensor = random_qtensor(spec, (OUT, IN))
    stored = FORMATS.get(name).codec(Scheme(spec)).encode(qtensor)
    codes = qtensor.codes()
    zero = torch.full((OUT, 2), 1 << (bits - 1)) if qtensor.zero_point is None else qtensor.zero_point
    for row, column in ((0, 0), (3, 10), (5, 21), (31, 63), (17, 31)):
        assert field(stored["qweight"][:, row], column, bits) == int(codes[row, column])
        assert field(stored["qzeros"][column // GROUP], row, bits) == int(zero[row, column // GROUP]) - less
        assert stored["scales"][column // GROUP, row] == qtensor.scale[row, column // GROUP]
        assert int(stored["g_idx"][column]) == column // GROUP


def test_symmetric_zero_points_are_the_numbers_everybody_knows() -> None:
    spec = QuantSpec("int4", (1, GROUP))
    for name, word in (("gptq", 0x77777777), ("gptq-v2", 0x88888888)):
        zeros = FORMATS.get(name).codec(Scheme(spec)).encode(random_qtensor(spec, (OUT, IN)))["qzeros"]
        assert {int(value) & 0xFFFFFFFF for value in zeros.flatten()} == {word}


@pytest.mark.parametrize(("name", "label"), [("gptq", "gptq_v2"), ("gptq-v2", "gptq")])
def test_zero_points_of_the_other_version_are_noticed(name: str, label: str) -> None:
    spec = QuantSpec("int4", (1, GROUP))
    rule = FORMATS.get(name)
    stored = rule.codec(Scheme(spec)).encode(random_qtensor(spec, (OUT, IN)))
    other = next(one for _, one in FORMATS if one.claims({"quant_method": "gptq", "checkpoint_format": label}))
    with pytest.raises(FormatError, match="correct checkpoint_format"):
        other.codec(Scheme(spec)).decode(stored, spec, (OUT, IN))


def gptq_config(**values: Any) -> dict[str, Any]:
    base = {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": GROUP,
        "sym": False,
        "desc_act": False,
        "checkpoint_format": "gptq",
    }
    return {**base, **values}


def v1_asym(zero: Tensor) -> tuple[dict[str, Tensor], GridTensor]:
    """Return what a v1 writer makes of an asymmetric weight with these zero points, and the weight."""
    spec = QuantSpec("int4", (1, GROUP), symmetric=False)
    codes = torch.randint(0, 16, (OUT, IN), dtype=torch.uint8)
    qtensor = GridTensor.from_codes(codes, torch.rand(OUT, 2).half() + 0.1, zero, spec)
    less = GridTensor.from_codes(codes, qtensor.scale, (zero - 1) & 15, spec)
    return FORMATS.get("gptq-v2").codec(Scheme(spec)).encode(less), qtensor


def test_v1_zero_points_of_others_are_read_and_a_stored_minus_one_is_not() -> None:
    good, want = v1_asym(torch.randint(1, 16, (OUT, 2), dtype=torch.uint8))
    rule = FORMATS.get("gptq")
    found = rule.dialect.load_config(gptq_config(), "float16", held(good))("m.layers.0.q")
    assert found is not None
    assert_same(found.codec.decode(good, found.scheme.weight, (OUT, IN)), want)
    zero = torch.ones((OUT, 2), dtype=torch.uint8)
    zero[4, 1] = 0
    with pytest.raises(FormatError, match=r"1 of 64 stored zero points are -1.*gptq_v2"):
        found.codec.decode(v1_asym(zero)[0], found.scheme.weight, (OUT, IN))


def test_channels_in_any_order_are_read_exactly() -> None:
    stored, _ = v1_asym(torch.randint(1, 16, (OUT, 2), dtype=torch.uint8))
    order = torch.randperm(IN)
    stored["g_idx"] = (torch.arange(IN, dtype=torch.int32) // GROUP)[order]
    found = FORMATS.get("gptq").dialect.load_config(gptq_config(desc_act=True), "float16", held(stored))("m.layers.0.q")
    assert found is not None
    weight = found.codec.decode(stored, found.scheme.weight, (OUT, IN)).dequantize()
    for row, column in ((0, 0), (7, 13), (31, 63)):
        group = int(stored["g_idx"][column])
        code, zero = field(stored["qweight"][:, row], column, 4), field(stored["qzeros"][group], row, 4) + 1
        assert weight[row, column] == (code - zero) * stored["scales"][group, row].float()
    plain = FORMATS.get("gptq").dialect.load_config(gptq_config(), "float16", held(stored))("m.layers.0.q")
    assert plain is not None
    with pytest.raises(FormatError, match="desc_act is false"):
        plain.codec.decode(stored, plain.scheme.weight, (OUT, IN))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda index: index.fill_(2), "names groups 2 to 2, want 0 to 1"),
        (lambda index: index.fill_(-1), "names groups -1"),
        (lambda index: index.fill_(0), "gives group 0 64 input channels, want 32"),
    ],
)
def test_a_g_idx_that_cannot_be_is_refused(change: Callable[[Tensor], Tensor], says: str) -> None:
    stored, _ = v1_asym(torch.ones((OUT, 2), dtype=torch.uint8))
    change(stored["g_idx"])
    with pytest.raises(FormatError, match=says):
        FORMATS.get("gptq").dialect.load_config(gptq_config(desc_act=True), "float16", held(stored))("m.layers.0.q")


def test_dynamic_rules_are_matched_in_order_from_the_beginning() -> None:
    rules = {
        "-:.*\\.mlp\\.gate$": {},
        "+:m\\.layers\\.[0-1]\\.": {"bits": 8, "group_size": 64},
        "m\\.layers\\.2": {"sym": True},
    }
    match = FORMATS.get("gptq").dialect.load_config(gptq_config(dynamic=rules), "float16", {})
    found = {name: match(f"m.layers.{name}") for name in ("0.mlp.gate", "1.q", "2.q", "3.q")}
    assert found["0.mlp.gate"] is None
    specs = {name: stored.scheme.weight for name, stored in found.items() if stored}
    assert (specs["1.q"].bits, specs["1.q"].group_size, specs["1.q"].symmetric) == (8, 64, False)
    assert specs["2.q"].symmetric
    assert specs["3.q"] == QuantSpec("int4", (1, GROUP), False)


def test_rules_for_several_schemes_name_what_vllm_joins_and_nothing_else() -> None:
    names = [f"m.layers.{i}.self_attn.{part}" for i in range(3) for part in ("q_proj", "k_proj", "v_proj")]
    chosen = [name for name in names if ".1." in name]
    written = expressions(with_joined(chosen), with_joined([name for name in names if name not in chosen]))
    match = FORMATS.get("gptq").dialect.load_config(
        gptq_config(dynamic={f"+:{one}": {"bits": 8} for one in written}), "float16", {}
    )
    every = [*names, *(f"m.layers.{i}.self_attn.qkv_proj" for i in range(3)), "m.layers.11.self_attn.q_proj"]
    eight = [name for name in every if (found := match(name)) is not None and found.scheme.weight.bits == 8]
    assert eight == [*chosen, "m.layers.1.self_attn.qkv_proj"]


@pytest.mark.parametrize("key", ["pack_dtype", "is_marlin_format", "rotation", "adapter"])
def test_a_key_that_changes_the_numbers_is_refused(key: str) -> None:
    with pytest.raises(FormatError, match=rf"quantization_config\.{key} is 'int16', which quantkit cannot load"):
        FORMATS.get("gptq").dialect.load_config(gptq_config(**{key: "int16"}), "float16", {})


def test_autorounds_wrappers_are_read() -> None:
    gptq = {"quant_method": "auto-round", "packing_format": "auto_round:auto_gptq", "bits": 4, "group_size": GROUP, "sym": True}
    gptq["extra_config"] = {"m.layers.0.k": {"bits": 8}, "m.layers.0.gate": {"bits": 16}}
    rule = next(one for _, one in FORMATS if one.claims(gptq))
    spec = QuantSpec("int4", (1, GROUP))
    qtensor = random_qtensor(spec, (OUT, IN))
    stored = FORMATS.get("gptq").codec(Scheme(spec)).encode(qtensor)
    del stored["g_idx"]  # AutoRound writes none
    found = rule.dialect.load_config(gptq, "float16", held(stored))("m.layers.0.q")
    assert found is not None
    assert_same(found.codec.decode(stored, spec, (OUT, IN)), qtensor)
    match = rule.dialect.load_config(gptq, "float16", {})
    eight = match("m.layers.0.k")
    assert eight is not None
    assert eight.scheme.weight.bits == 8
    assert match("m.layers.0.gate") is None
    awq = {**gptq, "packing_format": "auto_round:auto_awq", "sym": False}
    assert next(one for _, one in FORMATS if one.claims(awq)) is FORMATS.get("awq")


def test_awq_packs_output_channels_in_its_order() -> None:
    spec = QuantSpec("int4", (1, GROUP), symmetric=False)
    qtensor = random_qtensor(spec, (OUT, IN))
    stored = FORMATS.get("awq").codec(Scheme(spec)).encode(qtensor)
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    for column in (0, 33):
        for place in range(OUT):
            row = place // 8 * 8 + order[place % 8]
            assert field(stored["qweight"][column], place, 4) == int(qtensor.codes()[row, column])
            assert field(stored["qzeros"][column // GROUP], place, 4) == int(qtensor.zero_point[row, column // GROUP])


def test_awq_gemv_is_read() -> None:
    spec = QuantSpec("int4", (1, GROUP), symmetric=False)
    qtensor = random_qtensor(spec, (OUT, IN))
    zeros = torch.zeros((OUT, 32), dtype=torch.uint8)  # four words of eight fields for groups of 32
    zeros[:, :2] = qtensor.zero_point
    from quantkit.numerics.pack import pack

    scales = torch.zeros((OUT, 32), dtype=torch.float16)
    scales[:, :2] = qtensor.scale
    stored = {"qweight": qtensor.packed, "qzeros": pack(zeros, 4), "scales": scales}
    config = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemv"}
    found = FORMATS.get("awq").dialect.load_config(config, "float16", held(stored))("m.layers.0.q")
    assert found is not None
    assert_same(found.codec.decode(stored, spec, (OUT, IN)), qtensor)


def test_awq_refuses_names_that_its_readers_would_take_for_one_that_stays_in_float() -> None:
    scheme = Scheme(QuantSpec("int4", (1, GROUP), symmetric=False))
    rejects = FORMATS.get("awq").rejects_plan
    assert rejects({"m.layers.0.mlp.gate_proj": scheme}, ["m.layers.0.mlp.down"]) is None
    assert "contains m.layers.0.mlp.gate" in str(rejects({"m.layers.0.mlp.gate_proj": scheme}, ["m.layers.0.mlp.gate"]))
    assert "one grid" in str(rejects({"m.layers.0.a": scheme, "m.layers.0.b": Scheme(QuantSpec("int4", (1, 64), False))}, []))
    assert "lm_head" in str(rejects({"lm_head": scheme}, []))


@pytest.mark.parametrize("scale_dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_mlx_scales_and_biases_are_the_numbers_exactly(symmetric: bool, scale_dtype: str) -> None:
    spec = QuantSpec("int6", (1, GROUP), symmetric, scale_dtype)
    qtensor = random_qtensor(spec, (OUT, IN))
    stored = FORMATS.get("mlx").codec(Scheme(spec)).encode(qtensor)
    codes = qtensor.codes().double()
    wide = stored["scales"].double().repeat_interleave(GROUP, 1), stored["biases"].double().repeat_interleave(GROUP, 1)
    assert torch.equal((codes * wide[0] + wide[1]).float(), qtensor.dequantize())
    assert field(stored["weight"].view(torch.int32)[5], 37, 6) == int(codes[5, 37])
    config = {"bits": 6, "group_size": GROUP, "mode": "affine"}
    found = FORMATS.get("mlx").dialect.load_config(config, scale_dtype, held(stored))("m.layers.0.q")
    assert found is not None
    back = found.codec.decode(stored, found.scheme.weight, (OUT, IN))
    assert torch.equal(back.dequantize(), qtensor.dequantize())
    assert (back.spec.bits, back.spec.symmetric, back.spec.offset) == (6, symmetric, False)


def test_mlx_biases_of_others_are_read_as_they_are() -> None:
    stored = {
        "weight": torch.randint(0, 2**31, (OUT, 8), dtype=torch.int32).view(torch.uint32),
        "scales": torch.randn(OUT, 2).half(),
        "biases": torch.randn(OUT, 2).half(),
    }
    found = FORMATS.get("mlx").dialect.load_config({"bits": 4, "group_size": GROUP}, "float16", held(stored))("m.layers.0.q")
    assert found is not None
    assert found.scheme.weight.offset
    qtensor = found.codec.decode(stored, found.scheme.weight, (OUT, IN))
    want = qtensor.codes()[3, 40].float() * stored["scales"][3, 1].float() + stored["biases"][3, 1].float()
    assert qtensor.dequantize()[3, 40] == want
    assert all(torch.equal(tensor, stored[name]) for name, tensor in found.codec.encode(qtensor).items())
    for name, rule in FORMATS:
        accepts = rule.rejects(found.scheme, (OUT, IN)) is None
        assert accepts == (name in ("mlx", "native")), name


VLLM_MODELOPT = {
    "FP8": {"weight": ("float8_e4m3fn", (OUT, IN)), "weight_scale": ("float32", ()), "input_scale": ("float32", ())},
    "FP8_PER_CHANNEL_PER_TOKEN": {"weight": ("float8_e4m3fn", (OUT, IN)), "weight_scale": ("float32", (OUT,))},
    "W4A16_NVFP4": {
        "weight": ("uint8", (OUT, IN // 2)),
        "weight_scale": ("float8_e4m3fn", (OUT, IN // 16)),
        "weight_scale_2": ("float32", ()),
    },
}
"""What vLLM 0.32 registers: KFp8StaticTensor, KFp8StaticChannel and KNvfp4Static of layers/quantization/modelopt.py."""


@pytest.mark.parametrize("algo", SCHEMES)
def test_modelopt_is_what_vllm_registers_and_reads_back(algo: str) -> None:
    scheme, rule = SCHEMES[algo], FORMATS.get("modelopt")
    assert rule.rejects(scheme, (OUT, IN)) is None
    codes = torch.randint(0, 1 << scheme.weight.bits, (OUT, IN), dtype=torch.uint8)
    codes[(codes & 0x7F) == 0x7F] = 0
    blocks = {"FP8": (1, 1), "W4A16_NVFP4": (OUT, IN // 16)}.get(algo, (OUT, 1))
    scale = torch.rand(blocks) + 0.1
    if algo == "W4A16_NVFP4":
        scale = scale.to(torch.float8_e4m3fn)
    qtensor = GridTensor.from_codes(codes, scale, None, scheme.weight)
    if qtensor.global_scale is not None:
        qtensor = qtensor.with_parts({"global_scale": 1 / torch.rand(1)})
    if algo == "FP8":
        qtensor = qtensor.with_parts({"input_scale": torch.rand(1)})
    stored = rule.codec(scheme).encode(qtensor)
    assert {name: (str(t.dtype)[6:], tuple(t.shape)) for name, t in stored.items()} == VLLM_MODELOPT[algo]
    back = rule.codec(scheme).decode(stored, scheme.weight, (OUT, IN))
    assert all(
        torch.equal(a.view(torch.uint8), b.view(torch.uint8))
        for a, b in zip(back.parts().values(), qtensor.parts().values(), strict=True)
    )
    if "weight_scale_2" in stored:
        want = (
            table("fp4_e2m1")[0][codes.long()]
            * stored["weight_scale"].float().repeat_interleave(16, 1)
            * stored["weight_scale_2"]
        )
        assert torch.allclose(back.dequantize(), want, rtol=3e-7, atol=0)
    config = rule.dialect.dump_config({"m.layers.0.q": scheme}, ["m.layers.0.gate", "lm_head"], "bfloat16")
    assert config["quant_algo"] == algo
    for read in (config, rule.container.twin.dump(config)):  # type: ignore[attr-defined]
        match = rule.dialect.load_config(read, "bfloat16", {})
        assert match("m.layers.0.gate") is None
        found = match("m.layers.0.q")
        assert found is not None
        assert found.scheme == scheme


def test_only_modelopt_wants_global_scales_that_survive_their_inverse() -> None:
    spec = SCHEMES["W4A16_NVFP4"].weight
    tensors = [random_qtensor(spec, (16, 32), seed).with_parts({"global_scale": 7 + torch.rand(1)}) for seed in range(64)]
    kept = {name: [FORMATS.get(name).nearest(one).parts()["global_scale"] for one in tensors] for name in FORMATS.names()}
    asked = kept.pop("modelopt")
    assert all(torch.equal(1 / (1 / one), one) for one in asked)
    own = [one.parts()["global_scale"] for one in tensors]
    assert all(torch.equal(a, b) for found in kept.values() for a, b in zip(found, own, strict=True))
    odd = next(one for one, asks, has in zip(tensors, asked, own, strict=True) if not torch.equal(asks, has))
    with pytest.raises(FormatError, match=r"does not give this global scale back.*format modelopt among the outputs"):
        FORMATS.get("modelopt").codec(Scheme(spec)).encode(odd)


@pytest.mark.parametrize("nested", [False, True])
def test_bitsandbytes_nf4_is_read(nested: bool) -> None:
    codes = torch.randint(0, 16, (OUT, IN), dtype=torch.uint8)
    flat = codes.flatten()
    absmax = torch.rand(OUT)
    state: dict[str, Any] = {"quant_type": "nf4", "blocksize": 64, "dtype": "float16", "shape": [OUT, IN]}
    stored = {
        "weight": ((flat[::2] << 4) | flat[1::2]).reshape(-1, 1),
        "weight.absmax": absmax,
        "weight.quant_map": table("nf4")[0],
    }
    if nested:
        second, outer, values = torch.randint(0, 256, (OUT,), dtype=torch.uint8), torch.rand(1) + 1, torch.linspace(-1, 1, 256)
        absmax = values[second.long()] * outer + 0.25
        stored |= {"weight.absmax": second, "weight.nested_absmax": outer, "weight.nested_quant_map": values}
        state |= {"nested_blocksize": 256, "nested_offset": 0.25, "nested_dtype": "float32"}
    stored[STATE] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    config = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    found = FORMATS.get("bitsandbytes").dialect.load_config(config, "float16", held(stored))("m.layers.0.q")
    assert found is not None
    weight = found.codec.decode(stored, found.scheme.weight, (OUT, IN)).dequantize()
    assert torch.equal(weight, table("nf4")[0][codes.long()] * absmax[:, None])


def test_bitsandbytes_int8_is_read() -> None:
    stored = {
        "weight": torch.randint(-127, 128, (OUT, IN), dtype=torch.int8),
        "SCB": torch.rand(OUT),
        "weight_format": torch.tensor(0, dtype=torch.uint8),
    }
    config = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    found = FORMATS.get("bitsandbytes").dialect.load_config(config, "float16", held(stored))("m.layers.0.q")
    assert found is not None
    weight = found.codec.decode(stored, found.scheme.weight, (OUT, IN)).dequantize()
    assert torch.allclose(weight, stored["weight"].float() * stored["SCB"][:, None] / 127, rtol=2e-7)
    stored["weight_format"] += 2
    with pytest.raises(FormatError, match="weight_format is 2"):
        found.codec.decode(stored, found.scheme.weight, (OUT, IN))


def test_mlx_finds_rotary_settings_under_the_names_it_knows(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_llama(rope_parameters={"rope_type": "linear", "rope_theta": 5e4, "factor": 2.0})
    quantkit.quantize(model, "w4a16-g32", method="rtn", output=quantkit.Output(tmp_path / "out", format="mlx"))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["rope_theta"] == 5e4
    assert config["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}
    assert config["quantization"] == config["quantization_config"] == {"group_size": 32, "bits": 4, "mode": "affine"}
    ids = torch.arange(3, 23)[None]
    with torch.no_grad():
        assert torch.allclose(quantkit.load(tmp_path / "out")(input_ids=ids).logits, model(input_ids=ids).logits, atol=1e-4)
    assert rotary({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}) == {}
    assert "may not find the rotary settings" in caplog.text
